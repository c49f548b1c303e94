"""Improved precision and recall, density and coverage: who lies among whose nearest neighbors.

Sources: Kynkäänniemi et al., arXiv 1904.06991; Naeem et al., arXiv 2002.09797.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax.data import rows

BLOCK = 4096  # rows of a block: 34 MB of 2048 features; a block of distances has 67 MB


class Manifold(NamedTuple):
    """Shares, except density.

    Attributes:
      precision: samples within reach of an image of the reference, which is the distance to its
        k-th neighbor there.
      recall: reference images within reach of a sample.
      density: how many reference images have a sample within reach, mean over samples / k; it can
        exceed 1.
      coverage: reference images that have a sample within reach.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall_density_coverage(
    samples: np.ndarray,
    reference: np.ndarray,
    *,
    neighbors: int = 3,
    neighbors_density: int = 5,
    block: int = BLOCK,
) -> Manifold:
    """The four at once: they need the same distances.

    Squared distances are |x|^2 + |y|^2 - 2 x.y in float32 with products at highest precision, after
    the reference's mean is taken off both sets, which changes no distance and makes the norms as
    small as they can be. Rounding is then about 1e-6 (|x|^2 + |y|^2), of which nearest neighbors'
    squared distances are a good part: it decides only pairs as close as that to a radius. Copies of
    an image are at a distance of 0 up to that rounding. A row is left out of its own neighbors by
    number, so that no copy stands for it.

    Within reach is <= for precision and recall and < for density and coverage, as in the authors'
    code.

    Args:
      samples, reference: [n, d] and [m, d]; may be memory maps, are read in blocks. The published
        ImageNet protocol has 10,000 reference images and 50,000 samples.
      neighbors: k of precision and recall.
      neighbors_density: k of density and coverage.
      block: rows of a block on the device, where four blocks and their distances lie.

    Raises:
      UserError: NaN or infinite features; not more rows than neighbors; all rows of a set equal;
        widths that differ.
    """
    most = max(neighbors, neighbors_density)
    rows.check_pair(samples, reference, least=most + 1, varied=True)
    mean = sum(part.sum(axis=0, dtype=np.float64) for _, part in rows.blocks(reference))
    mean = (mean / len(reference)).astype(np.float32)
    read = functools.partial(_padded, mean=mean, size=block)
    reach = radii(reference, (neighbors, neighbors_density), mean=mean, block=block)
    reach_samples = radii(samples, (neighbors,), mean=mean, block=block)[:, 0]
    n, m = len(samples), len(reference)
    precise, inside, nearest = np.zeros(n, bool), np.zeros(n, np.int64), np.full(m, np.inf)
    recalled = np.zeros(m, bool)
    for start in range(0, m, block):
        x, at = read(reference, start), slice(start, start + block)
        outer = np.resize(reach[at], (len(x[1]), 2))  # what fills up is infinitely far anyway
        for other in range(0, n, block):
            y, to = read(samples, other), slice(other, other + block)
            inner = np.resize(reach_samples[to], len(y[1]))
            found = [np.asarray(part) for part in _compared(x, y, outer, inner)]
            precise[to] |= found[0][: n - other]
            recalled[at] |= found[1][: m - start]
            inside[to] += found[2][: n - other]
            nearest[at] = np.minimum(nearest[at], found[3][: m - start])
    covered = nearest < reach[:, 1]
    return Manifold(
        float(precise.mean()),
        float(recalled.mean()),
        float(inside.mean() / neighbors_density),
        float(covered.mean()),
    )


def radii(
    features: np.ndarray, neighbors: tuple[int, ...], *, mean: np.ndarray, block: int = BLOCK
) -> np.ndarray:
    """Squared distances of each row to its k-th nearest other row, for k in `neighbors`.

    Args:
      features: [n, d], n above every k.
      mean: [d], taken off before.

    Returns:
      float32 [n, numbers].
    """
    most, found = max(neighbors), []
    for start in range(0, len(features), block):
        x = _padded(features, start, mean=mean, size=block)
        nearest = jnp.full((len(x[1]), most), jnp.inf)
        for other in range(0, len(features), block):
            y = _padded(features, other, mean=mean, size=block)
            nearest = _nearest(nearest, x, y, start - other)
        found.append(np.asarray(nearest)[: len(features) - start])
    return np.concatenate(found)[:, np.asarray(neighbors) - 1]


def squared_distances(x, y):
    """[a, b] of two pairs (rows [., d], squared norms [.]); norms of infinity stay infinite."""
    product = jnp.matmul(x[0], y[0].T, precision=jax.lax.Precision.HIGHEST)
    return jnp.maximum(x[1][:, None] + y[1] - 2 * product, 0)


@jax.jit
def _nearest(nearest, x, y, offset):
    """The smallest distances of `nearest` [a, k] and of x to y; `offset` is between their rows."""
    apart = squared_distances(x, y)
    same = jnp.arange(len(y[1])) == jnp.arange(len(x[1]))[:, None] + offset
    apart = jnp.where(same, jnp.inf, apart)
    together = jnp.concatenate([nearest, apart], axis=1)
    return -jax.lax.top_k(-together, nearest.shape[1])[0]


@jax.jit
def _compared(x, y, outer, inner):
    """What a block x [a, d] of the reference and y [b, d] of samples have to do with each other.

    Returns:
      Samples within reach, [b]; reference rows within samples' reach, [a]; how many reference rows
      reach each sample, [b]; each reference row's smallest distance, [a].
    """
    apart = squared_distances(x, y)
    precise = (apart <= outer[:, :1]).any(axis=0)
    recalled = (apart <= inner).any(axis=1)
    return precise, recalled, (apart < outer[:, 1:]).sum(axis=0), apart.min(axis=1)


def _padded(features, start, *, mean, size):
    """Rows from `start` less the mean, filled up to `size` with rows that are infinitely far."""
    x = np.asarray(features[start : start + size], np.float32) - mean
    norm = np.square(x, dtype=np.float64).sum(axis=1).astype(np.float32)
    fill = min(size, len(features)) - len(x)
    return np.pad(x, ((0, fill), (0, 0))), np.pad(norm, (0, fill), constant_values=np.inf)
