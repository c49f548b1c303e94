"""Flow on one-hots: codes in Gaussian noise, learned back. What a network reads are soft codes.

    y = g onehot(code) + noise        g = 0 is noise alone, and the code where g is large
    dy/dg = mean of onehot(code) given y, all that a network has to say

Of a position alone the noise leaves softmax(g y), a point of the simplex; that is what the network
reads, at all positions, and it answers with another. The gain g is such that the share of positions
whose largest entry is a wrong one is that of the schedule: what a time is worth is then the same
for all V. Sources: FMLM (arXiv 2602.16813), its states and times; Bayesian flow networks (arXiv
2308.07037), what is read.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike

from dlc_jax.diffusion.masked import Belief
from dlc_jax.diffusion.noise import Noise
from dlc_jax.typing import Array, Float, Int, Key

LARGEST = 9  # gain, at which one position in a million is wrong where V=4096
KNOTS = 128  # places in a unit of the gain where that share is computed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flow:
    """The process; it is learned by cross-entropy, all times weighted alike.

    Attributes:
      noise: what share of positions is wrong at a time, beyond those that are right by chance.
    """

    noise: Noise = Noise()

    def gain(self, t: Float[Array, "b"], *, values: int) -> Float[Array, "b"]:
        """g at t, from 0 at t=1."""
        shares, gains = wrong(values)
        return jnp.interp(self.noise.hidden(t), shares, gains)

    def noisy(
        self, codes: Int[Array, "b l"], t: Float[Array, "b"], keys: Key[Array, "b"], *, values: int
    ) -> Float[Array, "b l v"]:
        """y of codes at t."""
        shape = (*codes.shape[1:], values)
        noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
        gain = self.gain(t, values=values)[:, None, None]
        return gain * jax.nn.one_hot(codes, values) + noise

    def seen(self, y: Float[Array, "b l v"], gain: ArrayLike) -> Float[Array, "b l v"]:
        """What the network reads of y at gains [b] or one for all: each position's posterior."""
        return jax.nn.softmax(jnp.reshape(gain, (-1, 1, 1)) * y)

    def corrupt(
        self, codes: Int[Array, "b l"], t: Float[Array, "b"], keys: Key[Array, "b"], *, values: int
    ) -> Float[Array, "b l v"]:
        """Noisy codes as the network reads them."""
        y = self.noisy(codes, t, keys, values=values)
        return self.seen(y, self.gain(t, values=values))

    def belief(self, outputs: Float[Array, "b l _"], *, values: int) -> Belief:
        """Of a network's outputs; those beyond `values` are not read."""
        return Belief(jax.nn.log_softmax(outputs[..., :values].astype(jnp.float32)), None)

    def loss(
        self,
        outputs: Float[Array, "b l _"],
        codes: Int[Array, "b l"],
        noisy: Float[Array, "b l v"],
        t: Float[Array, "b"],
        *,
        values: int,
    ) -> Float[Array, "b"]:
        """Cross-entropy of all positions, nats per example. Source: FMLM."""
        log_p = self.belief(outputs, values=values).log_p
        return -jnp.take_along_axis(log_p, codes[..., None], -1).sum((1, 2))

    def bound(
        self,
        outputs: Float[Array, "b l _"],
        codes: Int[Array, "b l"],
        noisy: Float[Array, "b l v"],
        t: Float[Array, "b"],
        *,
        values: int,
    ) -> Float[Array, "b"]:
        """Nats per example whose mean over t ~ U(0, 1) and noise is at least -log p(codes).

        g g'(t) times the squared error of the mean, summed: half the error by the signal-to-noise
        ratio g^2, of which the exact mean makes -log p itself. But for what is wrong at the largest
        gain. It is loose until nearly clean codes are known: guessing evenly costs nearly
        LARGEST^2 / 2 nats a position. Sources: Guo, Shamai and Verdú 2005; VDM (arXiv 2107.00630).
        """
        mean = jnp.exp(self.belief(outputs, values=values).log_p)
        error = jnp.square(mean - jax.nn.one_hot(codes, values)).sum((1, 2))
        of = functools.partial(self.gain, values=values)
        gain, slope = jax.jvp(of, (t,), (jnp.ones_like(t),))
        return -gain * slope * error


@functools.lru_cache(maxsize=16)
def wrong(values: int) -> tuple[np.ndarray, np.ndarray]:
    """(share of positions, gain) as the curve of one over the other, shares rising from 0 to 1.

    The share whose largest entry is not the code's, over what it is where the gain is 0.
    """
    every, reach = 4, 10  # the noise of the code's own entry is summed from -10 to 10
    x = np.arange(-reach * KNOTS, (reach + LARGEST) * KNOTS + 1) / KNOTS
    log_below = np.array([_log_chance_below(each) for each in x])
    noise = np.arange(0, 2 * reach * KNOTS + 1, every)
    density = np.exp(-np.square(x[noise]) / 2) / np.sqrt(2 * np.pi) * every / KNOTS
    steps = np.arange(LARGEST * KNOTS, -1, -1)
    right = np.exp((values - 1) * log_below[noise + steps[:, None]]) @ density
    gains, shares = steps / KNOTS, (1 - right) * values / (values - 1)
    shares[0], shares[-1] = 0, 1
    return shares.astype(np.float32), gains.astype(np.float32)


def _log_chance_below(x: float) -> float:
    """Of a normal number to be below x."""
    tail = math.erfc(abs(x) / math.sqrt(2)) / 2
    return math.log1p(-tail) if x > 0 else math.log(tail)
