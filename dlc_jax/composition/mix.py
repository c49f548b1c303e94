"""Copying positions from parents: which are whose, and what is kept.

Every example draws from generators of its own, by the seed and its number. So its result does not
depend on which others are mixed with it.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from dlc_jax.errors import UserError

PRIOR = -1  # in place of a parent: the position is the prior's to draw


@dataclasses.dataclass(frozen=True)
class Mixing:
    """What is mixed; see `mixing`, which checks it.

    Attributes:
      parents: each codes, int [n, l], or simplices, float [n, l, v].
      seed: of all draws.
      position: int [n], the examples' numbers, by which they draw.
      shares: float [p], how often each parent is chosen, 1 in all.
      keep: bool [n, l], positions that are the first parent's in any case.
      groups: {name: positions}, see `groups`.
    """

    parents: Sequence[np.ndarray]
    seed: int
    position: np.ndarray
    shares: np.ndarray
    keep: np.ndarray
    groups: Mapping[str, Sequence[int]]

    def chosen(self, block: np.ndarray | None = None) -> np.ndarray:
        """The parent of every position by lot, int [n, l]; those of `keep` are the first's.

        Args:
          block: int [l] below l; positions of one block have one parent. None: each has its own.
        """
        edges = np.cumsum(self.shares)[:-1]
        found = np.searchsorted(edges, self._draws[:, 0], side="right")
        return np.where(self.keep, 0, found if block is None else found[:, block])

    def dealt(self, counts: Sequence[int], block: np.ndarray) -> np.ndarray:
        """So many blocks to each parent by lot, and the others to the prior, int [n, l].

        Positions of `keep` are the first parent's beside its own. Where they leave fewer blocks
        than are dealt, the last parents get fewer.
        """
        draws = uniform(self.seed, self.position, (int(block.max()) + 1,), 1)
        taken = np.ones(draws.shape, bool)
        for number in range(draws.shape[1]):
            taken[:, number] = self.keep[:, block == number].all(1)
        rank = np.argsort(np.argsort(np.where(taken, 2, draws), 1, kind="stable"), 1)
        found = np.searchsorted(np.cumsum(counts), rank, side="right")
        found = np.where(found == len(counts), PRIOR, found)[:, block]
        return np.where(self.keep, 0, found)

    def codes(self, owner: np.ndarray) -> np.ndarray:
        """Codes int [n, l] of the parents of positions, [n, l]; the prior's positions are any.

        Of a parent given as simplices, the value is drawn there; where it is kept it is the
        likeliest.
        """
        # One draw serves all parents: only the value of the chosen one is taken, and the choice
        # does not depend on it.
        values = self._draws[:, 1]
        each = [parent if parent.ndim == 2 else _drawn(parent, values) for parent in self.parents]
        found = np.take_along_axis(np.stack(each), np.maximum(owner, 0)[None], axis=0)[0]
        first = self.parents[0]
        return np.where(self.keep, first if first.ndim == 2 else first.argmax(-1), found)

    @property
    def _draws(self) -> np.ndarray:
        """Uniform [n, 2, l]: of the parent, and of the value within its simplex."""
        return uniform(self.seed, self.position, (2, self.keep.shape[1]))


def mixing(
    parents: Sequence[np.ndarray],
    *,
    seed: int,
    weights: Sequence[float] | None = None,
    keep: Sequence[int] | np.ndarray = (),
    position: np.ndarray | None = None,
    groups: Mapping[str, Sequence[int]] | None = None,
) -> Mixing:
    """A checked `Mixing`.

    Args:
      weights: how often each parent is chosen, any positive scale; None is equally often.
      keep: see `kept`.
      position: None is 0..n-1.

    Raises:
      UserError: no parents, parents of different sizes, or weights or positions to keep that do not
        go with them.
    """
    if not parents:
        raise UserError("compose: there are no parents")
    if len(shapes := {parent.shape[:2] for parent in parents}) > 1:
        raise UserError(
            "compose: parents hold the same number of examples and of positions; they hold "
            f"{sorted(shapes)}"
        )
    share = np.ones(len(parents)) if weights is None else np.asarray(weights, np.float64)
    fits = share.shape == (len(parents),) and np.isfinite(share).all()
    if not fits or (share < 0).any() or not share.sum() > 0:
        raise UserError(
            f"compose: {len(parents)} parents need as many weights, none negative and not all "
            f"zero; got {weights}"
        )
    shape = shapes.pop()
    return Mixing(
        parents=parents,
        seed=seed,
        position=np.arange(shape[0]) if position is None else np.asarray(position),
        shares=share / share.sum(),
        keep=kept(keep, shape),
        groups={} if groups is None else groups,
    )


def mix(parents: Sequence[np.ndarray], **how) -> np.ndarray:
    """Copies every position from one of the parents, chosen at random; arguments as of `mixing`.

    The result of simplices is drawn, position by position, from their weighted mean. Simplices of a
    temperature near 0 give what their codes give, draw for draw. Source: arXiv 2507.12318,
    section 4.

    Returns:
      int [n, l], in the dtype of codes.
    """
    task = mixing(parents, **how)
    return task.codes(task.chosen())


def kept(keep: Sequence[int] | np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Which positions of codes of a shape [n, l] are kept, bool [n, l].

    Args:
      keep: positions, or bool [l] or [n, l].

    Raises:
      UserError: it does not go with the shape.
    """
    found = np.asarray(keep)
    if found.dtype == bool and len(shape) == 2 and found.shape in (shape, shape[1:]):
        return np.broadcast_to(found, shape)
    if len(shape) != 2 or found.ndim != 1 or found.dtype.kind not in "iu" and found.size:
        raise UserError(
            f"what to keep of codes {list(shape)} is a list of positions or bool {list(shape[1:])} "
            f"or {list(shape)}; got {found.dtype} {list(found.shape)}"
        )
    found = found.astype(np.int64)
    if len(outside := found[(found < 0) | (found >= shape[1])]):
        raise UserError(f"positions to keep must lie in 0..{shape[1] - 1}; got {outside[0]}")
    known = np.zeros(shape, bool)
    known[:, found] = True
    return known


def portion(share: float, count: int) -> int:
    """How many a share of a count is, rounded up."""
    return math.ceil(round(share * count, 6))


def uniform(seed: int, position: np.ndarray, shape: tuple[int, ...], *purpose: int) -> np.ndarray:
    """Draws in [0, 1), [n, *shape], each example's by the seed, its number and the purpose."""
    found = np.empty((len(position), *shape))
    for number, row in zip(position, found, strict=True):
        row[:] = np.random.default_rng([seed, int(number), *purpose]).random(shape)
    return found


def _drawn(simplices: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Values int32 [n, l] of simplices [n, l, v] at uniform [n, l] in [0, 1).

    By the inverse of the cumulative sums.
    """
    total = np.cumsum(simplices, axis=-1, dtype=np.float64)
    below = (total <= uniform[..., None] * total[..., -1:]).sum(-1, dtype=np.int32)
    return np.minimum(below, simplices.shape[-1] - 1)  # rounding may reach the end of the sum
