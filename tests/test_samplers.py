"""The linear path, and samplers against equations whose solutions and marginals are known."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlc_jax.diffusion import flow, schedules
from dlc_jax.diffusion.guidance import Guidance
from dlc_jax.diffusion.sample import METHODS, Method, Sampler
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


def test_velocity_of_either_prediction():
    x0, noise, t = (jnp.asarray(value, jnp.float32) for value in draws())
    x_t, velocity = flow.interpolate(x0, noise, t), noise - x0
    found = flow.to_velocity(x0, x_t, t, kind="x")
    np.testing.assert_allclose(found, velocity, atol=1e-4)  # a division by t = 0.05
    np.testing.assert_array_equal(flow.to_velocity(velocity, x_t, t, kind="v"), velocity)
    prediction = jnp.asarray(np.random.default_rng(9).normal(size=SHAPE), jnp.float32)
    found = flow.to_velocity(prediction, x_t, t, kind="x")
    back = x_t - flow.per_example(t, x_t) * found
    np.testing.assert_allclose(back, prediction, atol=1e-5)
    with pytest.raises(UserError, match="eps"):
        flow.to_velocity(prediction, x_t, t, kind="eps")


def test_the_floor_bounds_the_velocity_of_a_data_prediction():
    x_t, t = jnp.ones((2, 5)), jnp.array([0.0, 0.2])
    found = flow.to_velocity(0 * x_t, x_t, t, kind="x", floor=0.1)
    np.testing.assert_allclose(found[:, 0], [10, 5], rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [1, 3, 10])
def test_straight_paths_are_exact_in_any_number_of_steps(method, steps):
    keys = jax.random.split(jax.random.key(0), 3)
    target = jnp.asarray(draws()[0], jnp.float32)

    def velocity(x, t):  # of a model that knows the data: every path is straight
        return flow.to_velocity(target, x, t, kind="x")

    out = Sampler(method=method, steps=steps).draw(velocity, keys, SHAPE[1:])
    np.testing.assert_allclose(out, target, atol=2e-6)


def error(method, steps, times):
    """Of dx/dt = x (1 + t), solved by x(0) = x(1) exp(-3/2)."""
    keys = jax.random.split(jax.random.key(0), 1)
    start = jax.random.normal(keys[0], (1,))
    sampler = Sampler(method=method, steps=steps, times=times)
    out = sampler.draw(lambda x, t: x * (1 + t)[:, None], keys, (1,))
    return abs(float(out[0, 0] / start[0]) / math.exp(-1.5) - 1)


@pytest.mark.parametrize("times", schedules.TIMES)
def test_orders_of_the_integrators(times):
    euler, half = (error("euler", steps, times) for steps in (20, 40))
    assert euler / half == pytest.approx(2, abs=0.2)
    heun = error("heun", 20, times)
    assert heun / error("heun", 40, times) == pytest.approx(4, abs=0.6)
    assert heun < half / 5


# Drawn at commit 16194b4 with the velocity below, in five uniform steps.
FROZEN = {
    "euler": [
        [0.6663743257522583, 0.4067639708518982, -0.6517658829689026],
        [0.6422746181488037, 0.6662539839744568, -0.5706260204315186],
    ],
    "heun": [
        [0.7034420967102051, 0.4460277259349823, -0.6615322828292847],
        [0.6502337455749512, 0.695356011390686, -0.5859670639038086],
    ],
}


@pytest.mark.parametrize("method", FROZEN)
def test_numbers_stay_those_of_earlier_versions(method):
    keys = jax.random.split(jax.random.key(7), 2)
    draw = Sampler(method=method, steps=5).draw
    out = draw(lambda x, t: x * (1 + t)[:, None] - jnp.sin(3 * x), keys, (3,))
    np.testing.assert_allclose(out, FROZEN[method], rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [1, 4])
def test_calls_counts_the_evaluations_and_none_is_at_the_data(method, steps):
    asked = []

    def velocity(x, t):
        asked.append(float(t[0]))
        return x

    sampler = Sampler(method=method, steps=steps)
    with jax.disable_jit():  # the loop runs as Python's, so that each call is seen
        sampler.draw(velocity, jax.random.split(jax.random.key(0), 1), (1,))
    assert len(asked) == sampler.calls and min(asked) > 0
    assert method != "heun" or steps == 1 or asked[:3] == [1.0, 0.75, 0.75]


def noisy(velocity_fn, x, t, s, keys):
    """A stochastic method, for the tests: it adds noise of its own."""
    return x + jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys)


@pytest.mark.parametrize("churn", [0.0, 0.5])
@pytest.mark.parametrize("method", [*METHODS, "noisy"])
def test_a_sample_depends_on_its_key_alone(method, churn, monkeypatch):
    monkeypatch.setitem(METHODS, "noisy", Method(noisy, calls=lambda steps: 0))
    keys = jax.random.split(jax.random.key(1), 6)
    draw = Sampler(method=method, steps=2, churn=churn).draw
    whole = draw(lambda x, t: x * t[:, None], keys, (300,))
    part = draw(lambda x, t: x * t[:, None], keys[2:4], (300,))
    np.testing.assert_array_equal(whole[2:4], part)
    if method == "euler" and not churn:  # from N(0, 1), times 1 - 1/2 and then 1 - 1/4
        assert np.std(whole) == pytest.approx(0.375, rel=4 / np.sqrt(2 * 1800))


def test_a_stochastic_method_gets_new_keys_for_every_step_and_example(monkeypatch):
    monkeypatch.setitem(METHODS, "noisy", Method(noisy, calls=lambda steps: 0))
    keys = jax.random.split(jax.random.key(2), 50)
    out = Sampler(method="noisy", steps=8).draw(lambda x, t: x, keys, (400,))
    # The start and eight steps are independent: variances add up. Equal keys anywhere would add
    # amplitudes instead.
    assert np.var(out) == pytest.approx(9, rel=4 * np.sqrt(2 / out.size))
    assert abs(np.corrcoef(out)[np.triu_indices(50, 1)]).max() < 5 / np.sqrt(400)


MEAN, DEVIATION = 0.5, 0.4


def gaussian(x, t):
    """The velocity of data N(MEAN, DEVIATION^2)."""
    t = t[:, None]
    variance = (1 - t) ** 2 * DEVIATION**2 + t**2
    slope = (t - (1 - t) * DEVIATION**2) / variance
    return -MEAN + slope * (x - (1 - t) * MEAN)


@pytest.mark.parametrize("churn", [0.0, 0.7, 3.0])
def test_marginals_stay_right_under_churn(churn):
    states = []

    def velocity(x, t):
        jax.debug.callback(lambda x, t: states.append((float(t[0]), x)), x, t, ordered=True)
        return gaussian(x, t)

    keys, steps = jax.random.split(jax.random.key(3), 100), 120
    out = Sampler(steps=steps, churn=churn).draw(velocity, keys, (400,))
    jax.effects_barrier()
    for t, x in [*states, (0.0, out)]:
        variance = (1 - t) ** 2 * DEVIATION**2 + t**2
        assert np.mean(x) == pytest.approx((1 - t) * MEAN, abs=5 * math.sqrt(variance / x.size))
        assert np.var(x) == pytest.approx(variance, rel=0.01 + 5 * math.sqrt(2 / x.size))
    highest = [max(state[0] for state in states[i : i + 2]) for i in range(2, 12, 2)]
    uniform = 1 - np.arange(1, 6) / steps
    np.testing.assert_allclose(highest, np.minimum(1, uniform + churn / steps), rtol=1e-6)
    still = Sampler(steps=steps).draw(gaussian, keys, (400,))
    assert (churn > 0) == bool(np.abs(out - still).mean() > 0.05)


def test_a_sampler_is_a_value_and_checks_itself():
    assert Sampler() == Sampler(method="heun", steps=50, guidance=Guidance(scale=1.0))
    assert hash(Sampler(churn=0.5)) == hash(dataclasses.replace(Sampler(), churn=0.5))
    for wrong, words in [
        ({"method": "rk4"}, "sampler.method='rk4' is unknown; known: euler, heun"),
        ({"times": "log"}, "sampler.times='log' is unknown; known: uniform, cosine"),
        ({"steps": 0}, "sampler.steps=0 must be at least 1"),
        ({"churn": -0.1}, "sampler.churn=-0.1 must be"),
        ({"churn": math.nan}, "sampler.churn=nan must be"),
    ]:
        with pytest.raises(UserError, match=words):
            Sampler(**wrong)
