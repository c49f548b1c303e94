"""One training step as a pure function.

Gradients, accumulation, clipping, mixed precision, averaging, skipped steps: each exists only here.
"""

import dataclasses
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr

from dlc_jax.errors import UserError
from dlc_jax.stage import Stage
from dlc_jax.typing import Array, Int, Key, Tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training changes: no functions, and no key, since keys come from the step.

    Attributes:
      step: int32, steps taken, skipped ones included.
      params: float32 master copy.
      opt_state: of optax.
      ema: average of params, or None.
      extra: whatever the stage keeps.
      skipped: int32 [2], steps skipped for a non-finite loss or gradient: in all, and in a row up
        to now.
    """

    step: Array
    params: Tree
    opt_state: Tree
    ema: Tree
    extra: Tree
    skipped: Array


def example_keys(key: Key[Array, ""], position: Int[Array, "b"], purpose: int) -> Key[Array, "b"]:
    """One key per example, from its position in the global step.

    The same for any number of devices, processes or microbatches. `purpose` keeps a stage's several
    draws apart. Shapes: scalar key and [b] positions to [b] keys.
    """

    def fold(place):
        return jax.random.fold_in(jax.random.fold_in(key, place), purpose)

    return jax.vmap(fold)(position)


def shared_key(key: Key[Array, ""], purpose: int) -> Key[Array, ""]:
    """One key for the whole global batch, apart from every example's."""
    return jax.random.fold_in(key, 2**32 - 1 - purpose)


def cast(tree: Tree, dtype, keep: tuple[str, ...] = ()) -> Tree:
    """Floating-point leaves in `dtype`; integers and keys as they are.

    Args:
      keep: regular expressions of whole names with slashes, as in code_table/table, of leaves that
        stay as they are too.

    Raises:
      UserError: one of them matches no leaf.
    """
    names = [
        keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(tree)
    ]
    for pattern in keep:
        if names and not any(re.fullmatch(pattern, name) for name in names):
            raise UserError(f"{pattern!r} matches no parameter; names are {', '.join(names[:3])}")

    def convert(path, leaf):
        name = keystr(path, simple=True, separator="/")
        kept = any(re.fullmatch(pattern, name) for pattern in keep)
        is_real = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(dtype) if is_real and not kept else leaf

    return jax.tree.map_with_path(convert, tree)


def make_init(stage: Stage) -> Callable[[Key[Array, ""]], TrainState]:
    """(key) -> TrainState at step 0."""

    def init(key):
        params, extra = stage.init(key)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=stage.optimizer.tx.init(params),
            ema=None if stage.ema_decay is None else jax.tree.map(jnp.copy, params),
            extra=extra,
            skipped=jnp.zeros((2,), jnp.int32),
        )

    return init


def split(batch: Tree, accumulate: int, shares: int) -> Tree:
    """[b, ...] to [accumulate, b / accumulate, ...]; each share of the mesh cuts its own examples.

    So no example moves. Neighbors stay neighbors: groups of examples stay whole while
    `accumulate * shares * group` divides b.
    """

    def cut(leaf):
        size, rest = leaf.shape[0] // accumulate, leaf.shape[1:]
        parts = leaf.reshape(shares, accumulate, size // shares, *rest)
        return parts.swapaxes(0, 1).reshape(accumulate, size, *rest)

    return jax.tree.map(cut, batch)


def clip_norms(grads: Tree, clip: float, separately: tuple[str, ...] = ()) -> Tree:
    """The gradient scaled down to a norm of at most `clip`.

    Args:
      separately: regular expressions of whole names with slashes, as in head/fc1/kernel. What each
        matches is clipped by its own norm, the rest together; the first that matches counts.

    Raises:
      UserError: one of them is invalid, or no parameter is left to it.
    """
    leaves, tree = jax.tree.flatten(grads)
    paths = [path for path, _ in jax.tree.leaves_with_path(grads)]
    names = [keystr(path, simple=True, separator="/") for path in paths]
    try:
        parts = [
            next((i for i, pattern in enumerate(separately) if re.fullmatch(pattern, name)), -1)
            for name in names
        ]
    except re.error as error:
        raise UserError(
            f"train.clip_separately={separately} has an invalid regular expression: {error}"
        ) from None
    if missing := [pattern for i, pattern in enumerate(separately) if i not in parts]:
        raise UserError(
            f"train.clip_separately: {missing[0]!r} matches no parameter; their names are like "
            f"{', '.join(names[:3])}"
        )
    norms = {
        part: optax.tree.norm([leaf for leaf, its in zip(leaves, parts) if its == part])
        for part in set(parts)
    }
    clipped = [
        leaf * jnp.minimum(1.0, clip / (norms[part] + 1e-12)) for leaf, part in zip(leaves, parts)
    ]
    return jax.tree.unflatten(tree, clipped)


def make_train_step(
    stage: Stage,
    *,
    accumulate: int = 1,
    shares: int = 1,
    clip: float = 0.0,
    clip_separately: tuple[str, ...] = (),
    dtype: str = "float32",
    shardings: Tree = None,
) -> Callable[[TrainState, Tree, Tree, Key[Array, ""]], tuple[TrainState, dict]]:
    """(state, batch, frozen, root key) -> (state, metrics).

    Args:
      accumulate: microbatches per step; `prepare` sees the whole batch, `loss` one microbatch.
      shares: shares of the batch on the mesh, see `split`.
      clip, clip_separately: see `clip_norms`; 0 never clips.
      dtype: of the computation, "float32" or "bfloat16"; parameters, sums of gradients and averages
        stay float32, and the stage's `tables` are read in float32.
      shardings: shardings of the parameters, which the gradients then have too, also while they are
        summed over microbatches.

    On a non-finite loss or gradient the old state is kept but for `skipped` and `step`, which moves
    on with the data.
    """
    dtype = jnp.dtype(dtype)

    def train_step(state, batch, frozen, root):
        key = jax.random.fold_in(root, state.step)
        frozen = cast(frozen, dtype)
        # No gradient passes here, and the whole global batch is in sight: teachers, Sinkhorn.
        params = cast(state.params, dtype, stage.tables)
        ema = cast(state.ema, dtype, stage.tables)
        batch = stage.prepare(params, ema, state.extra, batch, frozen, state.step, key)
        batch = jax.lax.stop_gradient(batch)

        def loss(params, micro):
            params = cast(params, dtype, stage.tables)
            value, (metrics, aux) = stage.loss(params, state.extra, micro, frozen, state.step, key)
            return value, ({"loss": value, **metrics}, aux)

        def gradient(micro):
            grads, (metrics, aux) = jax.grad(loss, has_aux=True)(state.params, micro)
            if shardings is not None:
                grads = jax.lax.with_sharding_constraint(grads, shardings)
            return grads, metrics, aux

        grads, metrics, aux = _mean(gradient, batch, accumulate, shares)
        norm = optax.tree.norm(grads)
        if clip:
            grads = clip_norms(grads, clip, clip_separately)
        with jax.named_scope("optimizer"):
            updates, opt_state = stage.optimizer.tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        ema = None
        if stage.ema_decay is not None:
            decay = stage.ema_decay(state.step)
            with jax.named_scope("average"):
                ema = jax.tree.map(
                    lambda old, new: old + (1 - decay) * (new - old), state.ema, params
                )
        extra = stage.after_update(state.extra, params, aux, state.step)

        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        bad = (~good).astype(jnp.int32)
        kept = jax.tree.map(
            lambda new, old: jnp.where(good, new, old),
            (params, opt_state, ema, extra),
            (state.params, state.opt_state, state.ema, state.extra),
        )
        skipped = jnp.stack([state.skipped[0] + bad, bad * (state.skipped[1] + 1)])
        metrics |= {
            "gradient_norm": norm,
            "learning_rate": jnp.asarray(stage.optimizer.learning_rate(state.step)),
            "skipped": skipped[0],
            "skipped_in_a_row": skipped[1],
        }
        return TrainState(state.step + 1, *kept, skipped), metrics

    return train_step


def _mean(function: Callable, batch: Tree, accumulate: int, shares: int) -> Tree:
    """The mean of function(microbatch) over the microbatches of a batch, one after the other."""
    if accumulate == 1:
        return function(batch)
    micros = split(batch, accumulate, shares)
    shapes = jax.eval_shape(function, jax.tree.map(lambda leaf: leaf[0], micros))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def add(sums, micro):
        return jax.tree.map(jnp.add, sums, function(micro)), None

    total, _ = jax.lax.scan(add, zeros, micros)
    return jax.tree.map(lambda leaf: leaf / accumulate, total)


def make_validation_step(
    stage: Stage, *, dtype: str = "float32"
) -> Callable[[TrainState, Tree, Tree, Key[Array, ""]], dict]:
    """(state, batch, frozen, key) -> metrics of the stage's loss, without an update."""
    dtype, measure = jnp.dtype(dtype), stage.validation_loss or stage.loss

    def validation_step(state, batch, frozen, key):
        frozen, params = cast(frozen, dtype), cast(state.params, dtype, stage.tables)
        ema = cast(state.ema, dtype, stage.tables)
        batch = stage.prepare(params, ema, state.extra, batch, frozen, state.step, key)
        loss, (metrics, _) = measure(params, state.extra, batch, frozen, state.step, key)
        return {"loss": loss, **metrics}

    return validation_step
