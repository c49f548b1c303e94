"""A Gaussian process from data to noise, x_t = alpha(t) x0 + sigma(t) eps: what each one offers.

A process is a frozen dataclass, a section of a recipe, with these attributes and methods;
`linear.Linear`, `ddpm.DDPM` and `edm.EDM` are three. t=1 is noise, t=0 is data.

    outputs                     channels of the network's output, in multiples of the data's
    deviation                   standard deviation that the data should have
    path(t)                     (alpha, sigma) at any times, float32; exactly (1, 0) at t=0
    times(u, dimension)         training times of uniform draws in (0, 1), in the same order;
                                `dimension` is the number of elements of one example
    noised(x0, noise, t)        x_t [b, ...] at times [b]
    inputs(x_t, t)              (x, time) as the network reads them, which multiplies the time by
                                1000 itself
    predict(output, x_t, t)     `Prediction` of the network's output
    loss(output, x0, noise, t)  [b] float32, what is minimized for each example
    grid(spacing, steps, dimension)
                                float32 [steps + 1], times of a sampler from noise to 0; it starts
                                from sigma(grid[0]) times standard normal noise
    raised(t, factor)           the time, 1 at most, where sigma / alpha is `factor` times as large;
                                UserError if only some times exist

Samplers need `path`, `grid` and `raised` alone: dx = data dalpha + noise dsigma leads from noise to
data on all of these paths (DDIM, arXiv 2010.02502; EDM, arXiv 2206.00364).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Shaped

from dlc_jax.typing import Array, Float


class Prediction(NamedTuple):
    """What a network's output says of x_t, float32: x_t = alpha(t) data + sigma(t) noise.

    Attributes:
      data: [b, ...], the estimate of x0.
      noise: [b, ...], the estimate of eps.
      mix: [b, ...], how far a step's variance is from the lower towards the upper one, on a
        logarithmic scale. None: it is not learned.
    """

    data: jax.Array
    noise: jax.Array
    mix: jax.Array | None = None


def noised(
    process, x0: Float[Array, "b *shape"], noise: Float[Array, "b *shape"], t: Float[Array, "b"]
) -> Float[Array, "b *shape"]:
    """x_t, each example at its own time; a method of every process."""
    alpha, sigma = (per_example(each, x0) for each in process.path(t))
    return alpha * x0 + sigma * noise


def posterior(process, found: Prediction, t: Float[Array, "*b"], s: Float[Array, "*b"]) -> tuple:
    """(mean, variance) of x_s given x_t, for s < t.

    The mean is that of q(x_s | x_t, x0) at the predicted x0. The variance is q's own, the lower
    one, where it is not learned; the upper one is that of the noise between s and t. On DDPM's
    path with respaced times these are the posterior and the learned range of the respaced betas.
    Source: DDPM (arXiv 2006.11239) equation 7, improved DDPM (arXiv 2102.09672) equation 15.
    """
    (alpha, sigma), (alpha_s, sigma_s) = process.path(t), process.path(s)
    kept = alpha / alpha_s
    # Not 1 - kept^2 or the like, which is lost to rounding between times close to the data.
    upper = (sigma - kept * sigma_s) * (sigma + kept * sigma_s)
    share = sigma_s / sigma
    mean = alpha_s * found.data + kept * sigma_s * share * found.noise
    lower = upper * jnp.square(share)
    if found.mix is None:
        return mean, lower
    return mean, lower * jnp.where(share > 0, share, 1) ** (-2 * found.mix)


def per_example(t: Shaped[Array, "b"], x: Shaped[Array, "b *shape"]) -> Shaped[Array, "b ..."]:
    """[b] shaped to multiply [b, ...]."""
    return t.reshape(t.shape + (1,) * (x.ndim - 1))


def mean_square(x: Float[Array, "b *shape"]) -> Float[Array, "b"]:
    """The mean of squares over all but the first axis."""
    return jnp.square(x).mean(tuple(range(1, x.ndim)))
