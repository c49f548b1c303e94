"""Codes from random values, by replacing them step by step: the samplers of uniform diffusion."""

import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax.diffusion import schedules
from dlc_jax.diffusion.chain import Chain, Drawn, drawn, folded

FIRST = 1 << 29  # number of the draw that a chain starts with


def replace(chain: Chain, *, analytic: bool) -> Drawn:
    """Steps down the schedule; each position keeps its value or changes to another.

    Whether it changes is drawn first, then to what. Source: SEDD (arXiv 2310.16834), the analytic
    (Tweedie) sampler and Euler's, on the uniform graph.
    """
    times = schedules.grid(chain.sampler.times, chain.calls)
    sigma = chain.process.noise.sigma(times, np)
    sigma[-1] = 0  # what a schedule leaves at t=0 is mended in the last step
    v = chain.values
    alone = jax.vmap(lambda key: jax.random.randint(key, (chain.length,), 0, v, jnp.int32))
    start = jnp.where(chain.open, alone(folded(chain.value, FIRST)), chain.start)

    def step(codes, row):
        index, total, less = row
        outputs = chain.predict(codes, jnp.full(len(codes), -jnp.expm1(-total)))
        s = jnp.exp(chain.process.scores(outputs, codes, values=v))
        own = jax.nn.one_hot(codes, v, dtype=bool)
        if analytic:
            s = jnp.exp(less) * s - jnp.expm1(less) / v * s.sum(-1, keepdims=True)
            p = s * (-jnp.expm1(-less) / v + own * jnp.exp(-less))
        else:
            others = less / v * jnp.where(own, 0, s)
            p = jnp.where(own, 1 - others.sum(-1, keepdims=True), others)
        p = jnp.maximum(p, 0)
        stay = jnp.where(own, p, 0).sum(-1)
        others = jnp.where(own, 0, p)
        change = others.sum(-1)
        moves = chain.open & (chain.uniform(index) * (stay + change) < change)
        values = drawn(jnp.log(others), folded(chain.value, index))
        return jnp.where(moves, values, codes), None

    less = sigma[:-1] - sigma[1:]
    if not analytic:  # the rate of the step's start, all along it
        less = (times[:-1] - times[1:]) * chain.process.noise.rate(times[:-1], np)
    rows = np.arange(chain.calls), sigma[:-1], less
    rows = (jnp.asarray(rows[0]), *(jnp.asarray(each, jnp.float32) for each in rows[1:]))
    codes, _ = jax.lax.scan(step, start, rows)
    calls = jnp.where(chain.open.any(-1), chain.calls, 0).astype(jnp.int32)
    return Drawn(codes, calls)
