"""Optimizers and learning-rate schedules, all of them optax.

Which parameters decay, go slower or wait is decided by name: a parameter's path with slashes, as in
vit/blocks/mlp/fc1/kernel. A regular expression must match all of it.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from dlc_jax.errors import UserError
from dlc_jax.typing import Tree


class Optimizer(NamedTuple):
    """An optax transformation, and the learning rate by step, for the log."""

    tx: optax.GradientTransformation
    learning_rate: Callable


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """The `optimizer` section of a recipe: AdamW with a linear warm-up.

    Attributes:
      learning_rate: after the warm-up.
      schedule: after the warm-up, "constant", "cosine" or "linear" towards `final * learning_rate`.
      warmup: steps over which the rate rises from 0.
      final: last learning rate, as a multiple of the first.
      weight_decay: decoupled. What slows a parameter's learning slows its decay as well.
      weight_decay_final: weight decay of the last step, as a multiple of the first's; a cosine
        between.
      decayed: regular expression of what decays. The default leaves biases, norms, tables, tokens
        and scales alone. By name, because scanned layers give even a bias two dimensions.
      layer_decay: a parameter n layers below the heads learns at layer_decay^n of the rate. Models
        say how many layers: `Encoder.layer`.
      multipliers: (regular expression, factor) of the learning rate, on top of that.
      freeze: (regular expression, steps) of parameters that stay as they are at first. Their
        moments are kept up: with empty ones Adam's first steps would be several times too long.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
    """

    learning_rate: float = 1e-4
    schedule: str = "constant"
    warmup: int = 0
    final: float = 0.0
    weight_decay: float = 0.0
    weight_decay_final: float = 1.0
    decayed: str = "(.*/)?kernel"
    layer_decay: float = 1.0
    multipliers: tuple[tuple[str, float], ...] = ()
    freeze: tuple[tuple[str, int], ...] = ()
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self):
        _check_schedule(self.schedule)

    def make(self, steps: int, layer: Callable[[str, tuple], Any] | None = None) -> Optimizer:
        """The optimizer of a run.

        Args:
          steps: length of the run, at which a decaying schedule ends.
          layer: (name, shape) -> layers between a parameter and the heads: a number, or one for
            each layer of a stacked parameter. None is 0 everywhere.

        Raises:
          UserError: an invalid regular expression, or (when the parameters are known) one that
            matches nothing.
        """
        adam = optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps)
        return self._around(adam, steps, layer)

    def _around(self, direction, steps, layer):
        """The optimizer whose updates have this direction, with our rate and decay."""
        rest = max(1, steps - self.warmup)
        rate = SCHEDULES[self.schedule](self.learning_rate, rest, self.final)
        if self.warmup:
            rise = optax.linear_schedule(0.0, self.learning_rate, self.warmup)
            rate = optax.join_schedules([rise, rate], [self.warmup])
        decay = optax.cosine_decay_schedule(self.weight_decay, steps, alpha=self.weight_decay_final)

        def factors(params, count):
            return self._factors(params, count, layer if self.layer_decay != 1.0 else None)

        def decays(params):
            if self.weight_decay:
                return named(params, self.decayed, "decayed")
            return jax.tree.map(lambda _: False, params)

        return Optimizer(optax.chain(direction, _apply_rate(rate, factors, decay, decays)), rate)

    def _factors(self, params, count, layer):
        """What each parameter's rate is multiplied by: a number, or [depth, 1, ...] if stacked."""

        def by_layer(path, leaf):
            below = 0 if layer is None else layer(_name(path), leaf.shape)
            if np.ndim(below):
                return (self.layer_decay ** jnp.asarray(below)).reshape(-1, *(1,) * (leaf.ndim - 1))
            return self.layer_decay**below

        factors = jax.tree_util.tree_map_with_path(by_layer, params)
        for pattern, factor in self.multipliers:
            factors = _times(factors, factor, named(params, pattern, "multipliers"))
        for pattern, until in self.freeze:
            waiting = jnp.where(count < until, 0.0, 1.0)
            factors = _times(factors, waiting, named(params, pattern, "freeze"))
        return factors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon:
    """The `optimizer` section: Muon for the matrices of the blocks, AdamW for all else.

    An update of a matrix is its momentum made orthogonal by five Newton-Schulz steps, scaled so
    that its root mean square is that of Adam's. Then both have one learning rate. Layers of a scan
    are matrices each of their own, and so are queries, keys and values, gate and up. Source: Jordan
    2024, and arXiv 2502.16982 for the scale; optax computes it.

    Attributes:
      learning_rate: after the warm-up.
      schedule: after the warm-up, "constant", "cosine" or "linear" towards `final * learning_rate`.
      warmup: steps over which the rate rises from 0.
      final: last learning rate, as a multiple of the first.
      weight_decay: decoupled, of all kernels.
      matrices: regular expression of what is made orthogonal.
      momentum: decay of a matrix's momentum.
      scale: root mean square of a matrix's update, as Adam's usually is.
      b1: decay of AdamW's first moment.
      b2: decay of AdamW's second moment.
      eps: added to the root of the second moment.
    """

    learning_rate: float = 1e-4
    schedule: str = "constant"
    warmup: int = 0
    final: float = 0.0
    weight_decay: float = 0.0
    matrices: str = ".*blocks/((cross_)?attention|mlp)/.*kernel"
    momentum: float = 0.95
    scale: float = 0.2
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self):
        _check_schedule(self.schedule)

    def make(self, steps: int, layer: Callable[[str, tuple], Any] | None = None) -> Optimizer:
        """The optimizer of a run; see `AdamW.make`.

        Args:
          layer: tells which parameters are stacked: those with a number for each layer.
        """
        fields = ("learning_rate", "schedule", "warmup", "final", "weight_decay")
        adam = AdamW(**{name: getattr(self, name) for name in fields})

        def dimensions(params):
            def one(path, leaf):
                stacked = layer is not None and np.ndim(layer(_name(path), leaf.shape)) > 0
                return _matrix(_name(path), leaf.ndim, stacked)

            return jax.tree_util.tree_map_with_path(one, params)

        def labels(params):
            chosen = named(params, self.matrices, "matrices")
            return jax.tree.map(lambda is_matrix: "muon" if is_matrix else "adam", chosen)

        def resize(updates, params=None):
            def one(update, matrix):
                into, out = ([update.shape[axis] for axis in axes] for axes in matrix)
                return self.scale * math.sqrt(max(*into, math.prod(out))) * update

            return jax.tree.map(one, updates, dimensions(updates))

        muon = optax.chain(
            optax.contrib.scale_by_muon(beta=self.momentum, weight_dimension_numbers=dimensions),
            optax.stateless(resize),
        )
        others = optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps)
        direction = optax.partition({"muon": muon, "adam": others}, labels)
        return adam._around(direction, steps, layer)


def _matrix(name: str, axes: int, stacked: bool):
    """Which axes of a kernel [(layer), in, (part), *out] are a matrix's; the others count them."""
    into = 1 if stacked else 0
    # queries, keys and values, or gate and up, lie beside each other
    parts = name.endswith(("/qkv/kernel", "/kv/kernel")) or (
        name.endswith("/fc1/kernel") and axes - into == 3
    )
    first = into + 1 + parts
    return optax.contrib.MuonDimensionNumbers((into,), tuple(range(first, axes)))


OPTIMIZERS = {"adamw": AdamW, "muon": Muon}

SCHEDULES = {
    "constant": lambda rate, steps, final: optax.constant_schedule(rate),
    "cosine": lambda rate, steps, final: optax.cosine_decay_schedule(rate, steps, alpha=final),
    "linear": lambda rate, steps, final: optax.linear_schedule(rate, final * rate, steps),
}


def _check_schedule(schedule: str) -> None:
    if schedule not in SCHEDULES:
        known = ", ".join(SCHEDULES)
        raise UserError(f"optimizer.schedule={schedule!r} is unknown; known: {known}")


def named(tree: Tree, pattern: str, field: str) -> Tree:
    """True for the leaves whose whole name matches.

    Raises:
      UserError: about the optimizer's `field`, if none does or the pattern is invalid.
    """
    try:
        found = jax.tree_util.tree_map_with_path(
            lambda path, _: bool(re.fullmatch(pattern, _name(path))), tree
        )
    except re.error as error:
        raise UserError(
            f"optimizer.{field}: {pattern!r} is an invalid regular expression: {error}"
        ) from None
    if not any(jax.tree.leaves(found)):
        some = ", ".join(_name(path) for path, _ in jax.tree.leaves_with_path(tree)[:3])
        raise UserError(
            f"optimizer.{field}: {pattern!r} matches no parameter; their names are like {some}"
        )
    return found


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _times(factors, factor, chosen):
    return jax.tree.map(lambda old, is_one: old * factor if is_one else old, factors, chosen)


def _apply_rate(rate, factors, decay, decays):
    """-rate * factor * (update + decay * parameter), the last only for what decays."""

    def init(params):
        decays(params), factors(params, 0)  # a name that matches nothing is told before step 1
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates, state, params):
        step, shrink = -rate(state.count), decay(state.count)

        def one(update, param, factor, shrinks):
            update = update + shrink * param if shrinks else update
            return jnp.asarray(step * factor, update.dtype) * update

        scaled = jax.tree.map(one, updates, params, factors(params, state.count), decays(params))
        return scaled, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)
