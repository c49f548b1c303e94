"""Guidance, with one meaning everywhere: base + scale * (conditional - base).

Scale 1 is the conditional model, 0 the base. A "guidance weight" w that is 0 for none is scale
1 + w. Source: classifier-free guidance (arXiv 2207.12598), guidance interval (arXiv 2404.07724),
autoguidance (arXiv 2406.02507).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dlc_jax.diffusion.flow import per_example
from dlc_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guidance:
    """How far, when and where predictions are moved away from a base.

    Attributes:
      scale: 1 is no guidance, above 1 leans to the codes.
      interval: closed range of times in which to guide. 1 is noise, 0 is data.
      channels: guide only the first so many channels. None guides all.
      base: directory of a trained generator step that is the base under the same codes
        (autoguidance). "" is the null condition.

    Raises:
      UserError: a scale that is not finite, an interval outside [0, 1], or less than one channel.
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    channels: int | None = None
    base: str = ""

    def __post_init__(self):
        if not math.isfinite(self.scale):
            raise UserError(f"guidance.scale={self.scale} must be a finite number")
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise UserError(f"guidance.interval={self.interval} must rise and lie within [0, 1]")
        if self.channels is not None and self.channels < 1:
            raise UserError(
                f"guidance.channels={self.channels} must be at least 1, or None for all"
            )


def guided(
    model_fn: Callable, codes: Any, guidance: Guidance, *, null_fn: Callable | None = None
) -> Callable:
    """(x, t) -> guided prediction, for x [b, ..., c] and t [b].

    Velocities and predicted data are affine in each other at given x and t, so it makes no
    difference which of the two is guided. The base is not run at scale 1, nor where no example's
    time lies in the interval; there the conditional prediction stands.

    Args:
      model_fn: (x, t, codes) -> prediction.
      codes: what the conditional model reads.
      guidance: its `base` is the caller's to load, as `null_fn`.
      null_fn: (x, t) -> the base's prediction. None is the null condition, `model_fn(x, t, None)`.
    """
    low, high = guidance.interval
    everywhere = low <= 0 and high >= 1

    def conditional_only(x, t):
        return model_fn(x, t, codes)

    def both(x, t):
        conditional = model_fn(x, t, codes)
        if everywhere:
            return mix(conditional, x, t)
        inside = (t >= low) & (t <= high)
        out = jax.lax.cond(
            inside.any(), mix, lambda conditional, x, t: conditional, conditional, x, t
        )
        return jnp.where(per_example(inside, conditional), out, conditional)

    def mix(conditional, x, t):
        base = model_fn(x, t, None) if null_fn is None else null_fn(x, t)
        out = (base + guidance.scale * (conditional - base)).astype(conditional.dtype)
        if guidance.channels is None:
            return out
        parts = [out[..., : guidance.channels], conditional[..., guidance.channels :]]
        return jnp.concatenate(parts, axis=-1)

    return conditional_only if guidance.scale == 1 else both
