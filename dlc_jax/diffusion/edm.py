"""EDM: noise of deviation sigma is added to the data, x = x0 + sigma eps.

The network F is preconditioned, D(x) = c_skip x + c_out F(c_in x, c_noise), so that its inputs and
its targets have variance 1 at every sigma. Source: EDM (arXiv 2206.00364) table 1.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ScalarLike

from dlc_jax.diffusion import process, schedules
from dlc_jax.diffusion.process import Prediction, mean_square, per_example
from dlc_jax.errors import UserError
from dlc_jax.typing import Array, Float

TINY = 1e-9  # the time of `sigma_min`, above that of the data


@dataclasses.dataclass(frozen=True, kw_only=True)
class EDM:
    """EDM's path, preconditioning and loss, see `process`.

    The time is linear in sigma^(1 / rho): sigma_max at t=1, sigma_min just above t=0.

    Attributes:
      sigma_data: standard deviation of the data.
      p_mean: mean of ln sigma in training.
      p_std: standard deviation of ln sigma in training.
      sigma_min: least noise; training noise below it is raised to it.
      sigma_max: most noise; training noise above it is lowered to it.
      rho: how densely a sampler's steps lie near the data.

    Raises:
      UserError: a value that is not above 0, or sigma_max not above sigma_min.
    """

    sigma_data: float = 0.5
    p_mean: float = -1.2
    p_std: float = 1.2
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    outputs = 1
    noised = process.noised

    def __post_init__(self):
        for field in ("sigma_data", "p_std", "sigma_min", "rho"):
            if not 0 < (value := getattr(self, field)) < math.inf:
                raise UserError(f"process.{field}={value} must be a number above 0")
        if not self.sigma_min < self.sigma_max < math.inf:
            raise UserError(
                f"process.sigma_max={self.sigma_max} must be above sigma_min={self.sigma_min}"
            )

    @property
    def deviation(self) -> float:
        """`sigma_data`."""
        return self.sigma_data

    def path(self, t: Float[Array, "*b"]) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
        """(1, sigma)."""
        low, high = self._ends()
        sigma = (low + t * (high - low)) ** self.rho
        return jnp.ones_like(sigma), jnp.where(t > 0, sigma, 0)

    def times(self, u: Float[Array, "b"], dimension: int) -> Float[Array, "b"]:
        """Log-normal sigma, held between `sigma_min` and `sigma_max`."""
        sigma = jnp.exp(self.p_mean + self.p_std * jax.scipy.special.ndtri(u))
        return self._time(sigma)

    def inputs(self, x_t: Float[Array, "b *shape"], t: Float[Array, "b"]) -> tuple:
        """(c_in x, c_noise): x of variance 1, and ln(sigma) / 4."""
        _, sigma = self.path(t)
        scale = per_example(1 / self._root(sigma), x_t)
        return (scale * x_t).astype(x_t.dtype), jnp.log(sigma) / 4

    def predict(
        self, output: Float[Array, "b *shape"], x_t: Float[Array, "b *shape"], t: Float[Array, "b"]
    ) -> Prediction:
        """D = c_skip x + c_out F, and the noise (x - D) / sigma without its division."""
        output, x_t = output.astype(jnp.float32), x_t.astype(jnp.float32)
        sigma = per_example(self.path(t)[1], x_t)
        root = self._root(sigma)
        share, data = sigma / root, self.sigma_data / root
        return Prediction(
            jnp.square(data) * x_t + sigma * data * output, share / root * x_t - data * output
        )

    def loss(
        self,
        output: Float[Array, "b *shape"],
        x0: Float[Array, "b *shape"],
        noise: Float[Array, "b *shape"],
        t: Float[Array, "b"],
    ) -> Float[Array, "b"]:
        """Mean squared error of the network's own output F, whose target has variance 1.

        That is EDM's lambda(sigma) |D - x0|^2 with lambda = (sigma^2 + sigma_data^2) / (sigma
        sigma_data)^2 = 1 / c_out^2.
        """
        output, x0, noise = (value.astype(jnp.float32) for value in (output, x0, noise))
        sigma = per_example(self.path(t)[1], x0)
        target = (sigma / self.sigma_data * x0 - self.sigma_data * noise) / self._root(sigma)
        return mean_square(output - target)

    def grid(self, spacing: str, steps: int, dimension: int) -> Float[Array, "{steps}+1"]:
        """From sigma_max to sigma_min, evenly in sigma^(1 / rho) if uniform, and then 0."""
        t = schedules.grid(spacing, max(steps - 1, 1))[:steps]
        return jnp.asarray(np.append(np.maximum(t, TINY), 0), jnp.float32)

    def raised(self, t: Float[Array, "*b"], factor: ScalarLike) -> Float[Array, "*b"]:
        """The time at which sigma is `factor` times as large."""
        return self._time(factor * self.path(t)[1])

    def _ends(self):
        return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)

    def _time(self, sigma):
        low, high = self._ends()
        return jnp.clip((sigma ** (1 / self.rho) - low) / (high - low), TINY, 1)

    def _root(self, sigma):
        return jnp.sqrt(jnp.square(sigma) + self.sigma_data**2)
