"""Codes from Gaussian noise, in steps up to the code: the samplers of `Flow`."""

import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax.diffusion import schedules
from dlc_jax.diffusion.chain import Chain, Drawn, folded
from dlc_jax.diffusion.flow import wrong


def euler(chain: Chain) -> Drawn:
    """Euler's steps of the flow: all chance is in the noise at the start and in the last values.

    y goes on by what the gain rises times the mean that the network says. The last call's chances
    are what values are drawn from. Source: FMLM (arXiv 2602.16813).
    """
    share, gain = _grid(chain)

    def step(y, row):
        share, gain, more = row
        log_p = _said(chain, chain.process.seen(y, gain), share)
        return y + more * jnp.exp(log_p), None

    start = _normal(chain, chain.order)
    rows = (share[:-2], gain[:-2], np.diff(gain)[:-1])
    y, _ = jax.lax.scan(step, start, tuple(jnp.asarray(row, jnp.float32) for row in rows))
    log_p = _said(chain, chain.process.seen(y, gain[-2]), share[-2])
    return Drawn(chain.draw(log_p), _calls(chain))


def ancestral(chain: Chain) -> Drawn:
    """Steps that draw values, and what noise leaves of them: exact in the limit of many.

    z = g y gains (the rise of g^2) onehot(value) and noise of that variance. Source: Bayesian flow
    networks (arXiv 2308.07037).
    """
    share, gain = _grid(chain)

    def step(z, row):
        index, share, more = row
        log_p = _said(chain, jax.nn.softmax(z), share)
        value = jax.nn.one_hot(chain.draw(log_p, index), chain.values)
        return z + more * value + jnp.sqrt(more) * _normal(chain, folded(chain.order, index)), None

    start = jnp.zeros((*chain.start.shape, chain.values))
    rows = (share[:-2], np.diff(np.square(gain))[:-1])
    rows = (jnp.arange(chain.calls - 1), *(jnp.asarray(row, jnp.float32) for row in rows))
    z, _ = jax.lax.scan(step, start, rows)
    log_p = _said(chain, jax.nn.softmax(z), share[-2])
    return Drawn(chain.draw(log_p), _calls(chain))


def _grid(chain):
    """(share that is wrong, gain) at the ends of the steps, float64 [calls + 1]."""
    share = chain.process.noise.hidden(schedules.grid(chain.sampler.times, chain.calls), np)
    return share, np.interp(share, *wrong(chain.values))


def _said(chain, soft, share):
    return chain.belief(soft, jnp.full(len(soft), share, jnp.float32)).log_p


def _normal(chain, keys):
    shape = (chain.length, chain.values)
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def _calls(chain):
    return jnp.full(len(chain.start), chain.calls, jnp.int32)
