"""Which times are trained on, how many positions are masked at each, and which times a sampler visits."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ScalarLike

from dlc_jax.errors import UserError
from dlc_jax.typing import Array, Float, Int, Key

EDGE = 2.0**-24  # half the spacing of floats below 1: nothing drawn is exactly 0 or 1


def stratified(position: Int[Array, "b"], total: ScalarLike, key: Key[Array, ""]) -> Float[Array, "b"]:
    """Evenly spread times, (position / total + u) mod 1 with one u for all: each alone is uniform, together they fill [0, 1].

    Shapes: position [b], each example's place among the `total` examples of the global step; one key for that step; result [b],
    strictly between 0 and 1. An example's time depends on its place alone, so splitting the batch over devices or microbatches
    changes nothing, and each interval [i / total, (i + 1) / total) gets exactly one example.
    Source: the low-discrepancy sampler of VDM (arXiv 2107.00630).
    """
    # The offset's whole steps are taken as an integer: adding it as a float would put two examples in one interval now and then.
    whole, part = jax.random.split(key)
    place = (position + jax.random.randint(whole, (), 0, total)) % total
    return jnp.clip((place + jax.random.uniform(part)) / total, EDGE, 1 - EDGE)


def logit_normal(u: Float[Array, "b"], mean: ScalarLike = 0.0, deviation: ScalarLike = 1.0) -> Float[Array, "b"]:
    """Uniform draws in (0, 1) to logit-normal times, sigmoid(mean + deviation * N(0, 1)), by the inverse distribution function.

    Order is kept, so stratified draws stay stratified. A mean above 0 leans to noise.
    Source: Esser et al. 2024 (arXiv 2403.03206).
    """
    return jax.nn.sigmoid(mean + deviation * jax.scipy.special.ndtri(u))


def shift_times(t, amount: ScalarLike):
    """Moves times towards noise for amount > 1, a t / (1 + (a - 1) t); 0 and 1 stay. Source: Esser et al. 2024."""
    return amount * t / (1 + (amount - 1) * t)


class MaskSchedule(NamedTuple):
    """How much of a code is hidden at time t. alpha(t) is the chance that a position is still visible, from 1 at t=0 to 0 at t=1.

    Attributes:
      hidden: t -> 1 - alpha(t), given rather than alpha because it is the part that must be exact near t=0.
      slope: t -> alpha'(t), at most 0.
    """

    hidden: Callable
    slope: Callable

    def alpha(self, t):
        """Chance that a position is still visible."""
        return 1 - self.hidden(t)

    def weight(self, t):
        """-alpha' / (1 - alpha), the weight of the continuous-time bound: 1/t for `linear`. Source: MDLM (arXiv 2406.07524)."""
        # Nothing is hidden at t=0; the floor keeps that zero from meeting an infinite weight.
        return -self.slope(t) / jnp.maximum(self.hidden(t), EDGE)


linear = MaskSchedule(hidden=lambda t: t, slope=lambda t: -jnp.ones_like(t))
# alpha = 1 - cos(pi/2 (1 - t)), written so that small t loses no digits. Source: MD4 (arXiv 2406.04329).
cosine = MaskSchedule(hidden=lambda t: jnp.sin(jnp.pi / 2 * t), slope=lambda t: -jnp.pi / 2 * jnp.cos(jnp.pi / 2 * t))

MASK_SCHEDULES = {"linear": linear, "cosine": cosine}


def data_weight(t: Float[Array, "b"], *, floor: ScalarLike) -> Float[Array, "b"]:
    """1 / max(t, floor)^2: makes a squared error on data the squared error on velocity, but for times below the floor."""
    return 1 / jnp.square(jnp.maximum(t, floor))


def uniform_grid(steps: int, *, shift: float = 1.0) -> Float[Array, "{steps}+1"]:
    """Times of a sampler, steps + 1 of them, evenly from 1 to 0; `shift` > 1 puts more near noise (`shift_times`)."""
    return _grid(steps, lambda part: 1 - part, shift)


def cosine_grid(steps: int, *, shift: float = 1.0) -> Float[Array, "{steps}+1"]:
    """Times of a sampler, steps + 1 of them, from 1 to 0 along a quarter of a cosine: more of them near noise."""
    return _grid(steps, lambda part: np.cos(np.pi / 2 * part), shift)


def _grid(steps, curve, amount):
    if steps < 1:
        raise UserError(f"sampling steps={steps}: at least 1 is needed")
    t = shift_times(curve(np.arange(steps + 1) / steps), amount)
    t[0], t[-1] = 1, 0  # exactly, whatever the curve rounds to
    return jnp.asarray(t, jnp.float32)
