"""Schedules of discrete noise: what share of a code's positions is noise at a time.

With the survival alpha(t) of the literature, `hidden` is 1 - alpha, and sigma = -log alpha is the
total noise that SEDD's networks are told. Sources: SEDD (arXiv 2310.16834) log_linear and
geometric, MD4 (arXiv 2406.04329) linear, cosine and polynomial.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike

from dlc_jax.diffusion.schedules import EDGE
from dlc_jax.errors import UserError

SCHEDULES = ("linear", "log_linear", "cosine", "polynomial", "geometric")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise:
    """A schedule. t=0 is data, t=1 noise.

    Attributes:
      schedule: "linear", t; "log_linear", (1 - eps) t, whose sigma stays finite; "cosine",
        sin(pi t / 2), noisier than linear; "polynomial", t^power; or "geometric", whose sigma rises
        from `smallest` to `largest` by the same factor in equal times.
      eps: share that even log_linear noise leaves, in (0, 1).
      power: of the polynomial, above 0 and at most 10.
      smallest: sigma of geometric noise at t=0.
      largest: sigma of geometric noise at t=1.

    Raises:
      UserError: an unknown schedule, or a number out of range.
    """

    schedule: str = "linear"
    eps: float = 1e-3
    power: float = 2.0
    smallest: float = 1e-4
    largest: float = 20.0

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise UserError(
                f"noise.schedule={self.schedule!r} is unknown; known: {', '.join(SCHEDULES)}"
            )
        if not 0 < self.eps < 1:
            raise UserError(f"noise.eps={self.eps} must be between 0 and 1")
        if not 0 < self.power <= 10:  # more is 0 in float32 at times that occur
            raise UserError(f"noise.power={self.power} must be above 0 and at most 10")
        if not 0 < self.smallest < self.largest < float("inf"):
            raise UserError(
                f"noise.smallest={self.smallest} must be above 0 and below noise.largest="
                f"{self.largest}"
            )

    def hidden(self, t: ArrayLike, xp: Any = jnp) -> ArrayLike:
        """The share of positions that is noise at t, of t's shape.

        Args:
          xp: jax.numpy, or numpy for float64 on the host.
        """
        if self.schedule == "log_linear":
            return (1 - self.eps) * t
        if self.schedule == "cosine":
            return xp.sin(np.pi / 2 * t)
        if self.schedule == "polynomial":
            return t**self.power
        if self.schedule == "geometric":
            return -xp.expm1(-self._geometric(t))
        return 1.0 * t

    def weight(self, t: ArrayLike, xp: Any = jnp) -> ArrayLike:
        """hidden'(t) / hidden(t), what a hidden position weighs in the likelihood's bound."""
        t = xp.maximum(t, EDGE)  # nothing is hidden at 0; zero must not meet an infinite weight
        if self.schedule == "cosine":
            return np.pi / 2 / xp.tan(np.pi / 2 * t)
        if self.schedule == "polynomial":
            return self.power / t
        if self.schedule == "geometric":
            return self.rate(t, xp) / xp.expm1(self._geometric(t))
        return 1 / t

    def rate(self, t: ArrayLike, xp: Any = jnp) -> ArrayLike:
        """sigma'(t), how fast values are replaced."""
        if self.schedule == "geometric":
            return self._geometric(t) * np.log(self.largest / self.smallest)
        hidden = self.hidden(t, xp)
        return self.weight(t, xp) * hidden / (1 - hidden)

    def sigma(self, t: ArrayLike, xp: Any = jnp) -> ArrayLike:
        """The total noise, -log(1 - hidden(t))."""
        return self._geometric(t) if self.schedule == "geometric" else total(self.hidden(t, xp), xp)

    @property
    def mean(self) -> float:
        """Of `hidden` over t ~ U(0, 1)."""
        nodes, weights = np.polynomial.legendre.leggauss(64)
        return float((weights * self.hidden((nodes + 1) / 2, np)).sum() / 2)

    def _geometric(self, t):
        return self.smallest * (self.largest / self.smallest) ** t


def total(hidden: ArrayLike, xp: Any = jnp) -> ArrayLike:
    """sigma of a share of noise, -log(1 - hidden)."""
    return -xp.log1p(-xp.minimum(hidden, 1 - EDGE))
