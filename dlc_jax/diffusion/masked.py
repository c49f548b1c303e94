"""Masked (absorbing) diffusion of codes: positions are hidden one by one, and learned back.

    codes ──hide each position with chance t──► noisy, hidden ──network──► logits ──► bound
    all hidden ──choose positions, then draw their values, `calls` times──► codes

A code has `length` positions of values 0..V-1; the mask is V. The network needs no time: the best
guess of a hidden position depends on the visible ones alone (RADD, arXiv 2406.03736). Source of the
process: MDLM (arXiv 2406.07524) and MD4 (arXiv 2406.04329), with the linear schedule.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dlc_jax.diffusion.schedules import EDGE
from dlc_jax.errors import UserError
from dlc_jax.typing import Array, Bool, Float, Int, Key


def mask_codes(
    codes: Int[Array, "b l"], t: Float[Array, "b"], keys: Key[Array, "b"], *, values: int
) -> tuple[Int[Array, "b l"], Bool[Array, "b l"]]:
    """(noisy, hidden): each position becomes the mask, `values`, with chance t, by itself."""
    draw = jax.vmap(lambda key: jax.random.uniform(key, codes.shape[1:]))(keys)
    hidden = draw < t[:, None]
    return jnp.where(hidden, values, codes), hidden


def cross_entropy(
    logits: Float[Array, "b l v"], codes: Int[Array, "b l"], hidden: Bool[Array, "b l"]
) -> Float[Array, "b"]:
    """-log p(codes) summed over hidden positions: nats per example, in float32."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, codes[..., None], -1)[..., 0]
    nats = jax.nn.logsumexp(logits, -1) - chosen
    return jnp.where(hidden, nats, 0).sum(-1)


def bound(
    logits: Float[Array, "b l v"],
    codes: Int[Array, "b l"],
    hidden: Bool[Array, "b l"],
    t: Float[Array, "b"],
) -> Float[Array, "b"]:
    """Nats per example whose mean over t ~ U(0, 1) and masks is at least -log p(codes).

    It is `cross_entropy` / t, and its mean is -log p averaged over all orders of revealing. Where
    the network's conditionals are those of one joint distribution, that is -log p itself.
    Source: MDLM.
    """
    # Nothing is hidden at t=0; the floor keeps that zero from meeting an infinite weight.
    weight = 1 / jnp.maximum(t, EDGE)
    return weight * cross_entropy(logits, codes, hidden)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeSampler:
    """How codes are drawn with a network that learned masked diffusion.

    Attributes:
      calls: of the network for one code. 0 makes one call per position, which samples the process
        exactly; with fewer, the positions of one call are drawn independently of each other.
      temperature: divides the logits. 0 takes the likeliest value.
      order: in which positions are revealed, "random".

    Raises:
      UserError: calls or temperature below 0, or an unknown order.
    """

    calls: int = 0
    temperature: float = 1.0
    order: str = "random"

    def __post_init__(self):
        if self.calls < 0:
            raise UserError(f"sampler.calls={self.calls} must be at least 0")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"sampler.temperature={self.temperature} must be a number from 0 up")
        if self.order != "random":
            raise UserError(f"sampler.order={self.order!r} is unknown; known: random")

    def draw(
        self,
        logits_fn: Callable,
        keys: Key[Array, "b"],
        length: int,
        values: int,
        *,
        prompt: Int[Array, "b l"] | None = None,
        known: Bool[Array, "b l"] | None = None,
    ) -> Int[Array, "b l"]:
        """Codes [b, length] drawn with runs of `logits_fn`, noisy [b, l] -> logits [b, l, values].

        Each call first chooses positions, an equal share of the unknown ones in an order that is
        random for each example, and then draws one value for each of them.

        Args:
          keys: one an example; order and values depend on it alone, not on the batch, and a
            position's noise not on `calls` either.
          prompt, known: infilling: positions where `known` keep `prompt`'s values.

        Raises:
          ValueError: one of `prompt` and `known` without the other.

        Source: first-hitting sampler (arXiv 2409.02908): which positions are revealed does not
        depend on values, so the choice is made apart. A joint draw over values and "stay hidden"
        loses rare values to the rounding of float32, and so does Gumbel noise of the common range;
        hence two steps, and mode="high".
        """
        if (prompt is None) != (known is None):
            raise ValueError("prompt and known go together")
        if known is None:
            known = jnp.zeros((keys.shape[0], length), bool)
            prompt = jnp.zeros((keys.shape[0], length), jnp.int32)
        calls = min(self.calls or length, length)  # more would reveal nothing
        share = -(-length // calls)  # most positions that one call can reveal

        split = jax.vmap(jax.random.split)(keys)
        order_keys, value_keys = split[:, 0], split[:, 1]
        score = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(order_keys)
        queue = jnp.argsort(jnp.where(known, 2.0, score), -1)  # unknown positions first, shuffled
        unknown = length - known.sum(-1, dtype=jnp.int32)

        def gumbel(key, position):
            key = jax.random.fold_in(key, position)
            return jax.random.gumbel(key, (values,), jnp.float32, mode="high")

        def call(codes, index):
            start, stop = index * unknown // calls, (index + 1) * unknown // calls
            place = start[:, None] + jnp.arange(share)[None]
            chosen = jnp.take_along_axis(queue, jnp.minimum(place, length - 1), -1)
            logits = jnp.take_along_axis(logits_fn(codes), chosen[..., None], 1).astype(jnp.float32)
            noise = jax.vmap(jax.vmap(gumbel, (None, 0)))(value_keys, chosen)
            drawn = jnp.argmax(logits + self.temperature * noise, -1).astype(codes.dtype)
            chosen = jnp.where(place < stop[:, None], chosen, length)  # out of range, hence dropped
            put = jax.vmap(lambda row, where, what: row.at[where].set(what, mode="drop"))
            return put(codes, chosen, drawn), None

        start = jnp.where(known, prompt, values).astype(jnp.int32)
        codes, _ = jax.lax.scan(call, start, jnp.arange(calls))
        return codes
