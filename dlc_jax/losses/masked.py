"""The masked patches of a batch in a buffer of fixed size: heads and targets see them alone."""

import jax
import jax.numpy as jnp

from dlc_jax.typing import Array, Bool, Float, Int


def fill(
    masked: Bool[Array, "b g n"], *, group: int, size: int
) -> tuple[Int[Array, "m k"], Float[Array, "m k"]]:
    """Where each group's masked patches are, and the share of its image's loss that each has.

    One buffer for every `group` examples in a row: a device that holds whole groups asks no other.
    Patches beyond `size` are left out; `data.masks.buffer` is the size with which none is.

    Returns:
      place: int32, rising positions among the group's `group * g * n` patches. 0 where the buffer
        is not filled.
      share: 1 / (masked patches of the same image). 0 where the buffer is not filled.
    """
    b, g, n = masked.shape
    images = masked.reshape(b // group, group * g, n)
    flat = images.reshape(b // group, -1)
    end = flat.shape[1]
    place = jnp.sort(jnp.where(flat, jnp.arange(end), end), axis=-1)[:, :size]
    filled = place < end
    place = jnp.where(filled, place, 0).astype(jnp.int32)
    counts = jnp.take_along_axis(images.sum(-1), place // n, axis=-1)
    return place, jnp.where(filled, 1 / jnp.maximum(counts, 1), 0.0)


def take(patches: Float[Array, "r n d"], place: Int[Array, "m k"]) -> Float[Array, "m k d"]:
    """The patches of each group at its places.

    r images lie group by group, those of an example side by side.
    """
    groups, d = len(place), patches.shape[-1]
    return jax.vmap(lambda patches, place: patches[place])(patches.reshape(groups, -1, d), place)
