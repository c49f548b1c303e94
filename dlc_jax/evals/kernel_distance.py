"""The kernel distance (KID with Inception's features; Bińkowski et al., arXiv 1801.01401).

It is the unbiased squared maximum mean discrepancy (Gretton et al., 2012, equation 3) with the
kernel (x.y / d + 1)^3. It has no bias at any count, so that small sets can be compared by it; it
can be below 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax.data import rows

BLOCK = 4096  # rows of a block: 34 MB of 2048 features; a block of kernel values has 67 MB


class Subsets(NamedTuple):
    """A kernel distance from random subsets.

    Attributes:
      mean: over the subsets.
      std: over the subsets, with divisor of their number, as papers report it. It is the deviation
        of one subset's estimate. It says nothing of the mean: std / sqrt(subsets) goes to 0 with
        more subsets of the same images.
      error: of the mean; see `subset_kernel_distance`.
    """

    mean: float
    std: float
    error: float


class Exact(NamedTuple):
    """A kernel distance from all pairs.

    Attributes:
      value: the estimate.
      error: how far it would move with other samples of the same generator; see `kernel_distance`.
    """

    value: float
    error: float


def kernel_distance(samples: np.ndarray, reference: np.ndarray, *, block: int = BLOCK) -> Exact:
    """The estimate from all pairs of samples [n, d] and reference [m, d]: no noise of subsets.

    The error is the jackknife's for a U-statistic, 2 deviation(h) / sqrt(n), where h_i = mean over
    other samples j of k(x_i, x_j) - mean over the reference of k(x_i, y). The reference stays as
    it is. Where both distributions are equal it is up to sqrt(2) times too large, never too small
    (Efron and Stein, 1981).

    Kernel values less 1, which cancels, are float32 with products at highest precision; sums of
    rows are float64. Of 50,000 and 50,000 of 2048 features it takes 2e13 operations.

    Args:
      samples, reference: may be memory maps, are read in blocks. Constant features are defined:
        two equal constants give 0.
      block: rows of a block on the device.

    Raises:
      UserError: fewer than 2 rows; NaN or infinite features; widths that differ.
    """
    rows.check_pair(samples, reference, least=2)
    n, m = len(samples), len(reference)
    within = _sums(samples, samples, block) / (n - 1)
    across = _sums(samples, reference, block) / m
    apart = _sums(reference, reference, block).mean() / (m - 1)
    error = 2 * np.std(within - across, ddof=1) / np.sqrt(n)
    return Exact(float(within.mean() + apart - 2 * across.mean()), float(error))


def subset_kernel_distance(
    samples: np.ndarray,
    reference: np.ndarray,
    *,
    subsets: int = 100,
    size: int = 1000,
    seed: int = 2020,
) -> Subsets:
    """The mean over random subsets of both sets, as papers report KID: cheap, and noisier.

    The subsets overlap: drawn again from other images they would all move together. The error
    therefore has two parts. Of the samples: every row's mean of h (see `kernel_distance`), over the
    subsets that it is in, is an estimate of its influence, and 2 deviation / sqrt(rows seen) the
    jackknife's error. It contains the noise of the few rows that each was compared with, and errs
    upwards. Of the draws: std / sqrt(subsets).

    Args:
      samples, reference: [n, d] and [m, d]; may be memory maps.
      seed: of numpy's RandomState, whose draws are the same in every version of numpy: a sample's
        subset, then the reference's, the order of torch-fidelity.

    Raises:
      UserError: fewer rows than `size`; NaN or infinite features; widths that differ.
    """
    rows.check_pair(samples, reference, least=max(2, size))
    random, values = np.random.RandomState(seed), []
    total, seen = np.zeros(len(samples)), np.zeros(len(samples))
    for _ in range(subsets):
        chosen = random.choice(len(samples), size, replace=False)
        x = np.asarray(samples[chosen], np.float32)
        y = np.asarray(reference[random.choice(len(reference), size, replace=False)], np.float32)
        within, across = _sums(x, x, size) / (size - 1), _sums(x, y, size) / size
        apart = _sums(y, y, size).mean() / (size - 1)
        values.append(within.mean() + apart - 2 * across.mean())
        total[chosen] += within - across
        seen[chosen] += 1
    found = seen > 0
    spread = 2 * np.std(total[found] / seen[found], ddof=1) / np.sqrt(found.sum())
    std = np.std(values)
    return Subsets(float(np.mean(values)), float(std), float(np.hypot(spread, std / subsets**0.5)))


def _sums(x: np.ndarray, y: np.ndarray, block: int) -> np.ndarray:
    """Sums of kernel values less 1 over rows of y, float64 [n]; of x itself without the diagonal.

    Pairs of one set's blocks are taken once, for both.
    """
    same, total = x is y, np.zeros(len(x))
    for start, left in rows.blocks(x, block):
        for other, right in rows.blocks(y, block):
            if not same or start <= other:
                of_left, of_right = _kernel_sums(left, right, same and start == other)
                total[start : start + block] += np.asarray(of_left, np.float64)
                if same and start < other:
                    total[other : other + block] += np.asarray(of_right, np.float64)
    return total


@jax.jit
def _kernel_sums(x, y, same):
    """Row and column sums of (x.y / d + 1)^3 - 1; without the diagonal where `same`."""
    z = jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST) / x.shape[1]
    value = z * (3 + z * (3 + z))
    diagonal = jnp.arange(len(x))[:, None] == jnp.arange(len(y))
    value = jnp.where(same & diagonal, 0, value)
    return value.sum(axis=1), value.sum(axis=0)
