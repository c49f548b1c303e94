"""Times of training and of sampling: stratified, logit-normal, and grids."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlc_jax.diffusion import schedules


@pytest.mark.parametrize("total", [29, 49, 98, 103])
def test_stratified_times_fill_every_interval_once(total):
    position = jnp.arange(total)
    for seed in range(20):
        t = schedules.stratified(position, total, jax.random.key(seed))
        assert float(t.min()) > 0 and float(t.max()) < 1
        np.testing.assert_array_equal(
            np.sort(np.floor(np.asarray(t, np.float64) * total)), np.arange(total)
        )


def test_stratified_times_belong_to_the_place_not_to_the_split():
    key = jax.random.key(5)
    whole = jax.jit(schedules.stratified, static_argnums=1)(jnp.arange(98), 98, key)
    shuffled = np.random.default_rng(0).permutation(98)
    for part in np.split(shuffled, [1, 30, 64]):
        np.testing.assert_array_equal(schedules.stratified(jnp.asarray(part), 98, key), whole[part])
    alone = [
        float(schedules.stratified(jnp.array([3]), 98, jax.random.key(seed))[0])
        for seed in range(200)
    ]
    assert abs(np.mean(alone) - 0.5) < 4 * math.sqrt(1 / 12 / 200)
    assert np.ptp(np.array(alone) * 98 % 1) > 0.9  # nor is it at one place of its interval


def test_logit_normal_is_the_quantile_function():
    u = jnp.linspace(0.01, 0.99, 99)
    t = schedules.logit_normal(u, 0.8, 1.2)
    z = (np.log(t / (1 - np.asarray(t, np.float64))) - 0.8) / 1.2
    expected = [0.5 * (1 + math.erf(value / math.sqrt(2))) for value in z]
    np.testing.assert_allclose(expected, u, atol=1e-5)
    edges = schedules.logit_normal(jnp.array([schedules.EDGE, 1 - schedules.EDGE]), 0.0, 1.0)
    assert 0 < edges[0] < edges[1] < 1


@pytest.mark.parametrize("times", schedules.TIMES)
def test_grids_run_from_noise_to_data(times):
    for steps in (1, 7):
        grid = schedules.grid(times, steps)
        assert len(grid) == steps + 1 and grid[0] == 1 and grid[-1] == 0
        assert (np.diff(grid) < 0).all()


def test_grids_against_their_equations():
    np.testing.assert_array_equal(schedules.grid("uniform", 4), [1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(schedules.grid("cosine", 2), [1, math.sqrt(0.5), 0], rtol=1e-6)
