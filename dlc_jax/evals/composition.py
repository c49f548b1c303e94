"""Mixing codes of several images, and what the mixed image has from each of them."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np


def choose_pairs(factors: np.ndarray, count: int, *, seed: int) -> np.ndarray:
    """Returns int [count, 2]: pairs of rows of factors [n, f] that differ in every factor."""
    return choose_parents(factors, count, parents=2, seed=seed)


def choose_parents(factors: np.ndarray, count: int, *, parents: int, seed: int) -> np.ndarray:
    """Returns int [count, parents]: groups of rows of factors [n, f], any two of which differ in every factor.

    A factor with fewer values than there are parents cannot differ: leave its column out. An image may be in several groups.

    Raises:
      ValueError: there is no such group, or none was found.
    """
    factors = np.asarray(factors)
    for column in factors.T:
        if len(np.unique(column)) < parents:
            raise ValueError(f"{parents} parents cannot all differ in a factor that has {len(np.unique(column))} values here")
    random = np.random.default_rng(seed)
    groups: list[tuple[int, ...]] = []
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
            groups.append(tuple(group))
    if len(groups) < count:
        raise ValueError(f"found {len(groups)} of {count} groups of {parents} images that differ in every factor")
    return np.asarray(groups, np.int64).reshape(count, parents)


def mix(
    parents: Sequence[np.ndarray],
    *,
    seed: int,
    weights: Sequence[float] | None = None,
    keep: Sequence[int] = (),
    position: np.ndarray | None = None,
) -> np.ndarray:
    """Composes codes: every position is copied from one of the parents, chosen at random (DLC, section on composition).

    Of a parent given as simplices, the value is drawn there: so the result is drawn, position by position, from the weighted mean of
    the parents' simplices. Simplices of a temperature near 0 give what their codes give, draw for draw.

    Each example draws from its own generator, so the result for one does not depend on which others are mixed with it.

    Args:
      parents: each codes, int [n, l], or simplices, float [n, l, v].
      seed: of the choice.
      weights: how often each parent is chosen, any positive scale; None is equally often.
      keep: positions that are the first parent's in any case, with its likeliest value.
      position: int [n], the examples' numbers, by which they draw; None is 0..n-1.

    Returns:
      int [n, l], in the dtype of codes.

    Raises:
      ValueError: weights or positions to keep that do not go with the parents.
    """
    count, length = parents[0].shape[:2]
    share = np.ones(len(parents)) if weights is None else np.asarray(weights, np.float64)
    if share.shape != (len(parents),) or not np.isfinite(share).all() or (share < 0).any() or not share.sum() > 0:
        raise ValueError(f"{len(parents)} parents need as many weights, none negative and not all zero; got {weights}")
    kept = np.asarray(list(keep), np.int64)
    if len(outside := kept[(kept < 0) | (kept >= length)]):
        raise ValueError(f"positions to keep must lie in 0..{length - 1}; got {outside[0]}")
    edges = np.cumsum(share / share.sum())[:-1]
    numbers = np.arange(count) if position is None else np.asarray(position)
    choices, values = np.empty((2, count, length))
    for number, choice, value in zip(numbers, choices, values, strict=True):
        choice[:], value[:] = np.random.default_rng([seed, int(number)]).random((2, length))
    # One draw serves all parents: only the value of the chosen one is taken, and the choice does not depend on it.
    stacked = np.stack([parent if parent.ndim == 2 else _draw(parent, values) for parent in parents])
    chosen = np.searchsorted(edges, choices, side="right")
    mixed = np.take_along_axis(stacked, chosen[None], axis=0)[0]
    first = parents[0] if parents[0].ndim == 2 else parents[0].argmax(-1)
    mixed[:, kept] = first[:, kept]
    return mixed


def _draw(simplices: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Values int32 [n, l] of simplices [n, l, v], by the inverse of their cumulative sums at uniform [n, l] in [0, 1)."""
    total = np.cumsum(simplices, axis=-1, dtype=np.float64)
    below = (total <= uniform[..., None] * total[..., -1:]).sum(-1, dtype=np.int32)
    return np.minimum(below, simplices.shape[-1] - 1)  # rounding may reach the end of the sum


def score(
    parents: Sequence[np.ndarray], child: np.ndarray, *, names: Sequence[str], classes: Sequence[int]
) -> Mapping[str, float]:
    """Measures what children have from their parents.

    Args:
      parents: two or more int [n, f], the parents' factors.
      child: int [n, f], the factors read from the children.
      names: the f factors' names.
      classes: how many values each factor has, for the chance levels.

    Returns:
      `{name}_from_parents`: share of children whose factor is one of their parents'. `both_parents` (`all_parents` for three and
      more): share of children in which each parent has at least one factor that only it has. `chance_…`: the same of children
      whose factors are drawn uniformly and independently, exact, averaged over these parents. `count`: n.
    """
    stacked = np.stack(list(parents))  # [p n f]
    count = stacked.shape[1]
    kinds = np.asarray(classes, np.float64)
    equal = stacked == child
    # own[p, n, f]: no other parent has this parent's value, so a child that shows it has it from this one.
    own = np.stack([(stacked == parent).sum(axis=0) == 1 for parent in stacked])
    different = 1 + (np.diff(np.sort(stacked, axis=0), axis=0) != 0).sum(axis=0)  # [n f], values among the parents
    every = "both_parents" if len(stacked) == 2 else "all_parents"
    result: dict[str, float] = {}
    for column, name in enumerate(names):
        result[f"{name}_from_parents"] = float(equal[:, :, column].any(axis=0).mean())
        result[f"chance_{name}_from_parents"] = float((different[:, column] / kinds[column]).mean())
    result[every] = float((equal & own).any(axis=2).all(axis=0).mean())
    result[f"chance_{every}"] = float(_chance_of_every(own / kinds).mean())
    return result | {"count": count}


def _chance_of_every(share: np.ndarray) -> np.ndarray:
    """Returns [n], the chance that every parent shows, where share [p, n, f] is the chance that a factor shows a parent.

    Inclusion and exclusion over the sets of parents that do not show; factors are independent, and within one factor the
    parents exclude each other.
    """
    total = np.zeros(share.shape[1])
    for size in range(len(share) + 1):
        for absent in itertools.combinations(range(len(share)), size):
            total += (-1) ** size * np.prod(1 - share[list(absent)].sum(axis=0), axis=-1)
    return total
