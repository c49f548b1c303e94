"""DDPM against its equations in NumPy's float64: tables, respacing, posterior, bound, loss."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from dlc_jax.diffusion.ddpm import DDPM
from dlc_jax.diffusion.process import Prediction, posterior
from dlc_jax.errors import UserError

BETA = 1e-4 + (0.02 - 1e-4) * np.arange(1000) / 999
ALPHA_BAR = np.cumprod(1 - BETA)


def test_the_path_is_that_of_linear_betas():
    t = (jnp.arange(1000) + 1) / 1000
    alpha, sigma = DDPM().path(t)
    np.testing.assert_allclose(alpha, np.sqrt(ALPHA_BAR), rtol=2e-7)
    np.testing.assert_allclose(sigma, np.sqrt(1 - ALPHA_BAR), rtol=2e-7)
    x, seen = DDPM().inputs(t, t)
    np.testing.assert_array_equal(x, t)
    np.testing.assert_allclose(1000 * seen, np.arange(1000), atol=1e-4)
    short = DDPM(steps=10, beta_first=0.1, beta_last=0.3).path(jnp.float32(0.2))
    np.testing.assert_allclose(short[0], math.sqrt(0.9 * (0.9 - 0.2 / 9)), rtol=1e-6)


def test_all_steps_are_trained_on_equally():
    t = np.asarray(DDPM().times((jnp.arange(3000) + 0.5) / 3000, 1), np.float64)
    number, count = np.unique(np.round(t * 1000).astype(int) - 1, return_counts=True)
    np.testing.assert_array_equal(number, np.arange(1000))
    assert (count == 3).all()


def steps_of(grid):
    return np.round(np.asarray(grid, np.float64) * 1000).astype(int)[:-1][::-1] - 1


@pytest.mark.parametrize("count", [250, 256])
def test_respaced_steps_are_evenly_spread_and_rounded(count):
    expected = [round(i * 999 / (count - 1)) for i in range(count)]  # Python's, exact fractions
    np.testing.assert_array_equal(steps_of(DDPM().grid("uniform", count, 1)), expected)
    assert expected[0] == 0 and expected[-1] == 999 and len(set(expected)) == count


def test_all_steps_and_one():
    np.testing.assert_array_equal(steps_of(DDPM().grid("uniform", 1000, 1)), np.arange(1000))
    np.testing.assert_array_equal(steps_of(DDPM().grid("uniform", 1, 1)), [999])


@pytest.mark.parametrize(("spacing", "steps"), [("uniform", 1001), ("cosine", 250)])
def test_no_step_is_taken_twice(spacing, steps):
    with pytest.raises(UserError, match=f"{steps} steps.*1000"):
        DDPM().grid(spacing, steps, 1)


def test_there_is_no_time_between_the_steps():
    with pytest.raises(UserError, match="churn"):
        DDPM().raised(jnp.float32(0.5), 1.1)


@pytest.mark.parametrize("count", [250, 256, 1000])
def test_a_respaced_posterior_is_that_of_the_respaced_betas(count):
    process = DDPM()
    grid = process.grid("uniform", count, 1)
    bar = np.append(1, ALPHA_BAR[steps_of(grid)])  # from data to noise
    beta = 1 - bar[1:] / bar[:-1]
    rng = np.random.default_rng(0)
    x0, noise = rng.normal(size=(2, count))
    x_t = np.sqrt(bar[1:]) * x0 + np.sqrt(1 - bar[1:]) * noise
    mean = np.sqrt(bar[:-1]) * beta / (1 - bar[1:]) * x0
    mean += np.sqrt(1 - beta) * (1 - bar[:-1]) / (1 - bar[1:]) * x_t
    lower = beta * (1 - bar[:-1]) / (1 - bar[1:])

    given = [jnp.asarray(each, jnp.float32) for each in (x0, noise)]
    t, s = grid[:-1][::-1], grid[1:][::-1]
    found, variance = posterior(process, Prediction(*given), t, s)
    np.testing.assert_allclose(found, mean, atol=2e-6)
    np.testing.assert_allclose(variance, lower, rtol=1e-4, atol=1e-12)
    for mix in (0.0, 0.3, 1.0, 1.2):  # a network's output is not bounded
        prediction = Prediction(*given, jnp.full((count,), mix))
        _, variance = posterior(process, prediction, t, s)
        expected = np.exp(mix * np.log(beta[1:]) + (1 - mix) * np.log(lower[1:]))
        np.testing.assert_allclose(variance[1:], expected, rtol=1e-4)
        assert variance[0] == 0  # the last step, to the data


def test_what_the_output_says():
    output = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 3, 8)), jnp.float32)
    x_t, t = output[..., 4:] + 1, jnp.array([0.001, 0.7])
    found = DDPM().predict(output, x_t, t)
    np.testing.assert_array_equal(found.noise, output[..., :4])
    np.testing.assert_allclose(found.mix, (output[..., 4:] + 1) / 2, rtol=1e-6)
    bar = ALPHA_BAR[[0, 699]][:, None, None, None]
    data = (x_t - np.sqrt(1 - bar) * output[..., :4]) / np.sqrt(bar)
    np.testing.assert_allclose(found.data, data, rtol=1e-4, atol=1e-4)


DEVIATION = 0.15  # of data within [-1, 1]


def gaussian_bound(count):
    """(the sum over steps in nats, the mean of step 0 by itself), for data N(0, DEVIATION^2).

    The network's noise is exact, and so are its variances: the reverse steps are those of the data.
    """
    process = DDPM()
    nodes, weights = np.polynomial.hermite_e.hermegauss(count)
    x0, noise = (each.ravel() for each in np.meshgrid(DEVIATION * nodes, nodes, indexing="ij"))
    weights = np.outer(weights, weights).ravel() / weights.sum() ** 2
    alpha, sigma = np.sqrt(ALPHA_BAR)[:, None], np.sqrt(1 - ALPHA_BAR)[:, None]
    x_t = alpha * x0 + sigma * noise
    total = alpha**2 * DEVIATION**2 + sigma**2
    before = np.append(1, ALPHA_BAR[:-1])[:, None]
    lower = BETA[:, None] * (1 - before) / sigma**2
    of_data = np.sqrt(before) * BETA[:, None] / sigma**2
    variance = lower + of_data**2 * DEVIATION**2 * sigma**2 / total
    lower[0] = lower[1]
    mix = np.log(variance / lower) / np.log(BETA[:, None] / lower)
    rows = np.broadcast_arrays(sigma * x_t / total, 2 * mix - 1)
    output = jnp.asarray(np.stack(rows, -1).reshape(-1, 2), jnp.float32)
    t = jnp.repeat((jnp.arange(1000) + 1) / 1000, len(x0))
    one = [jnp.asarray(np.tile(each, 1000)[:, None], jnp.float32) for each in (x0, noise)]
    bits = np.asarray(jax.jit(process.bound)(output, *one, t), np.float64).reshape(1000, -1)
    miss = x0 - alpha[0] * DEVIATION**2 / total[0] * x_t[0]
    return math.log(2) * bits @ weights, miss, variance[0, 0], weights


def test_the_bound_is_the_entropy_of_gaussian_data():
    nats, miss, variance, weights = gaussian_bound(24)
    # With every reverse step exact the bound is tight: the data's entropy, and how far x at t=1 is
    # from a standard normal.
    entropy = math.log(2 * math.pi * math.e * DEVIATION**2) / 2 + math.log(255 / 2)
    bar = ALPHA_BAR[-1]
    last = bar * DEVIATION**2 + 1 - bar
    expected = entropy + (last - 1 - math.log(last)) / 2
    given = (last - 1 - math.log(1 - bar)) / 2  # the part of x at t=1, which no network changes
    # Step 0 gives a bin's mass, and not its width times the density in its middle.
    edges = [(side / 255 - abs(miss)) / math.sqrt(variance) for side in (-1, 1)]
    mass = scipy.special.ndtr(edges[1]) - scipy.special.ndtr(edges[0])
    density = np.exp(-(miss**2) / variance / 2) / math.sqrt(2 * math.pi * variance)
    bins = weights @ (np.log(density * 2 / 255) - np.log(mass))
    assert nats.sum() + given == pytest.approx(expected + bins, abs=2e-4)
    assert nats[0] == pytest.approx(-weights @ np.log(mass), abs=1e-5)
    assert (nats[1:] > 0).all()


def test_the_first_step_gives_the_256_bins_masses_that_sum_to_one():
    process = DDPM()
    x = jnp.linspace(-1, 1, 256)[:, None]  # data in the middle of their bins, the outer ones open
    for center, range_ in [(0.3, 0.0), (-0.999, 1.0), (1.0, -1.0)]:
        # The mean of step 0 is x_t less the noise it predicts, over alpha.
        alpha, sigma = (float(each) for each in process.path(jnp.float32(0.001)))
        predicted = jnp.full_like(x, 0.5)
        noise = (alpha * center + sigma * 0.5 - alpha * x) / sigma  # the same x_t for all
        output = jnp.concatenate([predicted, jnp.full_like(x, range_)], -1)
        bits = process.bound(output, x, noise, jnp.full((256,), 0.001))
        mass = np.exp2(-np.asarray(bits, np.float64))
        lower, upper = np.log(BETA[1] * BETA[0] / (1 - ALPHA_BAR[1])), np.log(BETA[0])
        deviation = np.exp((lower + (range_ + 1) / 2 * (upper - lower)) / 2)
        edges = np.concatenate([[-np.inf], (np.arange(255) + 0.5) / 127.5 - 1, [np.inf]])
        expected = np.diff(scipy.special.ndtr((edges - center) / deviation))
        np.testing.assert_allclose(mass, expected, atol=2e-5)
        assert mass.sum() == pytest.approx(1, abs=1e-4)


def example(seed=0):
    rng = np.random.default_rng(seed)
    output, x0, noise = rng.normal(size=(3, 5, 2, 2, 6))
    t = jnp.array([0.001, 0.002, 0.1, 0.5, 1.0])
    return (
        *(jnp.asarray(each, jnp.float32) for each in (output, 0.3 * x0[..., :3], noise[..., :3])),
        t,
    )


def test_the_loss_is_the_noise_error_and_the_bound_in_bits():
    output, x0, noise, t = example()
    simple = jnp.square(output[..., :3] - noise).mean((1, 2, 3))
    found = DDPM().loss(output, x0, noise, t)
    np.testing.assert_allclose(found, simple + DDPM().bound(output, x0, noise, t), rtol=1e-6)
    plain = DDPM(learned_variance=False)
    np.testing.assert_allclose(plain.loss(output[..., :3], x0, noise, t), simple, rtol=1e-6)
    with pytest.raises(UserError, match="learned_variance"):
        plain.bound(output[..., :3], x0, noise, t)


def test_a_step_of_the_bound_against_numpy():
    output, x0, noise, t = example()
    wide = [np.asarray(each, np.float64) for each in (output, x0, noise)]
    found = DDPM().bound(output, x0, noise, t)
    for row, number in [(1, 1), (2, 99), (3, 499), (4, 999)]:
        bar, before, beta = ALPHA_BAR[number], ALPHA_BAR[number - 1], BETA[number]
        x_t = math.sqrt(bar) * wide[1][row] + math.sqrt(1 - bar) * wide[2][row]
        own, range_ = wide[0][row, ..., :3], wide[0][row, ..., 3:]
        guess = (x_t - math.sqrt(1 - bar) * own) / math.sqrt(bar)
        away = math.sqrt(before) * beta / (1 - bar) * (wide[1][row] - guess)
        true = beta * (1 - before) / (1 - bar)
        share = (range_ + 1) / 2
        variance = np.exp(share * np.log(beta) + (1 - share) * np.log(true))
        nats = (np.log(variance / true) + (true + away**2) / variance - 1) / 2
        assert float(found[row]) == pytest.approx(nats.mean() / math.log(2), rel=1e-4)


def test_the_bound_teaches_the_variance_alone():
    output, x0, noise, t = example()
    whole = jax.grad(lambda output: DDPM().loss(output, x0, noise, t).sum())(output)
    simple = jax.grad(lambda output: jnp.square(output[..., :3] - noise).mean((1, 2, 3)).sum())
    bound = jax.grad(lambda output: DDPM().bound(output, x0, noise, t).sum())(output)
    np.testing.assert_allclose(whole[..., :3], simple(output)[..., :3], rtol=1e-5)
    np.testing.assert_allclose(whole[..., 3:], bound[..., 3:], rtol=1e-5)
    assert (jnp.abs(bound[..., :3]) > 0).all()  # left to itself it would reach the mean
