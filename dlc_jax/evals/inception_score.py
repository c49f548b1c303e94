"""The Inception Score (Salimans et al., arXiv 1606.03498), from a stream of logits."""

from typing import NamedTuple

import numpy as np
import scipy.special

from dlc_jax.data import rows
from dlc_jax.errors import UserError


class Score(NamedTuple):
    """An Inception Score.

    Attributes:
      mean: over the splits.
      std: over the splits, with divisor of their number, as papers report it. It is the deviation
        of one split's score, not of the mean.
      error: of the mean: how far it would move with other samples of the same generator.
    """

    mean: float
    std: float
    error: float


class InceptionScore:
    """exp of the mean over images of KL(p(y|x) || p(y)), by splits; p(y) is a split's mean of p.

    A split's mean of KL is (sum p log p) / n - q . log q with q = (sum p) / n, so that its sums,
    c + 2 numbers, are all that is kept of it. ADM's protocol is splits of 5000 images in order, of
    logits without a bias. The score grows with a split's images: compare equal sizes only.

    The error is that of one estimate from all images, deviation of KL / sqrt(n) times the mean (the
    infinitesimal jackknife: the derivative of q . log q along p - q is what KL has already). The
    deviation over ten splits is itself uncertain by a quarter, and one split has none. KL = h - p .
    log q with h = sum p log p needs the second moments of (h, p): c^2 numbers, 8 MB for 1008.
    """

    def __init__(self, edges: int | np.ndarray = 5000):
        """Takes the size of a split, or the first rows of all, as of `equal_splits`.

        Raises:
          UserError: a size below 1.
        """
        if np.ndim(edges) == 0 and edges < 1:
            raise UserError(f"a split of {edges} images: give at least 1")
        self.edges, self.count, self.sums, self.second = edges, 0, {}, None

    def add(self, logits: np.ndarray, places: np.ndarray | None = None) -> None:
        """Takes in logits [n, c].

        Args:
          places: int [n], each row's place in the whole order, which decides its split; as they
            come, if not given. Give them where several processes share the images, or to shuffle.

        Raises:
          UserError: NaN or infinity; another number of classes.
        """
        width = None if self.second is None else len(self.second) - 1
        rows.check(logits, "logits", least=0, first=self.count, width=width)
        places = np.arange(self.count, self.count + len(logits)) if places is None else places
        if np.ndim(self.edges):
            of = np.searchsorted(self.edges, places, side="right") - 1
        else:
            of = np.asarray(places) // self.edges
        log = scipy.special.log_softmax(np.asarray(logits, np.float64), axis=1)
        p = np.exp(log)
        joined = np.concatenate([p, (p * log).sum(axis=1, keepdims=True)], axis=1)
        for split in np.unique(of):
            self._keep(int(split), (of == split).sum(), joined[of == split].sum(axis=0))
        self.second = joined.T @ joined + (0 if self.second is None else self.second)
        self.count += len(logits)

    def merge(self, other: "InceptionScore") -> None:
        """Takes in what another stream saw; both must have been given `places`."""
        for split, (count, sums) in other.sums.items():
            self._keep(split, count, sums)
        if other.second is not None:
            self.second = other.second + (0 if self.second is None else self.second)
        self.count += other.count

    def _keep(self, split, count, sums):
        before = self.sums.get(split, (0, 0))
        self.sums[split] = (before[0] + count, before[1] + sums)

    def score(self) -> Score:
        """The score; a last split that is not full counts as one, as in ADM's evaluator.

        Raises:
          UserError: no images.
        """
        if not self.count:
            raise UserError("the Inception Score needs images; there are none")
        scores = []
        for _, (count, sums) in sorted(self.sums.items()):
            scores.append(np.exp(sums[-1] / count + scipy.special.entr(sums[:-1] / count).sum()))
        total = sum(sums for _, sums in self.sums.values()) / self.count
        q = total[:-1]
        weights = np.append(-np.log(np.where(q > 0, q, 1)), 1)  # KL = h - p . log q
        variance = weights @ self.second @ weights / self.count - (weights @ total) ** 2
        error = np.mean(scores) * np.sqrt(max(0.0, variance) / self.count)
        return Score(float(np.mean(scores)), float(np.std(scores)), float(error))


def equal_splits(count: int, splits: int = 10) -> np.ndarray:
    """First rows of `splits` nearly equal splits of `count` images, int [splits].

    This is the protocol of the paper's code and torch-fidelity; the latter shuffles first.

    Raises:
      UserError: fewer images than splits.
    """
    if not 1 <= splits <= count:
        raise UserError(f"{count} images cannot be cut into {splits} splits: give more images")
    return np.arange(splits) * count // splits


def inception_score(logits: np.ndarray, edges: int | np.ndarray = 5000) -> Score:
    """The score of logits [n, c], which may be a memory map: see `InceptionScore`.

    Raises:
      UserError: no images; NaN or infinity.
    """
    stream = InceptionScore(edges)
    for _, block in rows.blocks(logits):
        stream.add(block)
    return stream.score()
