"""One draw of codes from a masked process: what all its methods share."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dlc_jax.diffusion.masked import Belief
from dlc_jax.typing import Array, Bool, Float, Int, Key

FRESH = 1 << 30  # calls' numbers beyond positions': values that are drawn again and again


class Drawn(NamedTuple):
    """Codes int32 [b, l], and how often the network was needed for each, int32 [b]."""

    codes: Int[Array, "b l"]
    calls: Int[Array, "b"]


@dataclasses.dataclass(frozen=True)
class Chain:
    """What a method is given.

    Attributes:
      process: that the network learned.
      predict: (noisy [b, l], share of noise [b]) -> the network's outputs.
      sampler: the fields of a `CodeSampler`.
      values: V; the mask is V.
      start: codes at the beginning; the mask where they are to be drawn.
      order: keys of which positions, [b].
      value: keys of which values, [b].
    """

    process: Any
    predict: Callable
    sampler: Any
    values: int
    start: Int[Array, "b l"]
    order: Key[Array, "b"]
    value: Key[Array, "b"]

    @property
    def length(self) -> int:
        return self.start.shape[1]

    @property
    def calls(self) -> int:
        """At most so many of the network."""
        return self.sampler.calls or self.length

    @property
    def open(self) -> Bool[Array, "b l"]:
        """Positions that are drawn; the others stay."""
        return self.start == self.values

    def told(self, level: Float[Array, "b"] | Float[Array, ""]) -> Float[Array, "b"]:
        """The share of a code that is noise where that of its open positions is `level`."""
        return level * self.open.mean(-1)

    def belief(self, noisy: Array, hidden: Float[Array, "b"]) -> Belief:
        """Of the network, at its temperature and within its nucleus."""
        found = self.process.belief(self.predict(noisy, hidden), values=self.values)
        return found._replace(log_p=sharpened(found.log_p, self.sampler))

    def uniform(self, number: Int[Array, ""] | None = None) -> Float[Array, "b l"]:
        """Draws for positions; others for each number of a call."""
        keys = self.order if number is None else folded(self.order, number)
        return jax.vmap(lambda key: jax.random.uniform(key, (self.length,)))(keys)

    def draw(
        self, log_p: Float[Array, "b l v"], number: Int[Array, ""] | None = None
    ) -> Int[Array, "b l"]:
        """A value for every position.

        Args:
          number: of the call, for positions that are drawn more than once. Without it a position's
            noise is the same in every call.
        """
        keys = self.value if number is None else folded(self.value, FRESH + number)
        return drawn(log_p, keys, greedy=self.sampler.temperature == 0)


def folded(keys: Key[Array, "b"], number) -> Key[Array, "b"]:
    """Other keys, by a number."""
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def drawn(
    log_p: Float[Array, "b l v"], keys: Key[Array, "b"], *, greedy: bool = False
) -> Int[Array, "b l"]:
    """A value for every position, int32, by chances exp(log_p); greedy takes the likeliest.

    A joint draw over values and "stay hidden" would lose rare values to the rounding of float32,
    and so would Gumbel noise of the common range: hence one draw over values alone, and
    mode="high". Source: arXiv 2409.02908.
    """
    if greedy:
        return jnp.argmax(log_p, -1).astype(jnp.int32)
    values = log_p.shape[-1]

    def noise(key, position):
        key = jax.random.fold_in(key, position)
        return jax.random.gumbel(key, (values,), jnp.float32, mode="high")

    positions = jnp.arange(log_p.shape[1])
    noise = jax.vmap(jax.vmap(noise, (None, 0)), (0, None))(keys, positions)
    return jnp.argmax(log_p + noise, -1).astype(jnp.int32)


def sharpened(log_p: Float[Array, "b l v"], sampler) -> Float[Array, "b l v"]:
    """Log chances at a temperature, of the likeliest values that together have `nucleus`."""
    if sampler.temperature not in (0, 1):
        log_p = jax.nn.log_softmax(log_p / sampler.temperature)
    if sampler.nucleus == 1:
        return log_p
    falling = jnp.sort(jnp.exp(log_p), descending=True)
    before = jnp.cumsum(falling, -1) - falling  # the chance of all that are likelier
    least = jnp.where(before < sampler.nucleus, falling, jnp.inf).min(-1, keepdims=True)
    return jax.nn.log_softmax(jnp.where(jnp.exp(log_p) >= least, log_p, -jnp.inf))
