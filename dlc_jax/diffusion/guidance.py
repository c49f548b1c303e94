"""Guidance, with one meaning everywhere: weak + scale * (conditional - weak).

Scale 1 is the conditional model, 0 the weak one. A "guidance weight" w that is 0 for none is scale
1 + w. Source: classifier-free guidance (arXiv 2207.12598), guidance interval (arXiv 2404.07724),
autoguidance (arXiv 2406.02507), several conditions at once (arXiv 2206.01714).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from dlc_jax.diffusion.process import Prediction, per_example
from dlc_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guidance:
    """How far, when and where predictions are moved away from weaker ones.

    Attributes:
      scale: 1 is no guidance, above 1 leans to the condition.
      interval: closed range of times in which to guide. 1 is noise, 0 is data.
      channels: guide only the first so many channels. None guides all.
      base: what gives the weak prediction. "" is the model under the null condition, "internal"
        its own early head, and otherwise the directory of a trained generator step under the same
        condition (autoguidance).

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


def guided(predict_fn: Callable, weak_fn: Callable | None, guidance: Guidance) -> Callable:
    """(x, t) -> guided `Prediction`, for x [b, ..., c] and t [b].

    Data and noise are affine in each other at given x and t, so both are moved alike. The variance
    is always the conditional prediction's. `weak_fn` is not run at scale 1, where it may be None,
    nor where no example's time lies in the interval; there the conditional prediction stands.

    Args:
      predict_fn, weak_fn: (x, t) -> Prediction.
      guidance: its `base` is the caller's to load, as `weak_fn`.
    """
    if guidance.scale == 1:
        return predict_fn
    low, high = guidance.interval

    def both(x, t):
        found = predict_fn(x, t)
        if low <= 0 and high >= 1:
            return _lean(guidance, found, weak_fn(x, t), t)

        def lean(found, x, t):
            return _lean(guidance, found, weak_fn(x, t), t)

        return jax.lax.cond(
            _inside(guidance, t).any(), lean, lambda found, x, t: found, found, x, t
        )

    return both


def guided_pair(both_fn: Callable, guidance: Guidance) -> Callable:
    """`guided` where one call gives both predictions: (x, t) -> (conditional, weak)."""

    def both(x, t):
        found, weak = both_fn(x, t)
        return found if guidance.scale == 1 else _lean(guidance, found, weak, t)

    return both


def conjoined(
    predict_fns: Sequence[Callable],
    weak_fn: Callable,
    guidance: Guidance,
    scales: Sequence[float],
) -> Callable:
    """(x, t) -> `Prediction` of what fits all conditions: weak + sum_i scale_i (found_i - weak).

    The score of p(x) times the product of (p_i(x) / p(x))^scale_i: with a scale of 1 conditions
    that are independent given x are all met. Outside of the interval, and in channels that are not
    guided, every scale is 1. A variance is the mean of the conditional ones. Of one condition this
    is `guided`. Source: composable diffusion, arXiv 2206.01714, equation 11.

    Args:
      predict_fns: p of (x, t) -> Prediction.
      weak_fn: the same without a condition.
      scales: p numbers.
    """

    def all_of(x, t):
        weak, found = weak_fn(x, t), [predict_fn(x, t) for predict_fn in predict_fns]

        def total(weak, *each):
            guide = _where(guidance, weak, t)
            leant = (
                jnp.where(guide, scale, 1) * (one - weak)
                for scale, one in zip(scales, each, strict=True)
            )
            return (weak + sum(leant)).astype(weak.dtype)

        data, noise = (
            total(getattr(weak, part), *(getattr(one, part) for one in found))
            for part in ("data", "noise")
        )
        mixes = [one.mix for one in found if one.mix is not None]
        return Prediction(data, noise, sum(mixes) / len(mixes) if mixes else None)

    return all_of


def _inside(guidance, t):
    low, high = guidance.interval
    return (t >= low) & (t <= high)


def _where(guidance, x, t):
    """Which entries of x are guided, bool that goes with x."""
    channels = jnp.arange(x.shape[-1]) < (guidance.channels or x.shape[-1])
    return channels & per_example(_inside(guidance, t), x)


def _lean(guidance, found, weak, t):
    """The conditional prediction, moved away from the weak one where its time is inside."""

    def mixed(found, weak):
        out = (weak + guidance.scale * (found - weak)).astype(found.dtype)
        return jnp.where(_where(guidance, found, t), out, found)

    return Prediction(mixed(found.data, weak.data), mixed(found.noise, weak.noise), found.mix)
