"""Masked (absorbing) diffusion of codes: positions are hidden one by one until nothing is left, and learned back.

    codes ──hide each position with chance 1 - alpha(t)──► noisy, hidden ──network──► logits ──► bound
    all hidden ──choose positions, then draw their values, `calls` times──► codes

A code has `length` positions of values 0..V-1; the mask is V. The network needs no time: the best guess of a hidden position
depends on the visible ones alone (RADD, arXiv 2406.03736). Source of the process: MDLM (arXiv 2406.07524), MD4 (2406.04329).
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import ScalarLike

from dlc_jax.diffusion.schedules import MaskSchedule, linear
from dlc_jax.errors import UserError
from dlc_jax.typing import Array, Bool, Float, Int, Key


def mask_codes(
    codes: Int[Array, "b l"], t: Float[Array, "b"], keys: Key[Array, "b"], *, values: int, schedule: MaskSchedule = linear
) -> tuple[Int[Array, "b l"], Bool[Array, "b l"]]:
    """(noisy, hidden): each position becomes the mask, `values`, with chance 1 - alpha(t), by itself."""
    draw = jax.vmap(lambda key: jax.random.uniform(key, codes.shape[1:]))(keys)
    hidden = draw < schedule.hidden(t)[:, None]
    return jnp.where(hidden, values, codes), hidden


def cross_entropy(logits: Float[Array, "b l v"], codes: Int[Array, "b l"], hidden: Bool[Array, "b l"]) -> Float[Array, "b"]:
    """-log p(codes) summed over hidden positions: nats per example, in float32. Visible positions are known and cost nothing."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, codes[..., None], -1)[..., 0]
    nats = jax.nn.logsumexp(logits, -1) - chosen
    return jnp.where(hidden, nats, 0).sum(-1)


def bound(
    logits: Float[Array, "b l v"],
    codes: Int[Array, "b l"],
    hidden: Bool[Array, "b l"],
    t: Float[Array, "b"],
    *,
    schedule: MaskSchedule = linear,
) -> Float[Array, "b"]:
    """Nats per example whose mean over t ~ U(0, 1) and masks is at least -log p(codes): weight(t) times `cross_entropy`.

    It is -log p averaged over all orders of revealing, whatever the schedule; where the network's conditionals are those of one
    joint distribution, it is -log p itself. Source: MDLM.
    """
    return schedule.weight(t) * cross_entropy(logits, codes, hidden)


def nats_per_position(nats: Float[Array, "..."], length: int) -> Float[Array, "..."]:
    """A code's nats spread over its positions; uniform guessing costs log V."""
    return nats / length


def bits_per_position(nats: Float[Array, "..."], length: int) -> Float[Array, "..."]:
    """A code's nats as bits, spread over its positions; uniform guessing costs log2 V."""
    return nats / (length * math.log(2))


def sample(
    logits_fn: Callable,
    keys: Key[Array, "b"],
    length: int,
    values: int,
    *,
    calls: int,
    temperature: ScalarLike = 1.0,
    order: str = "random",
    prompt: Int[Array, "b l"] | None = None,
    known: Bool[Array, "b l"] | None = None,
) -> Int[Array, "b l"]:
    """Codes [b, length] drawn with `calls` runs of `logits_fn`, (noisy [b, l]) -> logits [b, l, values].

    Each call first chooses positions, an equal share of the unknown ones in an order that is random for each example, and then
    draws one value for each of them. With calls >= length every call reveals at most one position, which is exact sampling of the
    process; with fewer, the positions of one call are drawn independently of each other.

    Args:
      keys: one an example; order and values depend on it alone, not on the batch, and a position's noise not on `calls` either.
      temperature: divides the logits; 0 takes the likeliest value.
      order: "random", the only one so far.
      prompt, known: infilling: positions where `known` keep `prompt`'s values.

    Raises: UserError for calls < 1 or an unknown order; ValueError for one of `prompt`, `known` without the other.
    Source: first-hitting sampler (arXiv 2409.02908): which positions are revealed does not depend on values, so the choice is
    made apart. A joint draw over values and "stay hidden" loses rare values to the rounding of float32, and so does Gumbel noise
    of the common range; hence two steps, and mode="high".
    """
    if calls < 1:
        raise UserError(f"sampler calls={calls}: at least 1 is needed")
    if order != "random":
        raise UserError(f"sampler order={order!r} is unknown; known: random")
    if (prompt is None) != (known is None):
        raise ValueError("prompt and known go together")
    b = keys.shape[0]
    if known is None:
        known = jnp.zeros((b, length), bool)
        prompt = jnp.zeros((b, length), jnp.int32)
    calls = min(calls, length)  # more would reveal nothing
    share = -(-length // calls)  # most positions that one call can reveal

    split = jax.vmap(jax.random.split)(keys)
    order_keys, value_keys = split[:, 0], split[:, 1]
    score = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(order_keys)
    queue = jnp.argsort(jnp.where(known, 2.0, score), -1)  # unknown positions first, shuffled
    unknown = length - known.sum(-1, dtype=jnp.int32)

    def gumbel(key, position):
        return jax.random.gumbel(jax.random.fold_in(key, position), (values,), jnp.float32, mode="high")

    def call(codes, index):
        start, stop = index * unknown // calls, (index + 1) * unknown // calls
        place = start[:, None] + jnp.arange(share)[None]
        chosen = jnp.take_along_axis(queue, jnp.minimum(place, length - 1), -1)
        logits = jnp.take_along_axis(logits_fn(codes), chosen[..., None], 1).astype(jnp.float32)
        noise = jax.vmap(jax.vmap(gumbel, (None, 0)))(value_keys, chosen)
        drawn = jnp.argmax(logits + temperature * noise, -1).astype(codes.dtype)
        chosen = jnp.where(place < stop[:, None], chosen, length)  # out of range, hence dropped
        return jax.vmap(lambda row, where, what: row.at[where].set(what, mode="drop"))(codes, chosen, drawn), None

    start = jnp.where(known, prompt, values).astype(jnp.int32)
    codes, _ = jax.lax.scan(call, start, jnp.arange(calls))
    return codes
