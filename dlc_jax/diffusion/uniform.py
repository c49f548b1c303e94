"""Uniform diffusion of codes: values are replaced by random ones, and learned back.

A network gives for every position the log-ratios log s_y = log p_t(y) / p_t(x) of its value x and
all others, with which values can be changed back. Source: SEDD (arXiv 2310.16834), the uniform
graph: a value is replaced at the rate sigma'(t), by any of the V with the same chance.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dlc_jax.diffusion.noise import Noise
from dlc_jax.errors import UserError
from dlc_jax.typing import Array, Float, Int, Key

SCHEDULES = ("geometric", "log_linear")
LARGEST = 80.0  # of sigma


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform:
    """The process; it is learned by the score entropy.

    Attributes:
      noise: how many positions are replaced at a time, geometric or log_linear.

    Raises:
      UserError: another schedule, or too large a sigma.
    """

    noise: Noise = Noise(schedule="geometric")

    def __post_init__(self):
        if self.noise.schedule not in SCHEDULES:
            known = ", ".join(SCHEDULES)
            raise UserError(
                f"process.noise.schedule={self.noise.schedule!r} has no rate at t=1, where nothing "
                f"is left of the data; uniform noise takes one of {known}"
            )
        if self.noise.schedule == "geometric" and self.noise.largest > LARGEST:
            raise UserError(
                f"process.noise.largest={self.noise.largest} is at most {LARGEST:g} for uniform "
                "noise: e^sigma is computed in float32"
            )

    def corrupt(
        self, codes: Int[Array, "b l"], t: Float[Array, "b"], keys: Key[Array, "b"], *, values: int
    ) -> Int[Array, "b l"]:
        """Noisy codes: each position becomes a random value with chance hidden(t)."""

        def draw(key, codes, share):
            chance, value = jax.random.split(key)
            random = jax.random.randint(value, codes.shape, 0, values, codes.dtype)
            return jnp.where(jax.random.uniform(chance, codes.shape) < share, random, codes)

        return jax.vmap(draw)(keys, codes, self.noise.hidden(t))

    def scores(
        self, outputs: Float[Array, "b l _"], noisy: Int[Array, "b l"], *, values: int
    ) -> Float[Array, "b l v"]:
        """Log-ratios of a network's outputs: 0 at the position's own value."""
        own = jax.nn.one_hot(noisy, values, dtype=bool)
        return jnp.where(own, 0.0, outputs[..., :values].astype(jnp.float32))

    def loss(
        self,
        outputs: Float[Array, "b l _"],
        codes: Int[Array, "b l"],
        noisy: Int[Array, "b l"],
        t: Float[Array, "b"],
        *,
        values: int,
    ) -> Float[Array, "b"]:
        """The score entropy, nats per example, whose mean over t ~ U(0, 1) bounds -log p(codes).

        But for what the schedule leaves at its ends: below sigma(0), and of the data at t=1.

        sigma'(t) / V times the sum over the other values of s - r log s + r (log r - 1), where r is
        the ratio that the true value gives. Source: SEDD, equations 5 and 9.
        """
        log_s = self.scores(outputs, noisy, values=values)
        scaled = jnp.expm1(self.noise.sigma(t))[:, None]
        own = jnp.log(scaled / (scaled + values))  # log chance of another value over this, unmoved
        is_same = (noisy == codes)[..., None]
        is_true = jax.nn.one_hot(codes, values, dtype=bool)
        log_r = jnp.where(is_same, own[..., None], jnp.where(is_true, -own[..., None], 0.0))
        r = jnp.exp(log_r)
        each = jnp.exp(log_s) - r * log_s + r * (log_r - 1)
        others = ~jax.nn.one_hot(noisy, values, dtype=bool)
        total = jnp.where(others, each, 0).sum((1, 2)) / values
        return self.noise.rate(t) * total

    bound = loss
