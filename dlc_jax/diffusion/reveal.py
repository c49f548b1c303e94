"""Codes from the mask by revealing positions for good: in a random order, or the surest first.

Methods (chain) -> Drawn of `code_sampler`. Each chooses positions and draws their values apart.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax.diffusion import schedules
from dlc_jax.diffusion.chain import Chain, Drawn
from dlc_jax.typing import Array, Float, Int


def first_hitting(chain: Chain) -> Drawn:
    """An equal share of the positions a call, in random order; one position a call is exact.

    When positions are revealed does not depend on values, so the moments of the continuous process
    can be drawn apart: the network is called at those alone. Source: arXiv 2409.02908.
    """
    moment = jnp.where(chain.open, 1 - chain.uniform(), -1.0)  # share hidden when it is revealed
    rank = jnp.argsort(jnp.argsort(-moment, -1), -1)
    count = jnp.maximum(chain.open.sum(-1, keepdims=True), 1)
    calls = jnp.minimum(chain.calls, count)
    turn = ((rank + 1) * calls - 1) // count
    return _in_turns(chain, turn, moment, min(chain.calls, chain.length))


def ancestral(chain: Chain) -> Drawn:
    """`calls` steps down the schedule, in each of which every position is revealed by chance.

    It is SEDD's analytic sampler too. A normalized network is called only in steps that reveal
    something: the chances do not depend on it. Sources: MDLM, SEDD (Tweedie).
    """
    levels = _levels(chain)
    chances = (levels[:-1] - levels[1:]) / levels[:-1]
    return _by_chance(chain, levels, chances)


def euler(chain: Chain) -> Drawn:
    """As `ancestral`, with the rate of each step's start all along it. Source: SEDD."""
    times = schedules.grid(chain.sampler.times, chain.calls)
    chances = (times[:-1] - times[1:]) * chain.process.noise.weight(times[:-1], np)
    return _by_chance(chain, _levels(chain), np.minimum(chances, 1))


def maskgit(chain: Chain) -> Drawn:
    """The surest draws first, ever more a call, by their log chance and falling Gumbel noise.

    Source: MaskGIT (arXiv 2202.04200): a cosine of the positions stays hidden.
    """

    def left(count, index, calls):
        share = jnp.cos(jnp.pi / 2 * (index + 1) / calls)
        return jnp.floor(count * share).astype(jnp.int32)

    def score(log_p, index, calls):
        noise = -jnp.log(-jnp.log(jnp.clip(chain.uniform(index), 1e-7, 1 - 1e-7)))
        return log_p + chain.sampler.choice * (1 - (index + 1) / calls) * noise

    return _surest(chain, left, score)


def low_confidence(chain: Chain) -> Drawn:
    """The likeliest draws first, as many in every call. Source: LLaDA (arXiv 2502.09992)."""

    def left(count, index, calls):
        return count - (index + 1) * (count // calls) - jnp.minimum(index + 1, count % calls)

    return _surest(chain, left, lambda log_p, *_: log_p)


def entropy(chain: Chain) -> Drawn:
    """As many positions a call as are nearly certain together: sure codes need few calls.

    Positions in rising order of their entropy are drawn while the entropies of those before sum to
    `entropy_bound` nats at most; never so few that `calls` would not do. Source: the entropy-bound
    sampler (arXiv 2505.24857).
    """

    def step(codes, index):
        hidden = codes == chain.values
        count = hidden.sum(-1, keepdims=True)
        log_p = chain.belief(codes, count[:, 0] / chain.length).log_p
        each = -(jnp.exp(log_p) * jnp.maximum(log_p, -1e4)).sum(-1)
        each = jnp.where(hidden, each, jnp.inf)
        order = jnp.argsort(each, -1)
        rising = jnp.take_along_axis(each, order, -1)
        before = jnp.cumsum(rising, -1) - rising
        rank = jnp.argsort(order, -1)
        free = jnp.take_along_axis(before <= chain.sampler.entropy_bound, rank, -1)
        due = -(-count // (calls - index))  # ceil
        chosen = hidden & (free | (rank < due))
        return jnp.where(chosen, chain.draw(log_p), codes)

    calls = min(chain.calls, chain.length)
    return _while_hidden(chain, step, calls)


def _levels(chain: Chain) -> np.ndarray:
    """Share of noise before each step, and 0 after the last; float64."""
    times = schedules.grid(chain.sampler.times, chain.calls)
    levels = chain.process.noise.hidden(times, np)
    levels[-1] = 0  # what a schedule still hides at t=0 is drawn in the last step
    return levels


def _by_chance(chain: Chain, levels: np.ndarray, chances: np.ndarray) -> Drawn:
    """Reveals every hidden position with the chance of each step."""
    chances[-1] = 1
    if chain.process.objective == "score":
        return _step_by_step(chain, levels, chances)
    # A position's step is where its own draw falls among the chances to be hidden still.
    hidden = jnp.asarray(np.cumprod(1 - chances)[:-1][::-1], jnp.float32)
    turn = len(hidden) - jnp.searchsorted(hidden, 1 - chain.uniform())
    before = jnp.asarray(levels, jnp.float32)[turn]
    return _in_turns(chain, turn, before, min(chain.calls, chain.length))


def _step_by_step(chain: Chain, levels: np.ndarray, chances: np.ndarray) -> Drawn:
    """The same where the chance to be revealed is the network's mass times that of the step."""

    def step(codes, index):
        log_p, mass = chain.belief(codes, chain.told(level[index]))
        chosen = chain.uniform(index) < chance[index] * jnp.exp(mass)
        chosen |= index == len(chances) - 1
        return jnp.where(chosen & (codes == chain.values), chain.draw(log_p), codes)

    level, chance = (jnp.asarray(each, jnp.float32) for each in (levels, chances))
    return _while_hidden(chain, step, len(chances))


def _in_turns(
    chain: Chain, turn: Int[Array, "b l"], level: Float[Array, "b l"], most: int
) -> Drawn:
    """Reveals open positions in the order of their turns, one turn a call.

    Args:
      turn: any integers; those that no open position has cost no call.
      level: share of noise that the network is told, the largest of a turn's.
      most: turns of a code.
    """
    turn = jnp.where(chain.open, turn, jnp.iinfo(jnp.int32).max)
    order = jnp.argsort(turn, -1)
    rising = jnp.take_along_axis(turn, order, -1)
    dense = jnp.cumsum(jnp.diff(rising, axis=-1, prepend=rising[:, :1]) > 0, -1)
    dense = jnp.take_along_axis(dense, jnp.argsort(order, -1), -1)

    def step(codes, index):
        now = chain.open & (dense == index)
        told = chain.told(jnp.where(now, level, 0).max(-1))
        return jnp.where(now, chain.draw(chain.belief(codes, told).log_p), codes)

    return _while_hidden(chain, step, most)


def _surest(chain: Chain, left, score) -> Drawn:
    """Draws a value everywhere and keeps the best, call by call.

    Args:
      left: (open positions [b, 1], index, calls [b, 1]) -> how many stay hidden after a call.
      score: (log chance of what was drawn [b, l], index, calls) -> the largest are kept.
    """
    count = chain.open.sum(-1, keepdims=True)
    calls = jnp.clip(count, 1, chain.calls)

    def step(codes, index):
        hidden = codes == chain.values
        now = hidden.sum(-1, keepdims=True)
        log_p = chain.belief(codes, now[:, 0] / chain.length).log_p
        values = chain.draw(log_p, index)
        chance = jnp.take_along_axis(log_p, values[..., None], -1)[..., 0]
        best = jnp.where(hidden, score(chance, index, calls), -jnp.inf)
        rank = jnp.argsort(jnp.argsort(-best, -1), -1)
        stay = jnp.where(index + 1 < calls, left(count, index, calls), 0)
        kept = now - jnp.clip(stay, 0, now - 1)  # one at least
        return jnp.where(hidden & (rank < kept), values, codes)

    return _while_hidden(chain, step, min(chain.calls, chain.length))


def _while_hidden(chain: Chain, step, most: int) -> Drawn:
    """Runs `step`, (codes, index) -> codes, up to `most` times while anything is hidden."""

    def call(carry, index):
        codes, calls = carry
        before = (codes == chain.values).any(-1)

        def go(codes):
            new = step(codes, index)
            return jnp.where(before[:, None], new, codes), (new != codes).any(-1)

        def stay(codes):
            return codes, jnp.zeros(len(codes), bool)

        codes, moved = jax.lax.cond(before.any(), go, stay, codes)
        needed = before if chain.process.objective == "score" else moved
        return (codes, calls + needed), None

    start = chain.start, jnp.zeros(len(chain.start), jnp.int32)
    (codes, calls), _ = jax.lax.scan(call, start, jnp.arange(most))
    return Drawn(codes, calls)
