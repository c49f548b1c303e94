"""The ways of composing codes that a recipe can name, as `samples.operator.name`.

    codes, bits = Infill(share=0.25)([a, b], prior, seed=0)

All are called alike, see `Operator`. To add one: its class, and a line of `OPERATORS`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, NamedTuple, Protocol

import numpy as np

from dlc_jax.composition import groups as names
from dlc_jax.composition.mix import PRIOR, Mixing, mixing, portion
from dlc_jax.errors import UserError

CALLS = 8  # of the prior for the likelihood of a code: each hides an eighth of the positions


class Composed(NamedTuple):
    """Codes, and how likely each is.

    Attributes:
      codes: int32 [n, l].
      bits: float32 [n], the mean over positions of -log2 p of a value given the others under the
        prior. The masks are by the example's number alone, so that operators are compared by the
        same. None without a prior.
    """

    codes: np.ndarray
    bits: np.ndarray | None


class Prior(Protocol):
    """What operators ask of a `PriorNetwork`; `first` has the numbers of all examples."""

    def sample(self, count, *, seed, first, prompt, known, purpose=1) -> np.ndarray: ...

    def surprise(self, codes, *, seed, first, calls) -> np.ndarray: ...

    def redraw(self, codes, *, positions, keep, seed, first, calls) -> np.ndarray: ...


class Operator:
    """Each gives `draw`: of a `Mixing` and a prior the codes, int [n, l].

    Attributes:
      needs_prior: whether there is no result without one.
      groups: what each parent gives by name, of those that name it.
    """

    needs_prior = False
    groups: tuple[str, ...] = ()

    def gives_all(self, parents: int) -> bool:
        """Whether each of so many parents is named, if parents are named at all."""
        return not any(self.groups) or len(self.groups) >= parents

    def __call__(
        self,
        parents: Sequence[np.ndarray],
        prior: Prior | None = None,
        *,
        seed: int,
        position: np.ndarray | None = None,
        weights: Sequence[float] | None = None,
        keep: Sequence[int] | np.ndarray = (),
        groups: Mapping[str, Sequence[int]] | None = None,
    ) -> Composed:
        """Composes an example of each row of the parents.

        Args:
          parents: each codes, int [n, l], or simplices, float [n, l, v].
          position: int [n], the examples' numbers. An example draws by its number and the seed
            alone. None is 0..n-1.
          weights: how often a position is from each parent, any positive scale; None is equally.
          keep: positions that are the first parent's in any case, or bool [l] or [n, l].
          groups: {name: positions}, where the operator names some.

        Raises:
          UserError: parents, weights or positions that do not go together; no prior where one is
            needed; an unknown group.
        """
        how = {"seed": seed, "weights": weights, "keep": keep, "position": position}
        task = mixing([np.asarray(parent) for parent in parents], groups=groups, **how)
        if self.needs_prior and prior is None:
            raise UserError(f"{type(self).__name__.lower()} draws from a prior, and there is none")
        codes = self.draw(task, prior).astype(np.int32)
        if prior is None:
            return Composed(codes, None)
        how = {"seed": 0, "first": task.position, "calls": min(CALLS, codes.shape[1])}
        return Composed(codes, prior.surprise(codes, **how).mean(1))

    def draw(self, task: Mixing, prior: Prior | None) -> np.ndarray:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coin(Operator):
    """Every position from a parent drawn by the weights. Source: arXiv 2507.12318, section 4."""

    def draw(self, task, prior):
        return task.codes(task.chosen())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks(Operator):
    """Whole blocks of positions, each from a parent drawn by the weights.

    Attributes:
      size: consecutive positions of a block; 0 makes every group a block.
    """

    size: int = 0

    def draw(self, task, prior):
        length = task.keep.shape[1]
        if self.size < 0:
            raise UserError(f"operator.size={self.size} must be 0, for groups, or more")
        if not self.size and not task.groups:
            raise UserError(
                "operator.size=0 makes every group of positions a block, and this run has none; "
                "run dlc positions W, or give a size"
            )
        block = np.arange(length) // (self.size or 1)
        return task.codes(task.chosen(block if self.size else names.blocks(task.groups, length)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen(Operator):
    """Positions that are named from their parents, and the rest by lot, by the weights.

    Attributes:
      groups: what each parent gives, groups or positions joined by +, as "form,tint+0-3"; "" gives
        nothing by name.
    """

    groups: tuple[str, ...] = ()

    def draw(self, task, prior):
        if not any(self.groups):
            raise UserError("operator.groups names nothing; say what each parent gives: form,tint")
        owner, parents = named(task, self.groups), len(task.parents)
        if parents > len(self.groups) and (owner != PRIOR).all():
            raise UserError(
                f"operator.groups={','.join(self.groups)} leaves nothing to the last of {parents} "
                "images; name what it gives, or take another operator, as coin"
            )
        return task.codes(np.where(owner == PRIOR, task.chosen(), owner))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Soft(Operator):
    """Values drawn from the weighted mean of the parents' simplices.

    Attributes:
      temperature: of the simplices of images; near 0 it is coin.
    """

    temperature: float = 0.5

    def draw(self, task, prior):
        if any(parent.ndim == 2 for parent in task.parents):
            raise UserError("soft draws from simplices; codes are corners: give images")
        return task.codes(task.chosen())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Infill(Operator):
    """Keeps some positions of each parent; the prior draws the others given these.

    Attributes:
      share: of the positions, kept of each of equally weighted parents, by lot.
      whole: deal out whole groups instead of positions.
      groups: what is kept of each parent, as in `Chosen`, in place of a lot.
    """

    share: float = 0.25
    whole: bool = False
    groups: tuple[str, ...] = ()
    needs_prior = True

    def draw(self, task, prior):
        owner = named(task, self.groups) if any(self.groups) else self._dealt(task)
        if any(self.groups) and (owner != PRIOR).all() and not task.keep.all():
            given = ",".join(self.groups)
            raise UserError(f"operator.groups={given} leaves the prior nothing to draw; name fewer")
        how = {"seed": task.seed, "first": task.position, "prompt": task.codes(owner)}
        return prior.sample(len(owner), known=owner != PRIOR, **how)

    def _dealt(self, task):
        length, parents = task.keep.shape[1], len(task.parents)
        if not 0 <= self.share * parents <= 1 + 1e-6:
            raise UserError(
                f"operator.share={self.share} of each of {parents} parents is not within the "
                f"code; give 0 to {1 / parents:.3g}"
            )
        if self.whole and not task.groups:
            raise UserError("operator.whole needs groups; this run has none: run dlc positions W")
        block = names.blocks(task.groups, length) if self.whole else np.arange(length)
        counts = self.share * parents * task.shares * (block.max() + 1)
        return task.dealt([int(round(count)) for count in counts], block)


STARTS = {"coin": Coin, "blocks": Blocks, "chosen": Chosen, "soft": Soft, "infill": Infill}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refine(Operator):
    """Another operator's mixture, whose least likely positions the prior draws anew, in rounds.

    Positions that are kept stay as they are.

    Attributes:
      start: the other operator.
      rounds: how often.
      share: of the positions that a round draws.
    """

    start: Annotated[Operator, STARTS] = Coin()
    rounds: int = 3
    share: float = 0.1
    needs_prior = True

    def gives_all(self, parents):
        return self.start.gives_all(parents)

    def draw(self, task, prior):
        if not (self.rounds >= 1 and 0 < self.share <= 1):
            raise UserError(
                f"operator.rounds={self.rounds} is at least 1, and operator.share={self.share} "
                "above 0 and at most 1"
            )
        codes, length = self.start.draw(task, prior), task.keep.shape[1]
        how = {"positions": portion(self.share, length), "keep": task.keep}
        how |= {"first": task.position, "calls": min(CALLS, length)}
        for number in range(self.rounds):
            codes = prior.redraw(codes, seed=other_seed(task.seed, number, 0), **how)
        return codes


OPERATORS = {
    "coin": Coin,
    "blocks": Blocks,
    "chosen": Chosen,
    "soft": Soft,
    "infill": Infill,
    "refine": Refine,
}


def best(operator: Operator, parents, prior: Prior | None = None, *, n: int, seed: int, **how):
    """The likeliest of `n` draws of every example, `Composed`; `how` as in `Operator`.

    The first draw is that of `n=1`, so that more draws are never less likely.

    Raises:
      UserError: n below 1, or above it without a prior; and as the operator.
    """
    if n < 1:
        raise UserError(f"compose: best={n} must be at least 1 draw")
    if n > 1 and prior is None:
        raise UserError("compose: the likeliest of several draws needs a prior")
    found = operator(parents, prior, seed=seed, **how)
    for number in range(1, n):
        other = operator(parents, prior, seed=other_seed(seed, number, 1), **how)
        better = other.bits < found.bits
        codes = np.where(better[:, None], other.codes, found.codes)
        found = Composed(codes, np.where(better, other.bits, found.bits))
    return found


def other_seed(*numbers: int) -> int:
    """A seed that numbers stand for."""
    return int(np.random.default_rng(numbers).integers(2**31 - 1))


def named(task: Mixing, given: Sequence[str]) -> np.ndarray:
    """The parent of each named position, int [n, l], and PRIOR of the others.

    Positions of `keep` are the first parent's.

    Raises:
      UserError: unknown groups, more entries than parents, or a position that two of them name.
    """
    shape = task.keep.shape
    if len(given) > len(task.parents):
        raise UserError(
            f"operator.groups={','.join(given)} is for more than {len(task.parents)} parents"
        )
    owner = np.full(shape[1], PRIOR)
    for parent, entry in enumerate(given):
        parts = entry.split("+") if entry else []
        at = names.positions(parts, task.groups, shape[1], "operator.groups")
        if (taken := owner[at] != PRIOR).any():
            raise UserError(f"operator.groups names position {np.array(at)[taken][0]} twice")
        owner[at] = parent
    return np.where(task.keep, 0, owner)
