"""Optimizers and learning-rate schedules, all of them optax; which parameters decay, go slower or wait is decided by name.

A name is a parameter's path with slashes, as in vit/blocks/mlp/fc1/kernel; a regular expression must match all of it.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from dlc_jax.errors import UserError
from dlc_jax.typing import Tree

STACKED = re.compile(r"(.*/)?blocks/.*")  # parameters of scanned layers: axis 0 counts layers
BELOW = re.compile(r"(.*/)?(patch_embed|pos_embed|cls_token|register_tokens|mask_token)(/.*)?")  # a ViT's, below its first block


class Optimizer(NamedTuple):
    """An optax transformation, and the learning rate by step, for the log."""

    tx: optax.GradientTransformation
    learning_rate: Callable


def make(
    *,
    steps: int,
    learning_rate: float = 1e-3,
    schedule: str = "constant",
    warmup: int = 0,
    final: float = 0.0,
    weight_decay: float = 0.0,
    weight_decay_final: float = 1.0,
    decayed: str = "(.*/)?kernel",
    layer_decay: float = 1.0,
    multipliers: tuple[tuple[str, float], ...] = (),
    freeze: tuple[tuple[str, int], ...] = (),
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
) -> Optimizer:
    """AdamW with a linear warm-up.

    Args:
      steps: length of the run, at which a decaying schedule ends.
      schedule: after the warm-up: "constant", "cosine" or "linear" towards `final * learning_rate`.
      warmup: steps over which the rate rises from 0.
      weight_decay: decoupled, so that everything that slows a parameter's learning slows its decay as well.
      weight_decay_final: the weight decay of the last step in multiples of the first's; a cosine between.
      decayed: regular expression of what decays. The default leaves biases, norms, tables, tokens and scales alone. Decided by name,
        because scanned layers give even a bias two dimensions.
      layer_decay: block i of depth D learns at layer_decay^(D - i) of the rate, i from 0; a ViT's patches, positions and tokens below
        the blocks at layer_decay^(D + 1); what comes after the blocks at the full rate.
      multipliers: (regular expression, factor) of the learning rate, on top of that.
      freeze: (regular expression, steps): parameters that stay as they are for so many steps. Their gradients' moments are kept up
        all the while: with empty ones Adam's first steps would be several times too long.

    Raises:
      UserError: an unknown schedule; a regular expression that is none, or (when the parameters are known) that matches nothing.
    """
    rest = max(1, steps - warmup)
    schedules = {
        "constant": lambda: optax.constant_schedule(learning_rate),
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, rest, alpha=final),
        "linear": lambda: optax.linear_schedule(learning_rate, final * learning_rate, rest),
    }
    if schedule not in schedules:
        raise UserError(f"optimizer.schedule={schedule!r} is unknown; known: {', '.join(schedules)}")
    rate = schedules[schedule]()
    if warmup:
        rate = optax.join_schedules([optax.linear_schedule(0.0, learning_rate, warmup), rate], [warmup])
    decay = optax.cosine_decay_schedule(weight_decay, steps, alpha=weight_decay_final)

    def factors(params, count):
        return _factors(params, count, layer_decay=layer_decay, multipliers=multipliers, freeze=freeze)

    def decays(params):
        return named(params, decayed, "decayed") if weight_decay else jax.tree.map(lambda _: False, params)

    return Optimizer(optax.chain(optax.scale_by_adam(b1=b1, b2=b2, eps=eps), _apply_rate(rate, factors, decay, decays)), rate)


def named(tree: Tree, pattern: str, field: str) -> Tree:
    """True for the leaves whose whole name matches.

    Raises:
      UserError: about the optimizer's `field`, if none does or the pattern is no regular expression.
    """
    try:
        found = jax.tree_util.tree_map_with_path(lambda path, _: bool(re.fullmatch(pattern, _name(path))), tree)
    except re.error as error:
        raise UserError(f"optimizer.{field}: {pattern!r} is no regular expression: {error}") from None
    if not any(jax.tree.leaves(found)):
        some = ", ".join(_name(path) for path, _ in jax.tree.leaves_with_path(tree)[:3])
        raise UserError(f"optimizer.{field}: {pattern!r} matches no parameter; their names are like {some}")
    return found


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _factors(params, count, *, layer_decay, multipliers, freeze):
    """What the rate of each parameter is multiplied by at a step: a number, or [depth, 1, ...] for stacked ones."""
    factors = _by_layer(params, layer_decay)
    for pattern, factor in multipliers:
        factors = _times(factors, factor, named(params, pattern, "multipliers"))
    for pattern, until in freeze:
        factors = _times(factors, jnp.where(count < until, 0.0, 1.0), named(params, pattern, "freeze"))
    return factors


def _times(factors, factor, chosen):
    return jax.tree.map(lambda old, is_one: old * factor if is_one else old, factors, chosen)


def _by_layer(params, decay):
    leaves = {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    depths = {(match[1] or ""): leaf.shape[0] for name, leaf in leaves.items() if (match := STACKED.fullmatch(name))}

    def factor(path, leaf):
        if decay == 1.0:
            return 1.0
        if STACKED.fullmatch(_name(path)):
            return (decay ** jnp.arange(leaf.shape[0], 0, -1)).reshape(-1, *(1,) * (leaf.ndim - 1))
        below = BELOW.fullmatch(_name(path))
        depth = depths.get(below[1] or "") if below else None
        return 1.0 if depth is None else decay ** (depth + 1)

    return jax.tree_util.tree_map_with_path(factor, params)


def _apply_rate(rate, factors, decay, decays):
    """-rate * factor * (update + decay * parameter), the last only for what decays; all but `decays` know the step."""

    def init(params):
        decays(params), factors(params, 0)  # here, so that a name that matches nothing is told before the first step
        return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))

    def update(updates, state, params):
        step, shrink = -rate(state.count), decay(state.count)

        def one(update, param, factor, shrinks):
            update = update + shrink * param if shrinks else update
            return jnp.asarray(step * factor, update.dtype) * update

        scaled = jax.tree.map(one, updates, params, factors(params, state.count), decays(params))
        return scaled, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)
