"""The two-sample test by a classifier: can a network tell drawn codes from real ones?

It learns from one half of either set, and is judged on the other half by the area under its ROC
curve: the chance that a real code scores above a drawn one, 0.5 where it can tell nothing. Source:
Lopez-Paz and Oquab (arXiv 1610.06545).

The network is a factorization machine (Rendle, 2010). A row of a table [l, v, d] stands for a value
at a position, and all pairs of a code's rows are multiplied:

    logit = bias + sum_i w[i, c_i] + sum_{i < j} sum_k s_k E[i, c_i, k] E[j, c_j, k],   s_k = ±1

So it sees what single positions and pairs of positions say, which is where independent draws of
several positions go wrong, and needs fewer codes for it than a network that has to find products.
In training half of a code's positions are left out at random, since there are many more rows than
codes to learn them from.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats

WIDTH = 64  # d of the table
STEPS, BATCH, RATE = 400, 256, 3e-3
DROP = 0.5  # share of the positions that are left out in training


def auc(drawn: np.ndarray, real: np.ndarray, *, values: int, seed: int = 0) -> tuple[float, float]:
    """(area under the curve, its standard error) of a classifier that learns to tell them apart.

    The error is of the codes it is judged on; another half to learn from would move the area too.

    Args:
      drawn, real: int [n, l] and int [m, l], each in 0..values-1, four or more of each.
      values: V.
      seed: of the halves, the first table and the batches.

    Raises:
      ValueError: fewer codes.
    """
    if min(len(drawn), len(real)) < 4:
        raise ValueError(f"{len(drawn)} and {len(real)} codes cannot be halved into pairs")
    random = np.random.default_rng(seed)
    halves = [np.array_split(codes[random.permutation(len(codes))], 2) for codes in (drawn, real)]
    learned = np.concatenate([half for half, _ in halves]).astype(np.int32)
    labels = np.repeat(np.float32([0, 1]), [len(half) for half, _ in halves])
    params = _trained(jnp.asarray(learned), labels, jax.random.key(seed), values=values)
    return area(*(_scores(params, half.astype(np.int32)) for _, half in halves))


def area(low: np.ndarray, high: np.ndarray) -> tuple[float, float]:
    """(chance that one of `high` is above one of `low`, its standard error); ties count half.

    Args:
      low, high: scores, float [n] and float [m], two or more of each.

    Source of the error: DeLong, DeLong and Clarke-Pearson (1988).
    """
    rank = stats.rankdata(np.concatenate([low, high]))
    # of each score, the share of the other set on the right side of it
    above = 1 - (rank[: len(low)] - stats.rankdata(low)) / len(high)
    below = (rank[len(low) :] - stats.rankdata(high)) / len(low)
    variance = above.var(ddof=1) / len(low) + below.var(ddof=1) / len(high)
    return float(below.mean()), float(np.sqrt(variance))


def _scores(params, codes):
    """`_logits` of many codes, a thousand at a time: of each there are l rows of the table."""
    score, starts = jax.jit(_logits), range(0, len(codes), 1000)
    return np.concatenate([np.asarray(score(params, codes[i : i + 1000])) for i in starts])


def _logits(params, codes, keep=1.0):
    """Real or not, float [b], of codes int [b, l]; `keep` weighs positions."""
    place = jnp.arange(codes.shape[1])
    rows = params["table"][place, codes] * jnp.expand_dims(keep, -1)
    single = (params["weight"][place, codes] * keep).sum(-1)
    pairs = jnp.square(rows.sum(1)) - jnp.square(rows).sum(1)  # twice the sum over i < j
    sign = jnp.where(jnp.arange(WIDTH) % 2, 1.0, -1.0)
    return params["bias"] + single + pairs @ sign / 2


@functools.partial(jax.jit, static_argnames="values")
def _trained(codes, labels, key, *, values):
    start, run = jax.random.split(key)
    shape = (codes.shape[1], values)
    params = {
        "table": 0.03 * jax.random.normal(start, (*shape, WIDTH)),
        "weight": jnp.zeros(shape),
        "bias": jnp.zeros(()),
    }
    adam = optax.adam(optax.cosine_decay_schedule(RATE, STEPS))

    def loss(params, rows, key):
        keep = jax.random.bernoulli(key, 1 - DROP, (BATCH, codes.shape[1])) / (1 - DROP)
        logits = _logits(params, codes[rows], keep)
        return optax.sigmoid_binary_cross_entropy(logits, labels[rows]).mean()

    def step(carry, key):
        params, state = carry
        choice, drop = jax.random.split(key)
        rows = jax.random.randint(choice, (BATCH,), 0, len(codes))
        updates, state = adam.update(jax.grad(loss)(params, rows, drop), state)
        return (optax.apply_updates(params, updates), state), None

    carry = (params, adam.init(params))
    return jax.lax.scan(step, carry, jax.random.split(run, STEPS))[0][0]
