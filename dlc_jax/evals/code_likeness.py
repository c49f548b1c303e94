"""Do drawn codes have the statistics of real ones? Single positions, pairs of them, and copies.

All are plug-in estimates from counts, which have a floor above zero for two sets of one
distribution: it falls with the sizes of the sets and rises with V, for pairs with V^2. Compare with
the same numbers of two sets of real codes of the same sizes. Entropies are biased low, likewise.
What no table of counts shows, `two_samples` may.
"""

from collections.abc import Mapping

import numpy as np

PAIRS = 512


def likeness(
    drawn: np.ndarray, real: np.ndarray, *, values: int, pairs: int = PAIRS, seed: int = 0
) -> Mapping[str, float]:
    """Compares two sets of codes.

    Args:
      drawn, real: int [n, l] and int [m, l], each in 0..values-1.
      values: V.
      pairs: at most so many pairs of positions are compared, the same for a seed.
      seed: of their choice.

    Returns:
      `unigram`: total variation of a position's values, from 0 to 1, mean over positions.
      `pairwise`: total variation of the joint values of two positions, mean over pairs.
      `entropy`, `entropy_real`: of a position's values in bits, mean over positions.

    Raises:
      ValueError: codes of other shapes, or out of range.
    """
    if drawn.ndim != 2 or drawn.shape[1:] != real.shape[1:] or not (len(drawn) and len(real)):
        raise ValueError(f"codes are [n, l] and [m, l]; got {drawn.shape} and {real.shape}")
    for codes in (drawn, real):
        if codes.min() < 0 or codes.max() >= values:
            raise ValueError(
                f"codes run from {codes.min()} to {codes.max()}; they must lie in 0..{values - 1}"
            )
    a, b = drawn.T.astype(np.int64), real.T.astype(np.int64)
    first, second = np.triu_indices(len(a), k=1)
    some = np.random.default_rng(seed).permutation(len(first))[:pairs]
    first, second = first[some], second[some]
    joint = zip(a[first] * values + a[second], b[first] * values + b[second], strict=True)
    found = {
        "unigram": np.mean([total_variation(x, y) for x, y in zip(a, b, strict=True)]),
        "entropy": np.mean([entropy(column) for column in a]),
        "entropy_real": np.mean([entropy(column) for column in b]),
    }
    if len(some):
        found["pairwise"] = np.mean([total_variation(x, y) for x, y in joint])
    return {name: float(number) for name, number in found.items()}


def total_variation(a: np.ndarray, b: np.ndarray) -> float:
    """Half the sum of the differences of the shares that values have in a [n] and b [m]."""
    # Only values that occur are counted: of two positions at V = 4096 there are 16 million.
    seen, place = np.unique(np.concatenate([a, b]), return_inverse=True)
    shares = [
        np.bincount(part, minlength=len(seen)) / len(part) for part in np.split(place, [len(a)])
    ]
    return float(np.abs(shares[0] - shares[1]).sum() / 2)


def entropy(a: np.ndarray) -> float:
    """Of the shares that values have in a [n], in bits."""
    shares = np.unique(a, return_counts=True)[1] / len(a)
    return float(-(shares * np.log2(shares)).sum())


def copies(drawn: np.ndarray, training: np.ndarray) -> Mapping[str, float]:
    """What is not new among drawn codes.

    Args:
      drawn, training: int [n, l] and int [m, l].

    Returns:
      `copies`: share of the drawn codes that are training codes, position by position.
      `distinct`: share of the drawn codes that differ from all earlier ones.
    """
    known = {row.tobytes() for row in np.ascontiguousarray(training, np.int32)}
    rows = [row.tobytes() for row in np.ascontiguousarray(drawn, np.int32)]
    copied = sum(row in known for row in rows)
    return {"copies": copied / len(rows), "distinct": len(set(rows)) / len(rows)}
