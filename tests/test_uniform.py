"""Uniform diffusion of codes: the score entropy against exact likelihoods, noise, and its sampler.

What its sampler draws is compared with a joint distribution in test_code_samplers.py.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumerated import CODES, LENGTH, VALUES, joint

from dlc_jax.diffusion.code_sampler import CodeSampler
from dlc_jax.diffusion.noise import Noise
from dlc_jax.diffusion.uniform import Uniform

P = joint(floor=0.1)
SHAPE = (VALUES,) * LENGTH


def reached(share):
    """Chance of each noisy code [27, 1] from each code [1, 27]."""
    same = (CODES[:, None] == CODES[None]).sum(-1)
    return (1 - share + share / VALUES) ** same * (share / VALUES) ** (LENGTH - same)


def log_ratios(p):
    """Log-ratios of the chances p of all codes and those that differ at one position."""
    found = np.zeros((len(CODES), LENGTH, VALUES))
    for position in range(LENGTH):
        for value in range(VALUES):
            other = CODES.copy()
            other[:, position] = value
            found[:, position, value] = np.log(p[np.ravel_multi_index(other.T, SHAPE)] / p)
    return found


def expected(process, code, shift=0.0):
    """The mean of the bound over t (Gauss-Legendre) and every noisy code, by its chance."""
    nodes, weights = np.polynomial.legendre.leggauss(64)
    total, bound = 0.0, jax.jit(lambda *of: process.bound(*of, values=VALUES))
    for t, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        chance = reached(process.noise.hidden(t, np))
        outputs = jnp.asarray(log_ratios(chance @ P) + shift, jnp.float32)
        codes = jnp.tile(jnp.asarray(CODES[code]), (len(CODES), 1))
        nats = bound(outputs, codes, jnp.asarray(CODES), jnp.full(len(CODES), t, jnp.float32))
        total += weight * (chance[:, code] * np.asarray(nats, np.float64)).sum()
    return total


@pytest.mark.parametrize(("smallest", "largest"), [(1e-4, 20.0), (1e-3, 10.0)])
def test_bound_of_the_exact_scores_is_the_likelihood(smallest, largest):
    """But for what happens below the smallest noise."""
    process = Uniform(noise=Noise(schedule="geometric", smallest=smallest, largest=largest))
    for code in (0, 7, 25):
        missing = -math.log(P[code]) - expected(process, code)
        assert 0 < missing < 40 * smallest
    assert expected(process, 7, shift=0.3) > expected(process, 7) + 0.05


def test_a_value_is_replaced_by_any_value():
    b, share = 4000, 0.3
    process = Uniform(noise=Noise(schedule="log_linear", eps=1e-6))
    codes = jnp.ones((b, 8), jnp.int32)
    keys, t = jax.random.split(jax.random.key(0), b), jnp.full(b, share)
    noisy = process.corrupt(codes, t, keys, values=4)
    wanted = np.full(4, share / 4) + (1 - share) * (np.arange(4) == 1)
    np.testing.assert_allclose(
        np.bincount(noisy.ravel(), minlength=4) / noisy.size, wanted, atol=0.01
    )
    few = process.corrupt(codes[5:8], t[5:8], keys[5:8], values=4)
    np.testing.assert_array_equal(few, noisy[5:8])


@pytest.mark.parametrize("method", ["ancestral", "euler"])
def test_draws_start_from_random_values_and_keep_what_is_known(method):
    seen, known = [], np.tile(np.arange(400) % 2 == 0, (3, 1))
    known[0] = True

    def predict(noisy, share):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), noisy, ordered=True)
        return jnp.zeros((*noisy.shape, 4))

    @jax.jit
    def draw(keys):
        prompt = jnp.full(known.shape, 1, jnp.int32)
        how = {"prompt": prompt, "known": jnp.asarray(known)}
        return CodeSampler(method=method, calls=3).draw(Uniform(), predict, keys, 400, 4, **how)

    codes, calls = draw(jax.random.split(jax.random.key(0), 3))
    jax.effects_barrier()
    for state in [*seen, np.asarray(codes)]:
        assert (state[known] == 1).all() and (0 <= state).all() and (state < 4).all()
    shares = np.bincount(seen[0][~known], minlength=4) / (~known).sum()
    np.testing.assert_allclose(shares, 0.25, atol=0.1)
    assert (seen[0][1] != seen[0][2]).any()
    assert len(seen) == 3 and calls.tolist() == [0, 3, 3]


@pytest.mark.parametrize("calls", [1, 3])
def test_one_position_is_drawn_exactly_in_any_number_of_calls(calls):
    """The analytic sampler errs only in what positions tell each other within a step."""
    p, count = np.array([0.6, 0.3, 0.08, 0.02]), 100_000
    process = Uniform(noise=Noise(schedule="geometric", smallest=1e-3, largest=10.0))

    def predict(noisy, share):
        reached = (1 - share[:, None]) * p + share[:, None] / 4
        log_p = jnp.log(reached)
        return (log_p - jnp.take_along_axis(log_p, noisy, -1))[:, None]

    sampler = CodeSampler(method="ancestral", calls=calls)
    keys = jax.random.split(jax.random.key(0), count)
    codes = jax.jit(lambda keys: sampler.draw(process, predict, keys, 1, 4).codes)(keys)
    found = np.bincount(np.asarray(codes).ravel(), minlength=4) / count
    assert (np.abs(found - p) < 4 * np.sqrt(p * (1 - p) / count)).all()


@pytest.mark.parametrize("method", ["ancestral", "euler"])
def test_a_step_changes_as_many_as_its_noise_says(method):
    """Of codes that know nothing: Euler goes by the rate of the step's start."""
    noise = Noise(schedule="geometric", smallest=0.1, largest=0.5)
    states = []

    def predict(noisy, share):
        jax.debug.callback(lambda x: states.append(np.asarray(x)), noisy, ordered=True)
        return jnp.zeros((*noisy.shape, 4))

    sampler, process = CodeSampler(method=method, calls=3), Uniform(noise=noise)
    keys = jax.random.split(jax.random.key(0), 4)
    jax.jit(lambda keys: sampler.draw(process, predict, keys, 10_000, 4))(keys)
    jax.effects_barrier()
    moved = [(after != before).mean() for before, after in itertools.pairwise(states)]
    times = np.array([1, 2 / 3, 1 / 3])
    less = noise.sigma(times[:-1], np) - noise.sigma(times[1:], np)
    wanted = 1 - np.exp(-less) if method == "ancestral" else noise.rate(times[:-1], np) / 3
    np.testing.assert_allclose(moved, 0.75 * wanted, atol=0.01)
