"""Diversity of a set of images: the mean LPIPS distance of two of them."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dlc_jax import parallel
from dlc_jax.data.sweep import sweep
from dlc_jax.errors import UserError
from dlc_jax.evaluation.images import WORKERS, ImageSet
from dlc_jax.features.lpips import Lpips

PAIRS = 2000  # at most


def diversity(
    images: ImageSet,
    lpips: Lpips,
    *,
    seed: int = 0,
    pairs: int = PAIRS,
    mesh: Mesh | None = None,
    batch: int = 64,
) -> dict:
    """{"value", "error", "pairs"}: the mean over random pairs of images, and its standard error.

    No image is in two pairs, so that pairs are independent and the error is deviation /
    sqrt(pairs). Source: as used for diversity since arXiv 1711.11586, section 5.

    Args:
      seed: of numpy's RandomState, which pairs them.
      pairs: how many, at most half as many as images.

    Raises:
      UserError: fewer than four images; too small for the trunk; an image cannot be read.
    """
    pairs = min(pairs, images.count // 2)
    if pairs < 2:
        raise UserError(f"lpips needs 4 images; {images.name} has {images.count}: give more")
    mesh = mesh or parallel.make_mesh()
    batch = -(-batch // parallel.shares(mesh)) * parallel.shares(mesh)
    chosen = np.random.RandomState(seed).permutation(images.count)[: 2 * pairs].reshape(-1, 2)
    read = sweep(images.read, chosen.reshape(-1).tolist(), workers=WORKERS)

    def batches():
        for start in range(0, pairs, batch):
            rows = [next(read) for _ in range(2 * min(batch, pairs - start))]
            yield np.stack(rows[::2]), np.stack(rows[1::2])

    @jax.jit
    def distance(params, *both):
        return lpips.distance(params, *(each.astype(jnp.float32) / 127.5 - 1 for each in both))

    params = jax.tree.map(
        lambda leaf: parallel.spread(leaf, parallel.replicated(mesh)), lpips.params
    )
    found = np.concatenate([*parallel.each(distance, params, batches(), mesh=mesh, size=batch)])
    if not np.isfinite(found).all():
        raise UserError("lpips: distances are NaN or infinite; look at the files of weights")
    error = found.std(ddof=1, dtype=np.float64) / np.sqrt(pairs)
    return {"value": float(found.mean(dtype=np.float64)), "error": float(error), "pairs": pairs}
