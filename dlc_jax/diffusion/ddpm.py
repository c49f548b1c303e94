"""DDPM: T steps of Gaussian noise whose variances rise linearly, as in DiT.

Step n of 0..T-1 has variance beta_n and is the time t = (n + 1) / T. With abar_n, the product of
(1 - beta) up to n, x_t = sqrt(abar_n) x0 + sqrt(1 - abar_n) eps. Between two steps there is no
time: `path` takes the nearest. Source: DDPM (arXiv 2006.11239), improved DDPM (arXiv 2102.09672),
DiT (arXiv 2212.09748).
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax.diffusion import process, schedules
from dlc_jax.diffusion.process import Prediction, mean_square, per_example
from dlc_jax.errors import UserError
from dlc_jax.typing import Array, Float

HALF = 1 / 255  # of a bin, when [-1, 1] has 256 values


class Tables(NamedTuple):
    """One row for data and one for each step, [T + 1], made in float64 and kept as float32.

    Attributes:
      alpha, sigma: of the path.
      mean: what an error of the predicted noise is in the mean of the posterior.
      lower: log of the posterior's variance; step 0, which has none, takes that of step 1.
      gap: log beta - lower.
    """

    alpha: np.ndarray
    sigma: np.ndarray
    mean: np.ndarray
    lower: np.ndarray
    gap: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDPM:
    """DDPM's discrete path with a network that predicts the noise, see `process`.

    Attributes:
      steps: T, of the process.
      beta_first: variance of the noise of the first step.
      beta_last: variance of the noise of the last step.
      learned_variance: the network gives the variance of a reverse step too, as many channels
        again.

    Raises:
      UserError: fewer than two steps, or variances that do not rise within (0, 1).
    """

    steps: int = 1000
    beta_first: float = 1e-4
    beta_last: float = 0.02
    learned_variance: bool = True

    deviation = 1.0
    noised = process.noised

    def __post_init__(self):
        if self.steps < 2:
            raise UserError(f"process.steps={self.steps} must be at least 2")
        if not 0 < self.beta_first <= self.beta_last < 1:
            raise UserError(
                f"process.beta_first={self.beta_first}, beta_last={self.beta_last} must rise and "
                "lie within (0, 1)"
            )

    @property
    def outputs(self) -> int:
        """2 with a learned variance, otherwise 1."""
        return 2 if self.learned_variance else 1

    @property
    def tables(self) -> Tables:
        """What the steps are made of."""
        return _tables(self.steps, self.beta_first, self.beta_last)

    def path(self, t: Float[Array, "*b"]) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
        """(sqrt(abar), sqrt(1 - abar)) of the nearest step."""
        row = self._row(t)
        return jnp.asarray(self.tables.alpha)[row], jnp.asarray(self.tables.sigma)[row]

    def times(self, u: Float[Array, "b"], dimension: int) -> Float[Array, "b"]:
        """All T times are equally likely."""
        return (jnp.minimum(jnp.floor(u * self.steps), self.steps - 1) + 1) / self.steps

    def inputs(self, x_t: Float[Array, "b *shape"], t: Float[Array, "b"]) -> tuple:
        """(x_t, n / 1000): the network sees the number of the step."""
        return x_t, (self._row(t) - 1) / 1000

    def predict(
        self, output: Float[Array, "b *full"], x_t: Float[Array, "b *shape"], t: Float[Array, "b"]
    ) -> Prediction:
        """The predicted noise, the data that remain, and the variance's place in its range."""
        noise, mix = self._split(output)
        alpha, sigma = (per_example(each, x_t) for each in self.path(t))
        return Prediction((x_t.astype(jnp.float32) - sigma * noise) / alpha, noise, mix)

    def loss(
        self,
        output: Float[Array, "b *full"],
        x0: Float[Array, "b *shape"],
        noise: Float[Array, "b *shape"],
        t: Float[Array, "b"],
    ) -> Float[Array, "b"]:
        """Mean squared error of the noise and, with a learned variance, the `bound`'s term.

        No gradient reaches the predicted noise through the latter: it teaches the variance alone.
        """
        predicted, mix = self._split(output)
        error = predicted - noise.astype(jnp.float32)
        if mix is None:
            return mean_square(error)
        return mean_square(error) + self._bound(jax.lax.stop_gradient(error), mix, x0, t)

    def bound(
        self,
        output: Float[Array, "b *full"],
        x0: Float[Array, "b *shape"],
        noise: Float[Array, "b *shape"],
        t: Float[Array, "b"],
    ) -> Float[Array, "b"]:
        """The step's term of the variational bound on -log p(x0), in bits per dimension.

        From step 1 on it is the divergence of the reverse step from the posterior of x0. At step 0
        it is -log of the mass that the reverse step gives to the bin of x0, for data in [-1, 1] of
        256 values, the outer bins without end. Latents go by the same formula, as in DiT. The sum
        of the T terms lacks only the divergence of x at t=1 from standard normal noise.

        Raises:
          UserError: the variance is not learned.
        """
        predicted, mix = self._split(output)
        if mix is None:
            raise UserError("process.learned_variance=False has no bound")
        return self._bound(predicted - noise.astype(jnp.float32), mix, x0, t)

    def grid(self, spacing: str, steps: int, dimension: int) -> Float[Array, "{steps}+1"]:
        """Times of `steps` of the T steps, the first and the last among them, and then 0.

        Raises:
          UserError: some step would be visited twice.
        """
        share = schedules.grid(spacing, max(steps - 1, 1))[:steps]
        rows = np.append(np.round(share * (self.steps - 1)) + 1, 0)
        if (np.diff(rows) >= 0).any():
            raise UserError(
                f"sampler: {steps} steps with times={spacing!r} do not fit into the {self.steps} "
                "of the process without taking one twice; take fewer"
            )
        return jnp.asarray(rows / self.steps, jnp.float32)

    def raised(self, t, factor):
        """There are no times between the steps.

        Raises:
          UserError: always.
        """
        raise UserError(
            "sampler.churn needs a process of continuous time; DDPM's is in steps: set it to 0, or "
            "take the method 'ancestral' for noise on the way"
        )

    def _row(self, t):
        return jnp.round(t * self.steps).astype(jnp.int32)

    def _split(self, output):
        output = output.astype(jnp.float32)
        if not self.learned_variance:
            return output, None
        noise, range_ = jnp.split(output, 2, axis=-1)
        return noise, (range_ + 1) / 2

    def _bound(self, error, mix, x0, t):
        row = self._row(t)
        found = (self.tables.mean, self.tables.lower, self.tables.gap)
        mean, lower, gap = (per_example(jnp.asarray(each)[row], x0) for each in found)
        miss, more = mean * error, mix * gap  # of the mean, and of the log-variance above `lower`
        divergence = (more + jnp.expm1(-more) + jnp.square(miss) * jnp.exp(-lower - more)) / 2
        first = per_example(row == 1, x0)
        nats = jnp.where(first, -_bin(x0.astype(jnp.float32), miss, lower + more), divergence)
        return nats.mean(tuple(range(1, nats.ndim))) / math.log(2)


@functools.cache
def _tables(steps, first, last):
    beta = np.linspace(first, last, steps)
    alpha_bar = np.cumprod(1 - beta)
    noise = -np.expm1(np.cumsum(np.log1p(-beta)))  # 1 - alpha_bar without the rounding
    lower = np.log(beta[1:] * noise[:-1] / noise[1:])
    lower = np.append(lower[0], lower)
    mean = beta / np.sqrt((1 - beta) * noise)
    columns = [(1, np.sqrt(alpha_bar)), (0, np.sqrt(noise)), (0, mean)]
    columns += [(0, lower), (0, np.log(beta) - lower)]
    return Tables(*(np.append(data, each).astype(np.float32) for data, each in columns))


def _bin(x, miss, log_variance):
    """log of a normal's mass on the bin around x, where x lies `miss` above its mean."""
    scale, log_ndtr = jnp.exp(-log_variance / 2), jax.scipy.special.log_ndtr
    # On the lower side of the mean, where the two tails' difference keeps its digits.
    low, high = (log_ndtr((side * HALF - jnp.abs(miss)) * scale) for side in (-1, 1))
    inner = high + jnp.log(jnp.maximum(-jnp.expm1(low - high), 1e-12))
    outer = log_ndtr((HALF - jnp.sign(x) * miss) * scale)
    return jnp.where(jnp.abs(x) > 0.999, outer, inner)
