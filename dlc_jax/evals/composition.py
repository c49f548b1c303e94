"""Mixing codes of several images."""

import math
from collections.abc import Sequence

import numpy as np


def choose_parents(factors: np.ndarray, count: int, *, parents: int, seed: int) -> np.ndarray:
    """Chooses groups of rows of factors [n, f], any two of which differ in every factor.

    A factor with fewer values than there are parents cannot differ: leave its column out. An image
    may be in several groups.

    Returns:
      int [count, parents].

    Raises:
      ValueError: there is no such group, or too few were found.
    """
    factors = np.asarray(factors)
    for column in factors.T:
        if (kinds := len(np.unique(column))) < parents:
            raise ValueError(f"{parents} parents cannot all differ in a factor of {kinds} values")
    random = np.random.default_rng(seed)
    groups: list[list[int]] = []
    tries = 20 * count
    while len(groups) < count and tries:
        tries -= 1
        group = [int(random.integers(len(factors)))]
        while len(group) < parents:
            fits = np.flatnonzero(np.all(factors[:, None] != factors[None, group], axis=(1, 2)))
            if not len(fits):
                break  # this start has no company; another may
            group.append(int(random.choice(fits)))
        if len(group) == parents:
            groups.append(group)
    if len(groups) < count:
        raise ValueError(
            f"found {len(groups)} of {count} groups of {parents} images that differ in every factor"
        )
    return np.asarray(groups, np.int64).reshape(count, parents)


def mix(
    parents: Sequence[np.ndarray],
    *,
    seed: int,
    weights: Sequence[float] | None = None,
    keep: Sequence[int] = (),
    position: np.ndarray | None = None,
) -> np.ndarray:
    """Copies every position from one of the parents, chosen at random (DLC, on composition).

    Of a parent given as simplices, the value is drawn there: so the result is drawn, position by
    position, from the weighted mean of the parents' simplices. Simplices of a temperature near 0
    give what their codes give, draw for draw. Each example draws from its own generator, so its
    result does not depend on which others are mixed with it.

    Args:
      parents: each codes, int [n, l], or simplices, float [n, l, v].
      seed: of the choice.
      weights: how often each parent is chosen, any positive scale; None is equally often.
      keep: positions that are the first parent's in any case, with its likeliest value; see
        `kept`.
      position: int [n], the examples' numbers, by which they draw; None is 0..n-1.

    Returns:
      int [n, l], in the dtype of codes.

    Raises:
      ValueError: weights or positions to keep that do not go with the parents.
    """
    count, length = parents[0].shape[:2]
    share = np.ones(len(parents)) if weights is None else np.asarray(weights, np.float64)
    fits = share.shape == (len(parents),) and np.isfinite(share).all()
    if not fits or (share < 0).any() or not share.sum() > 0:
        raise ValueError(
            f"{len(parents)} parents need as many weights, none negative and not all zero; "
            f"got {weights}"
        )
    known = kept(keep, (count, length))
    edges = np.cumsum(share / share.sum())[:-1]
    numbers = np.arange(count) if position is None else np.asarray(position)
    choices, values = np.empty((2, count, length))
    for number, choice, value in zip(numbers, choices, values, strict=True):
        choice[:], value[:] = np.random.default_rng([seed, int(number)]).random((2, length))
    # One draw serves all parents: only the value of the chosen one is taken, and the choice does
    # not depend on it.
    stacked = np.stack(
        [parent if parent.ndim == 2 else _draw(parent, values) for parent in parents]
    )
    chosen = np.searchsorted(edges, choices, side="right")
    mixed = np.take_along_axis(stacked, chosen[None], axis=0)[0]
    first = parents[0] if parents[0].ndim == 2 else parents[0].argmax(-1)
    return np.where(known, first, mixed)


def kept(keep: Sequence[int] | np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Which positions of codes of a shape [n, l] are kept, bool [n, l].

    Args:
      keep: positions, or bool [l] or [n, l].

    Raises:
      ValueError: it does not go with the shape.
    """
    found = np.asarray(keep)
    if found.dtype == bool and len(shape) == 2 and found.shape in (shape, shape[1:]):
        return np.broadcast_to(found, shape)
    if len(shape) != 2 or found.ndim != 1 or found.dtype.kind not in "iu" and found.size:
        raise ValueError(
            f"what to keep of codes {list(shape)} is a list of positions or bool {list(shape[1:])} "
            f"or {list(shape)}; got {found.dtype} {list(found.shape)}"
        )
    found = found.astype(np.int64)
    if len(outside := found[(found < 0) | (found >= shape[1])]):
        raise ValueError(f"positions to keep must lie in 0..{shape[1] - 1}; got {outside[0]}")
    known = np.zeros(shape, bool)
    known[:, found] = True
    return known


def lot(
    share: float, keep: np.ndarray, *, seed: int, position: np.ndarray | None = None
) -> np.ndarray:
    """Which positions stay when a share of them is left open by lot, bool [n, l].

    Args:
      share: of all positions; fewer are left open where `keep` leaves fewer.
      keep: bool [n, l], positions that stay in any case.
      seed: of the lot, which is not that of `mix`.
      position: int [n], the examples' numbers, by which they draw; None is 0..n-1.
    """
    count, length = keep.shape
    numbers = np.arange(count) if position is None else np.asarray(position)
    draws = [np.random.default_rng([seed, int(number), 1]).random(length) for number in numbers]
    order = np.argsort(np.argsort(np.where(keep, 2, draws), 1), 1)
    return keep | (order >= math.ceil(round(share * length, 6)))


def _draw(simplices: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Values int32 [n, l] of simplices [n, l, v] at uniform [n, l] in [0, 1).

    By the inverse of the cumulative sums.
    """
    total = np.cumsum(simplices, axis=-1, dtype=np.float64)
    below = (total <= uniform[..., None] * total[..., -1:]).sum(-1, dtype=np.int32)
    return np.minimum(below, simplices.shape[-1] - 1)  # rounding may reach the end of the sum
