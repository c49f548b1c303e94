"""Drop path (stochastic depth, arXiv 1603.09382) by subsets of the batch, as DINOv2 trains.

What is dropped is not computed. Subsets are drawn within fixed groups of examples, so they depend
neither on devices nor on processes, and whole groups on a device need nothing from another.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dlc_jax.errors import UserError
from dlc_jax.typing import Array, Float, Int, Key


def drop_subsets(
    keys: Key[Array, "g"], *, depth: int, rows: int, rate: float
) -> Int[Array, "depth 2 g keep"]:
    """The rows that are computed: random ones of every group, for both residuals of every block.

    Args:
      keys: one for each group.
      rows: examples in a group.
      rate: share that is dropped, from 0 to 1; keep = max(1, int(rows * (1 - rate))).

    Returns:
      places within the group, rising, int32.
    """
    keep = max(1, int(rows * (1 - rate)))
    draws = jax.vmap(lambda key: jax.random.uniform(key, (depth, 2, rows)))(keys)
    order = jnp.argsort(draws, axis=-1)
    return jnp.moveaxis(jnp.sort(order[..., :keep], axis=-1), 0, 2).astype(jnp.int32)


def add_residual(
    x: Float[Array, "b n d"], residual: Callable, kept: Int[Array, "g keep"] | None = None
) -> Float[Array, "b n d"]:
    """x + residual(x), computed only for the rows `kept` of every group.

    There it counts rows / keep times, so that its mean stays. Other rows of x pass unchanged.

    Args:
      residual: [rows, n, d] -> [rows, n, d], each example by itself.
      kept: see `drop_subsets`; the examples lie group by group. None computes every residual.

    Raises:
      UserError: the batch does not divide into the groups.
    """
    if kept is None:
        return x + residual(x)
    (b, *shape), (groups, keep) = x.shape, kept.shape
    if b % groups:
        raise UserError(f"a batch of {b} does not divide into {groups} groups of drop path")
    known = {"unique_indices": True, "indices_are_sorted": True, "mode": "promise_in_bounds"}
    grouped = x.reshape(groups, b // groups, *shape)
    few = jax.vmap(lambda x, kept: x.at[kept].get(**known))(grouped, kept)
    update = residual(few.reshape(groups * keep, *shape)) * (b // groups / keep)
    add = jax.vmap(lambda x, kept, y: x.at[kept].add(y, **known))
    return add(grouped, kept, update.reshape(few.shape)).reshape(x.shape)
