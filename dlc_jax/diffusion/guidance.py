"""Guidance, with one meaning everywhere: base + scale * (conditional - base). Scale 1 is the conditional model, 0 the base.

Other conventions: a "guidance weight" w that is 0 for none is scale 1 + w. Source: classifier-free guidance (arXiv 2207.12598),
guidance interval (arXiv 2404.07724), autoguidance (arXiv 2406.02507).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import ScalarLike

from dlc_jax.diffusion.flow import per_example


def guided(
    model_fn: Callable,
    codes: Any,
    *,
    scale: ScalarLike,
    interval: tuple[float, float] = (0.0, 1.0),
    channels: int | None = None,
    null_fn: Callable | None = None,
) -> Callable:
    """(x, t) -> guided prediction, where `model_fn` is (x, t, codes) -> prediction, for x [b, ..., c] and t [b].

    Args:
      codes: what the conditional model reads.
      scale: a Python number 1 leaves the base out of the computation.
      interval: closed range of t in which to guide; elsewhere the conditional prediction stands. The base is not run when no
        example needs it.
      channels: guide only the first so many channels (last axis); all by default.
      null_fn: (x, t) -> the base's prediction; by default `model_fn(x, t, None)`, the null condition. A weaker model that
        reads the same codes makes this autoguidance.

    Velocities and predicted data are affine in each other at given x and t, so it makes no difference which of the two is guided.
    """
    low, high = interval
    everywhere = low <= 0 and high >= 1

    def conditional_only(x, t):
        return model_fn(x, t, codes)

    def both(x, t):
        conditional = model_fn(x, t, codes)
        if everywhere:
            return mix(conditional, x, t)
        inside = (t >= low) & (t <= high)
        out = jax.lax.cond(inside.any(), mix, lambda conditional, x, t: conditional, conditional, x, t)
        return jnp.where(per_example(inside, conditional), out, conditional)

    def mix(conditional, x, t):
        base = model_fn(x, t, None) if null_fn is None else null_fn(x, t)
        out = (base + scale * (conditional - base)).astype(conditional.dtype)
        if channels is None:
            return out
        return jnp.concatenate([out[..., :channels], conditional[..., channels:]], -1)

    return conditional_only if isinstance(scale, float | int) and scale == 1 else both
