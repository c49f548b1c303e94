"""The health of codes: are the values used, do positions differ, do two views of an image agree?"""

import functools
from collections.abc import Mapping

import numpy as np


def health(
    codes: np.ndarray, *, values: int, pairs: int = 64, seed: int = 0
) -> Mapping[str, float]:
    """Summarizes how a set of codes uses its positions and values.

    Args:
      codes: int [n, l], each in 0..values-1.
      values: V.
      pairs: at most so many pairs of positions are sampled for the mutual information.
      seed: of that sample.

    Returns:
      `entropy`, `entropy_min`, `entropy_max`: over positions, in nats.
      `perplexity`: mean of exp(entropy) / V, so 1 is uniform use.
      `dead`: share of the l * V (position, value) entries that never occur.
      `mutual_information`: mean over pairs of positions, in nats, of the plug-in estimate. That
        estimate is above zero for independent positions too, by about (V - 1)^2 / 2n, so
        `mutual_information_chance` is the same number after one of the two positions was shuffled.
      `distinct`: share of codes that differ from all earlier ones.
      `count`: n.
    """
    codes = _checked(codes, values)
    count, length = codes.shape
    usage = np.stack([np.bincount(codes[:, i], minlength=values) for i in range(length)])
    entropy = _entropy(usage)
    result = {
        "entropy": entropy.mean(),
        "entropy_min": entropy.min(),
        "entropy_max": entropy.max(),
        "perplexity": np.exp(entropy).mean() / values,
        "dead": (usage == 0).mean(),
        "distinct": len(np.unique(codes, axis=0)) / count,
    }
    random = np.random.default_rng(seed)
    every = np.stack(np.triu_indices(length, k=1), axis=1)
    if len(every):
        some = every[random.permutation(len(every))[:pairs]]
        shared = functools.partial(mutual_information, values=values)
        columns = codes.T
        found = [shared(columns[i], columns[j]) for i, j in some]
        chance = [shared(random.permutation(columns[i]), columns[j]) for i, j in some]
        result["mutual_information"] = np.mean(found)
        result["mutual_information_chance"] = np.mean(chance)
    return {name: float(number) for name, number in result.items()} | {"count": count}


def usage(codes: np.ndarray, *, values: int) -> Mapping[str, object]:
    """What the report draws of a set of codes, JSON.

    Returns:
      `values`: V.
      `count`: n.
      `perplexity`: of each of the l positions, exp(entropy), V if all values are used equally.
      `by_rank`: share of the codes that have a position's commonest value, its second commonest,
        and so on; mean over positions, [V].
    """
    codes = _checked(codes, values)
    counts = np.stack([np.bincount(column, minlength=values) for column in codes.T])
    shares = np.sort(counts / len(codes), axis=1)[:, ::-1].mean(0)
    return {
        "values": values,
        "count": len(codes),
        "perplexity": [round(float(number), 4) for number in np.exp(_entropy(counts))],
        "by_rank": [float(f"{share:.4g}") for share in shares],
    }


def mutual_information(a: np.ndarray, b: np.ndarray, *, values: int) -> float:
    """Returns the plug-in mutual information of two positions a, b, int [n], in nats."""
    # Only values that occur together are counted: at V = 4096 a full table has 16 million entries.
    joint = np.unique(a.astype(np.int64) * values + b, return_counts=True)[1]
    single = [_entropy(np.bincount(x, minlength=values)) for x in (a, b)]
    return float(max(0.0, single[0] + single[1] - _entropy(joint)))


def agreement(a: np.ndarray, b: np.ndarray, *, values: int) -> Mapping[str, float]:
    """Compares two codes of the same images, such as of two augmented views.

    Args:
      a, b: int [n, l], each in 0..values-1.
      values: V.

    Returns:
      `positions`: share of equal positions.
      `chance_positions`: that of codes that have nothing to do with each other: sum_v p_v^2, with a
        position's shares p of both codes, mean over positions.
      `times_chance`: the first over the second, 1 for codes that are constant.
      `positions_min`: of the position that agrees least.
      `whole`: share of equal codes.
      `count`: n.
    """
    if a.shape != b.shape:
        raise ValueError(f"codes of different shapes, {a.shape} and {b.shape}, cannot be compared")
    a, b = _checked(a, values), _checked(b, values)
    same = a == b
    counts = np.stack(
        [np.bincount(column, minlength=values) for column in np.concatenate([a, b]).T]
    )
    chance = np.square(counts / (2 * len(a))).sum(axis=1).mean()
    return {
        "positions": float(same.mean()),
        "chance_positions": float(chance),
        "times_chance": float(same.mean() / chance),
        "positions_min": float(same.mean(axis=0).min()),
        "whole": float(same.all(axis=1).mean()),
        "count": len(a),
    }


def _entropy(counts: np.ndarray) -> np.ndarray:
    """Returns the entropy in nats of counts along the last axis."""
    p = counts / counts.sum(axis=-1, keepdims=True)
    return -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=-1)


def _checked(codes: np.ndarray, values: int) -> np.ndarray:
    codes = np.asarray(codes)
    if codes.ndim != 2 or not codes.size:
        raise ValueError(f"codes must be [n, l] and not empty; their shape is {codes.shape}")
    if codes.min() < 0 or codes.max() >= values:
        raise ValueError(
            f"codes run from {codes.min()} to {codes.max()}; they must lie in 0..{values - 1}"
        )
    return codes.astype(np.int64)
