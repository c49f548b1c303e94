"""Times, and other single numbers, as vectors that a network reads."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax.models.layers import NORMAL, Dense
from dlc_jax.typing import Array, Float


class TimeEmbedding(nn.Module):
    """A number per example to a vector: 256 cosines and sines of `scale` times it, then an MLP."""

    width: int
    scale: float = 1000.0
    kernel_init: Callable = NORMAL

    @nn.compact
    def __call__(self, t: Float[Array, "b"]) -> Float[Array, "b d"]:
        dense = functools.partial(Dense, self.width, kernel_init=self.kernel_init)
        h = dense(name="fc1")(sincos_1d(self.scale * t, 256))
        return dense(name="fc2")(jax.nn.silu(h))


def time_embedding_flops(width: int) -> float:
    """FLOPs of a `TimeEmbedding` of one number."""
    return 2.0 * (256 * width + width**2)


def sincos_1d(x: Float[Array, "b"], width: int, *, period: float = 1e4) -> Float[Array, "b d"]:
    """[cos | sin] of x at width/2 frequencies, from 1 to nearly 1/period (arXiv 1706.03762)."""
    frequency = period ** (-np.arange(width // 2) / (width // 2))
    angle = x.astype(jnp.float32)[:, None] * frequency.astype(np.float32)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
