"""Which times are trained on, and which times a sampler visits."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ScalarLike

from dlc_jax.typing import Array, Float, Int, Key

EDGE = 2.0**-24  # half the spacing of floats below 1: nothing drawn is exactly 0 or 1

# (share of the steps that are done) -> time
TIMES = {
    "uniform": lambda part: 1 - part,
    "cosine": lambda part: np.cos(np.pi / 2 * part),  # a quarter of a cosine: denser near noise
}


def grid(times: str, steps: int) -> np.ndarray:
    """steps + 1 numbers from 1 to 0, float64, spaced as `TIMES[times]` says."""
    t = TIMES[times](np.arange(steps + 1) / steps)
    t[0], t[-1] = 1, 0  # exactly, whatever the curve rounds to
    return t


def stratified(
    position: Int[Array, "b"], total: ScalarLike, key: Key[Array, ""]
) -> Float[Array, "b"]:
    """Evenly spread times, (position / total + u) mod 1 with one u for all.

    Each alone is uniform, together they fill (0, 1): each interval [i / total, (i + 1) / total)
    gets exactly one. A time depends on its example's place alone, so splitting the batch over
    devices or microbatches changes nothing. Source: the low-discrepancy sampler of VDM
    (arXiv 2107.00630).

    Args:
      position: each example's place among the `total` examples of the global step.
      key: one for the whole step.
    """
    # The offset's whole steps are taken as an integer: added as a float they would now and then put
    # two examples in one interval.
    whole, part = jax.random.split(key)
    place = (position + jax.random.randint(whole, (), 0, total)) % total
    return jnp.clip((place + jax.random.uniform(part)) / total, EDGE, 1 - EDGE)


def logit_normal(
    u: Float[Array, "b"], mean: ScalarLike = 0.0, deviation: ScalarLike = 1.0
) -> Float[Array, "b"]:
    """Uniform draws in (0, 1) to logit-normal times, sigmoid(mean + deviation * N(0, 1)).

    Done by the inverse distribution function, which keeps the order, so stratified draws stay
    stratified. A mean above 0 leans to noise. Source: Esser et al. 2024 (arXiv 2403.03206).
    """
    return jax.nn.sigmoid(mean + deviation * jax.scipy.special.ndtri(u))
