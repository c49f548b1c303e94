"""The linear path: conversions between predictions, and integrators against ODEs whose solutions are known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlc_jax.diffusion import flow, sample, schedules
from dlc_jax.errors import UserError

SHAPE = (3, 4, 4, 2)


def draws(seed=0):
    x0, noise = np.random.default_rng(seed).normal(size=(2, *SHAPE))
    return x0, noise, np.array([0.05, 0.5, 1.0])


def test_interpolate_against_numpy_and_at_the_ends():
    x0, noise, t = draws()
    expected = (1 - t)[:, None, None, None] * x0 + t[:, None, None, None] * noise
    x0, noise, t = (jnp.asarray(value, jnp.float32) for value in (x0, noise, t))
    np.testing.assert_allclose(flow.interpolate(x0, noise, t), expected, atol=1e-5)
    np.testing.assert_array_equal(flow.interpolate(x0, noise, jnp.zeros(3)), x0)
    np.testing.assert_array_equal(flow.interpolate(x0, noise, jnp.ones(3)), noise)


def test_conversions_find_the_truth_and_invert_each_other():
    x0, noise, t = (jnp.asarray(value, jnp.float32) for value in draws())
    x_t = flow.interpolate(x0, noise, t)
    velocity = noise - x0
    np.testing.assert_allclose(flow.to_velocity(x0, x_t, t, kind="x"), velocity, atol=1e-4)  # a division by t = 0.05
    np.testing.assert_allclose(flow.to_data(velocity, x_t, t, kind="v"), x0, atol=1e-5)
    for kind in flow.KINDS:
        same = {"v": flow.to_velocity, "x": flow.to_data}[kind]
        np.testing.assert_array_equal(same(velocity, x_t, t, kind=kind), velocity)
    prediction = jnp.asarray(np.random.default_rng(9).normal(size=SHAPE), jnp.float32)
    back = flow.to_data(flow.to_velocity(prediction, x_t, t, kind="x"), x_t, t, kind="v")
    np.testing.assert_allclose(back, prediction, atol=1e-5)
    back = flow.to_velocity(flow.to_data(prediction, x_t, t, kind="v"), x_t, t, kind="x")
    np.testing.assert_allclose(back, prediction, atol=1e-4)
    with pytest.raises(UserError, match="eps"):
        flow.to_velocity(prediction, x_t, t, kind="eps")


def test_the_floor_bounds_the_velocity_of_a_data_prediction():
    x_t, t = jnp.ones((2, 5)), jnp.array([0.0, 0.2])
    np.testing.assert_allclose(flow.to_velocity(0 * x_t, x_t, t, kind="x", floor=0.1)[:, 0], [10, 5], rtol=1e-6)


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_straight_paths_are_exact_in_any_number_of_steps(method, steps):
    keys = jax.random.split(jax.random.key(0), 3)
    target = jnp.asarray(draws()[0], jnp.float32)

    def velocity(x, t):  # of a model that knows the data: every path is straight
        return flow.to_velocity(target, x, t, kind="x")

    out = sample.flow_sample(velocity, keys, SHAPE[1:], schedules.uniform_grid(steps), method=method)
    np.testing.assert_allclose(out, target, atol=2e-6)


def error(method, steps, shift=1.0):
    """Of dx/dt = x (1 + t), solved by x(0) = x(1) exp(-3/2)."""
    x = jnp.array([[1.0], [2.0]])
    out = method(lambda x, t: x * (1 + t)[:, None], x, schedules.uniform_grid(steps, shift=shift))
    errors = out[:, 0] / x[:, 0] / math.exp(-1.5) - 1
    return abs(float(errors[0]))


@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_orders_of_the_integrators(shift):
    assert error(sample.euler, 20, shift) / error(sample.euler, 40, shift) == pytest.approx(2, abs=0.2)
    assert error(sample.heun, 20, shift) / error(sample.heun, 40, shift) == pytest.approx(4, abs=0.6)
    assert error(sample.heun, 20, shift) < error(sample.euler, 40, shift) / 5


def test_heun_does_not_ask_for_a_velocity_at_the_data():
    asked = []

    def velocity(x, t):
        jax.debug.callback(lambda t: asked.append(float(t[0])), t, ordered=True)
        return x

    sample.heun(velocity, jnp.ones((1, 1)), schedules.uniform_grid(2))
    jax.effects_barrier()
    assert asked == [1.0, 0.5, 0.5]


def test_a_sample_depends_on_its_key_alone():
    keys = jax.random.split(jax.random.key(1), 6)
    grid = schedules.uniform_grid(2)
    whole = sample.flow_sample(lambda x, t: x * t[:, None], keys, (300,), grid)
    part = sample.flow_sample(lambda x, t: x * t[:, None], keys[2:4], (300,), grid)
    np.testing.assert_array_equal(whole[2:4], part)
    # from N(0, 1), times 1 - 1/2 and then 1 - 1/4
    assert np.std(whole) == pytest.approx(0.375, rel=4 / np.sqrt(2 * 1800))
    with pytest.raises(UserError, match="rk4"):
        sample.flow_sample(lambda x, t: x, keys, (3,), grid, method="rk4")
