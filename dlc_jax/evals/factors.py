"""What samples show, where the data set can judge it: factors kept, spread out and inherited."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats


@dataclasses.dataclass(frozen=True)
class Factors:
    """Rates of factors that a judge reads from images; without a judge every method gives {}.

    Nothing is left out for being invalid, unless the name of a rate says so.

    Attributes:
      judge: of the data set, or None. It has `read(images)`, which gives `factors` int [n, f],
        `valid` bool [n] and `distance` float [n]; `held_out`, the combinations that training never
        saw, as tuples of the first factors; and `proof(count)`, a dict of how well it judges.
      names: of the f factors.
      classes: how many values each factor has.
    """

    judge: Any
    names: Sequence[str]
    classes: Sequence[int]

    def proof(self, count: int) -> dict[str, float]:
        """How well the judge reads `count` images whose truth is known."""
        return dict(self.judge.proof(count)) if self.judge else {}

    def unconditional(self, images: np.ndarray) -> dict[str, float]:
        """Whether samples, uint8 [n, y, x, c], are valid and how they spread.

        Returns:
          `valid`: share. Per factor `entropy_{name}`, of its frequencies, 1 when all values are
          equally frequent; `values_{name}`, how many values occur; and `valid_values_{name}`, the
          same of the valid samples alone. `held_out`: share of samples with a held-out combination,
          beside `chance_held_out`, that of uniform factors. `count`: n. `distance`: mean.
        """
        if not self.judge:
            return {}
        reading = self.judge.read(images)
        result: dict[str, float] = {"valid": float(np.mean(reading.valid))}
        for column, (name, kinds) in enumerate(zip(self.names, self.classes, strict=True)):
            counts = np.bincount(reading.factors[:, column], minlength=kinds)
            p = counts[counts > 0] / counts.sum()
            most = np.log(kinds) or 1.0  # a factor with one value has no entropy to reach
            result[f"entropy_{name}"] = float(abs(np.sum(p * np.log(p))) / most)
            result[f"values_{name}"] = int(len(p))
            valid = reading.factors[reading.valid, column]
            result[f"valid_values_{name}"] = len(np.unique(valid))
        combinations = {tuple(map(int, combination)) for combination in self.judge.held_out}
        if combinations:
            depth = len(next(iter(combinations)))
            rows = [tuple(map(int, row[:depth])) for row in reading.factors]
            result["held_out"] = float(np.mean([row in combinations for row in rows]))
            result["chance_held_out"] = float(len(combinations) / np.prod(self.classes[:depth]))
        return result | {"count": len(images), "distance": float(np.mean(reading.distance))}

    def reconstruction(
        self, factors: np.ndarray, images: np.ndarray, decoded: np.ndarray
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Whether images kept their factors, int [n, f]: (of those decoded, of the real ones).

        Returns:
          For each factor the share of images that show it; `all` of them at once; `count`; `valid`;
          `distance`. Of the real images this is what the judge can read at best.
        """
        return (
            (self._kept(factors, decoded), self._kept(factors, images)) if self.judge else ({}, {})
        )

    def _kept(self, factors, images):
        reading = self.judge.read(images)
        kept = np.asarray(factors) == reading.factors
        rates = {name: float(kept[:, column].mean()) for column, name in enumerate(self.names)}
        return rates | {
            "all": float(kept.all(axis=1).mean()),
            "count": len(kept),
            "valid": float(np.mean(reading.valid)),
            "distance": float(np.mean(reading.distance)),
        }

    def composition(
        self,
        parents: Sequence[np.ndarray],
        children: np.ndarray,
        bits: np.ndarray | None = None,
    ) -> dict[str, float]:
        """What children, uint8 [n, y, x, c], have from two or more parents' factors, int [n, f].

        Args:
          bits: float [n], how unlikely the children's codes are.

        Returns:
          `{name}_from_parents`: share of children whose factor is one of their parents'.
          `both_parents` (`all_parents` for three and more): share of children in which each parent
          has at least one factor that only it has. `success`: share of the valid children all of
          whose factors are a parent's, and in which each parent has one that only it has; factors
          with no more values than parents are left out of it, where chance alone gives a parent's.
          `chance_…`: the same of children whose factors are drawn uniformly and independently,
          exact, averaged over these parents; being valid is no part of it. `count`: n. `valid`:
          share. With `bits` also their mean, and `auc_bits`, the chance that a success has fewer
          bits than a failure, ties half; where there are both.
        """
        if not self.judge:
            return {}
        reading, stacked = self.judge.read(children), np.stack(list(parents))  # [p n f]
        equal = stacked == reading.factors
        kinds = np.asarray(self.classes, np.float64)
        own = _own(stacked)
        # [n f], values among the parents
        different = 1 + (np.diff(np.sort(stacked, axis=0), axis=0) != 0).sum(axis=0)
        every = "both_parents" if len(stacked) == 2 else "all_parents"
        result: dict[str, float] = {}
        for column, name in enumerate(self.names):
            chance = different[:, column] / kinds[column]
            result[f"{name}_from_parents"] = float(equal[:, :, column].any(axis=0).mean())
            result[f"chance_{name}_from_parents"] = float(chance.mean())
        result[every] = float((equal & own).any(axis=2).all(axis=0).mean())
        result[f"chance_{every}"] = float(_chance_of_every(own / kinds).mean())
        telling = kinds > len(stacked)
        success = self.success(stacked, reading)
        result["success"] = float(success.mean())
        inherited = (different / kinds)[:, telling]
        chance = _chance_of_every((own / kinds)[..., telling], inherited)
        result["chance_success"] = float(chance.mean())
        if bits is not None:
            result |= {"bits": float(np.mean(bits))} | area(bits, success)
        return result | {"count": len(children), "valid": float(np.mean(reading.valid))}

    def success(self, parents: Sequence[np.ndarray], reading: Any) -> np.ndarray:
        """Which children succeed, bool [n], of what the judge read of them; see `composition`."""
        stacked = np.stack(list(parents))
        telling = np.asarray(self.classes) > len(stacked)
        equal, own = (stacked == reading.factors)[..., telling], _own(stacked)[..., telling]
        shown = (equal & own).any(axis=2).all(axis=0)
        return shown & equal.any(axis=0).all(axis=1) & reading.valid


def _own(parents: np.ndarray) -> np.ndarray:
    """bool [p, n, f]: no other parent has this value, so a child that shows it has it from here."""
    return np.stack([(parents == parent).sum(axis=0) == 1 for parent in parents])


def _chance_of_every(share: np.ndarray, whole: np.ndarray | float = 1.0) -> np.ndarray:
    """The chance [n] that every parent shows; share [p, n, f] is that of one factor showing one.

    Inclusion and exclusion over the sets of parents that do not show; factors are independent, and
    within one factor the parents exclude each other.

    Args:
      whole: [n, f], the chance that a factor is what it must be besides, which has the shares.
    """
    total = np.zeros(share.shape[1])
    for size in range(len(share) + 1):
        for absent in itertools.combinations(range(len(share)), size):
            total += (-1) ** size * np.prod(whole - share[list(absent)].sum(axis=0), axis=-1)
    return total


def area(bits: np.ndarray, success: np.ndarray) -> dict[str, float]:
    """{"auc_bits": ...} of float [n] and bool [n], see `Factors.composition`.

    {} where all or none succeed.
    """
    low, high = bits[success], bits[~success]
    if not len(low) or not len(high):
        return {}
    above = stats.rankdata(np.concatenate([low, high]))[len(low) :] - stats.rankdata(high)
    return {"auc_bits": float(above.mean() / len(low))}
