"""The linear path, x_t = (1 - t) x0 + t eps, with velocity v = eps - x0.

A network predicts the velocity or the data; either follows from the other and x_t. Source:
rectified flow (arXiv 2209.03003), flow matching (arXiv 2210.02747).
"""

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import ScalarLike

from dlc_jax.diffusion import process, schedules
from dlc_jax.diffusion.process import Prediction, mean_square, per_example
from dlc_jax.errors import UserError
from dlc_jax.typing import Array, Float

FLOOR = 1e-4  # of the time that a step divides by: below a sampler's last, as data have no noise
KNOWN = {"prediction": ("v", "x"), "time": ("logit_normal", "uniform")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """The linear path, see `process`.

    Attributes:
      prediction: what the network gives, "v" (noise minus data) or "x" (data).
      floor: smallest time in the weight 1 / t^2 of an "x" network's loss.
      time: distribution of training times, "logit_normal" or "uniform".
      mean: of the normal draw whose sigmoid is the logit-normal time. Above 0 leans to noise.
      spread: standard deviation of that draw.
      shift: factor a of t' = a t / (1 + (a - 1) t), in training and in sampling. 1 is none, above
        it leans to noise, and 0 takes the square root of an example's elements / 4096.

    Raises:
      UserError: an unknown prediction or time, floor or spread not above 0, or a negative shift.

    Source: logit-normal times, Esser et al. 2024 (arXiv 2403.03206); x-prediction with a loss on
    the velocity (arXiv 2511.13720); shift by dimension (RAE, arXiv 2510.11690).
    """

    prediction: str = "v"
    floor: float = 0.1
    time: str = "logit_normal"
    mean: float = 0.0
    spread: float = 1.0
    shift: float = 1.0

    outputs = 1
    deviation = 1.0
    noised = process.noised

    def __post_init__(self):
        for field, known in KNOWN.items():
            if (value := getattr(self, field)) not in known:
                raise UserError(f"process.{field}={value!r} is unknown; known: {', '.join(known)}")
        for field in ("floor", "spread"):
            if not 0 < (value := getattr(self, field)) < math.inf:
                raise UserError(f"process.{field}={value} must be a number above 0")
        if not 0 <= self.shift < math.inf:
            raise UserError(f"process.shift={self.shift} must be a number from 0 up")

    def path(self, t: Float[Array, "*b"]) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
        """(1 - t, t)."""
        return 1 - t, t

    def times(self, u: Float[Array, "b"], dimension: int) -> Float[Array, "b"]:
        """Uniform or logit-normal times, shifted."""
        if self.time == "logit_normal":
            u = schedules.logit_normal(u, self.mean, self.spread)
        return self._shifted(u, dimension)

    def inputs(self, x_t: Float[Array, "b *shape"], t: Float[Array, "b"]) -> tuple:
        """(x_t, t) as they are."""
        return x_t, t

    def predict(
        self, output: Float[Array, "b *shape"], x_t: Float[Array, "b *shape"], t: Float[Array, "b"]
    ) -> Prediction:
        """Data and noise of a velocity or of data; the latter divides by t, held above `FLOOR`."""
        output, x_t = output.astype(jnp.float32), x_t.astype(jnp.float32)
        t = per_example(t, x_t)
        if self.prediction == "v":
            return Prediction(x_t - t * output, x_t + (1 - t) * output)
        return Prediction(output, (x_t - (1 - t) * output) / jnp.maximum(t, FLOOR))

    def loss(
        self,
        output: Float[Array, "b *shape"],
        x0: Float[Array, "b *shape"],
        noise: Float[Array, "b *shape"],
        t: Float[Array, "b"],
    ) -> Float[Array, "b"]:
        """Mean squared error on the velocity.

        For "x" it is the error on the data over t^2, where t is held above `floor`: otherwise the
        least noisy examples would be all that counts.
        """
        output, x0, noise = (value.astype(jnp.float32) for value in (output, x0, noise))
        if self.prediction == "v":
            return mean_square(output - (noise - x0))
        return mean_square(output - x0) / jnp.square(jnp.maximum(t, self.floor))

    def grid(self, spacing: str, steps: int, dimension: int) -> Float[Array, "{steps}+1"]:
        """From 1 to 0, spaced as `schedules.TIMES[spacing]` says and then shifted."""
        return jnp.asarray(self._shifted(schedules.grid(spacing, steps), dimension), jnp.float32)

    def raised(self, t: Float[Array, "*b"], factor: ScalarLike) -> Float[Array, "*b"]:
        """The time at which t / (1 - t) is `factor` times as large; 1 stays 1."""
        return factor * t / (1 + (factor - 1) * t)

    def _shifted(self, t, dimension):
        factor = self.shift or math.sqrt(dimension / 4096)
        return t if factor == 1 else factor * t / (1 + (factor - 1) * t)
