"""The Vendi score (Friedman and Dieng, arXiv 2210.02410): how many different images there are."""

import numpy as np
import scipy.special

from dlc_jax.data import rows
from dlc_jax.errors import UserError


class Vendi:
    """exp of the entropy of the eigenvalues of G / n, where G holds the cosines of all pairs.

    G = X X^T has the nonzero eigenvalues of X^T X, [d, d], which is a sum over the stream: n is
    unbounded, memory d^2. All rows equal give 1, n orthogonal ones n; it never exceeds d.
    """

    def __init__(self, width: int):
        """Takes d."""
        self.count, self.gram = 0, np.zeros((width, width))

    def add(self, features: np.ndarray) -> None:
        """Takes in features [n, d].

        Raises:
          UserError: NaN or infinity; a row of zeros, which has no direction; another width.
        """
        unit = _unit(features, first=self.count, width=len(self.gram))
        self.gram += unit.T @ unit
        self.count += len(unit)

    def merge(self, other: "Vendi") -> None:
        """Takes in what another stream saw, such as another process's."""
        self.gram += other.gram
        self.count += other.count

    def score(self) -> float:
        """The score, in 1 .. min(n, d).

        Raises:
          UserError: no features.
        """
        if not self.count:
            raise UserError("the Vendi score needs images; there are none")
        return _score(self.gram / self.count)


def vendi_score(features: np.ndarray) -> float:
    """The score of features [n, d], which may be a memory map; by the smaller of n^2 and d^2.

    Raises:
      UserError: no rows; NaN, infinity or a row of zeros.
    """
    rows.check(features, "features")
    count, width = features.shape
    if count <= width:
        unit = _unit(features)
        return _score(unit @ unit.T / count)
    stream = Vendi(width)
    for _, block in rows.blocks(features):
        stream.add(block)
    return stream.score()


def _unit(features, first=0, width=None):
    rows.check(features, "features", least=0, first=first, width=width)
    x = np.asarray(features, np.float64)
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    if not norm.all():
        raise UserError(
            f"features: {(norm == 0).sum()} of {len(x)} rows are zero, the first is row "
            f"{first + norm.argmin()}, and have no cosine; look at that image and at the weights "
            "of the feature network"
        )
    return x / norm


def _score(matrix):
    values = np.clip(np.linalg.eigvalsh(matrix), 0, None)
    return float(np.exp(scipy.special.entr(values).sum()))
