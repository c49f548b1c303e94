"""What every process offers, and the linear path and EDM against their equations."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlc_jax.diffusion import schedules
from dlc_jax.diffusion.ddpm import DDPM
from dlc_jax.diffusion.edm import EDM
from dlc_jax.diffusion.linear import Linear
from dlc_jax.diffusion.process import per_example
from dlc_jax.diffusion.processes import PROCESSES
from dlc_jax.errors import UserError

SHAPE = (3, 4, 4, 2)
T = jnp.array([0.05, 0.5, 0.9])
ALL = [
    *(Linear(), Linear(prediction="x"), Linear(shift=0.0, time="uniform")),
    *(DDPM(), DDPM(learned_variance=False), EDM(), EDM(sigma_data=1.3, sigma_max=20.0)),
]
every = pytest.mark.parametrize("process", ALL, ids=repr)


def draws(process=None, seed=0):
    """(output, x0, noise), of normal numbers."""
    rng = np.random.default_rng(seed)
    x0, noise = rng.normal(size=(2, *SHAPE))
    output = rng.normal(size=(*SHAPE[:-1], SHAPE[-1] * (process.outputs if process else 1)))
    return [jnp.asarray(each, jnp.float32) for each in (output, x0, noise)]


def perfect(process, x0, noise, t):
    """What the network would give if it knew data and noise."""
    if isinstance(process, Linear):
        return noise - x0 if process.prediction == "v" else x0
    if isinstance(process, DDPM):
        return jnp.concatenate([noise, 0 * noise], -1) if process.outputs == 2 else noise
    sigma, data = per_example(process.path(t)[1], x0), process.sigma_data
    total = sigma**2 + data**2
    skip, out = data**2 / total, sigma * data / jnp.sqrt(total)
    return (x0 - skip * (x0 + sigma * noise)) / out


def test_every_process_can_be_named():
    assert {type(process) for process in ALL} == set(PROCESSES.values())
    assert [process.outputs for process in ALL] == [1, 1, 1, 2, 1, 1, 1]
    assert [process.deviation for process in ALL] == [1, 1, 1, 1, 1, 0.5, 1.3]


@every
def test_a_path_begins_at_the_data_and_its_noise_grows(process):
    assert [float(each) for each in process.path(jnp.float32(0))] == [1, 0]
    t = jnp.linspace(0, 1, 101)
    alpha, sigma = process.path(t)
    assert alpha.dtype == sigma.dtype == jnp.float32 and alpha.shape == sigma.shape == t.shape
    assert (np.diff(sigma) > 0).all() and (np.diff(alpha) <= 0).all()
    _, x0, noise = draws()
    alpha, sigma = (per_example(each, x0) for each in process.path(T))
    np.testing.assert_allclose(process.noised(x0, noise, T), alpha * x0 + sigma * noise, rtol=1e-6)
    np.testing.assert_array_equal(process.noised(x0, noise, jnp.zeros(3)), x0)


@every
def test_a_prediction_splits_what_it_was_given(process):
    output, x0, noise = draws(process)
    x_t = process.noised(x0, noise, T)
    found = process.predict(output.astype(jnp.bfloat16), x_t, T)
    assert found.data.dtype == found.noise.dtype == jnp.float32
    assert found.data.shape == found.noise.shape == SHAPE
    alpha, sigma = (per_example(each, x0) for each in process.path(T))
    size = float(jnp.abs(alpha * found.data).max() + jnp.abs(sigma * found.noise).max())
    together = alpha * found.data + sigma * found.noise
    np.testing.assert_allclose(together, x_t, atol=1e-6 * size)
    assert (found.mix is None) == (process.outputs == 1)


@every
def test_a_perfect_output_gives_data_and_noise_and_costs_nothing(process):
    _, x0, noise = draws()
    x_t = process.noised(x0, noise, T)
    output = perfect(process, x0, noise, T)
    found = process.predict(output, x_t, T)
    np.testing.assert_allclose(found.noise, noise, atol=1e-4)
    np.testing.assert_allclose(found.data, x0, atol=1e-4)
    if process.outputs == 1:
        np.testing.assert_allclose(process.loss(output, x0, noise, T), 0, atol=1e-9)


@every
def test_a_loss_is_of_each_example_alone_in_float32(process):
    output, x0, noise = draws(process)
    found = process.loss(*(each.astype(jnp.bfloat16) for each in (output, x0, noise)), T)
    assert found.dtype == jnp.float32 and found.shape == (3,)
    slope = jax.grad(lambda output: process.loss(output, x0, noise, T)[1])(output)
    assert (slope[1] != 0).all() and (slope[0] == 0).all() and (slope[2] == 0).all()


@every
def test_training_times_keep_the_order_and_reach_everywhere(process):
    u = (jnp.arange(2000) + 0.5) / 2000
    t = np.asarray(process.times(u, 3072))
    assert 0 < t.min() < 0.1 and 0.7 < t.max() <= 1
    assert (np.diff(t) >= 0).all()
    edges = process.times(jnp.array([schedules.EDGE, 1 - schedules.EDGE]), 3072)
    assert 0 < edges[0] < edges[1] <= 1


@every
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_grids_run_down_to_the_data(process, steps):
    for spacing in schedules.TIMES:
        grid = process.grid(spacing, steps, 3072)
        assert grid.dtype == jnp.float32 and len(grid) == steps + 1
        assert grid[0] == 1 and grid[-1] == 0 and (np.diff(grid) < 0).all()


@pytest.mark.parametrize("process", [Linear(), EDM()], ids=repr)
def test_a_raised_time_has_so_much_more_noise(process):
    t = jnp.array([1e-3, 0.2, 0.6, 0.9])
    alpha, sigma = process.path(t)
    for factor in (1.05, 1.4):
        alpha_r, sigma_r = process.path(process.raised(t, factor))
        np.testing.assert_allclose(sigma_r / alpha_r, factor * sigma / alpha, rtol=2e-5)
    assert process.raised(jnp.float32(1), 1.4) == 1


# The linear path.


@pytest.mark.parametrize("kind", ["v", "x"])
def test_the_linear_loss_against_numpy(kind):
    prediction, x0, noise = draws()
    t = np.array([0.02, 0.2, 0.9])
    wide = [np.asarray(each, np.float64) for each in (prediction, x0, noise)]
    expected = ((wide[0] - (wide[2] - wide[1])) ** 2).mean((1, 2, 3))
    if kind == "x":
        expected = ((wide[0] - wide[1]) ** 2).mean((1, 2, 3)) / np.maximum(t, 0.1) ** 2
    found = Linear(prediction=kind).loss(prediction, x0, noise, jnp.asarray(t, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_kinds_of_the_linear_path_agree_above_the_floor():
    prediction, x0, noise = draws()
    t = jnp.array([0.02, 0.2, 0.9])
    of_data, of_velocity = Linear(prediction="x"), Linear()
    found = of_data.predict(prediction, of_data.noised(x0, noise, t), t)
    velocity = found.noise - found.data
    again = of_velocity.predict(velocity, of_data.noised(x0, noise, t), t)
    np.testing.assert_allclose(again.data, found.data, atol=1e-5)
    np.testing.assert_allclose(again.noise, found.noise, atol=1e-4)  # a division by t = 0.02
    of_data = of_data.loss(prediction, x0, noise, t)
    of_velocity = of_velocity.loss(velocity, x0, noise, t)
    np.testing.assert_allclose(of_data[1:], of_velocity[1:], rtol=1e-4)
    assert of_data[0] < of_velocity[0] / 10  # t = 0.02 is held at 0.1: less by a factor of 25


def test_linear_times_are_logit_normal_and_shifted():
    u = jnp.linspace(0.01, 0.99, 99)
    np.testing.assert_array_equal(Linear(time="uniform").times(u, 1), u)
    process = Linear(mean=0.8, spread=1.2)
    np.testing.assert_array_equal(process.times(u, 1), schedules.logit_normal(u, 0.8, 1.2))
    shifted = Linear(time="uniform", shift=3.0).times(u, 1)
    np.testing.assert_allclose(shifted, 3 * u / (1 + 2 * u), rtol=1e-6)
    # Shifting adds ln a to the logit, after the draw's mean and spread.
    shifted = Linear(mean=0.8, spread=1.2, shift=3.0).times(u, 1)
    plain = process.times(u, 1)
    logits = np.log(shifted / (1 - shifted)) - np.log(plain / (1 - plain))
    np.testing.assert_allclose(logits, math.log(3), atol=1e-4)


def test_the_shift_by_dimension_is_in_training_and_in_sampling():
    dimension = 16 * 16 * 768
    factor = math.sqrt(dimension / 4096)  # 6.93, of RAE's latents
    u = jnp.linspace(0.1, 0.9, 9)
    expected = factor * u / (1 + (factor - 1) * u)
    by_dimension = Linear(time="uniform", shift=0.0)
    np.testing.assert_allclose(by_dimension.times(u, dimension), expected, rtol=1e-6)
    np.testing.assert_allclose(by_dimension.grid("uniform", 10, dimension)[-2:0:-1], expected, 1e-6)
    np.testing.assert_array_equal(by_dimension.times(u, 4096), u)
    plain = np.float32(schedules.grid("cosine", 9))
    np.testing.assert_array_equal(Linear().grid("cosine", 9, 7), plain)


# EDM.


def test_edm_is_preconditioned_as_in_its_table():
    process, data = EDM(sigma_data=0.7), 0.7
    output, x0, noise = draws()
    sigma = np.asarray(process.path(T)[1], np.float64)
    total = sigma**2 + data**2
    skip, out, weight = data**2 / total, sigma * data / np.sqrt(total), total / (sigma * data) ** 2
    np.testing.assert_allclose(weight * out**2, 1)
    x_t = process.noised(x0, noise, T)
    read, time = process.inputs(x_t, T)
    scale = (1 / np.sqrt(total))[:, None, None, None]
    np.testing.assert_allclose(read, scale * x_t, rtol=1e-5)
    np.testing.assert_allclose(time, np.log(sigma) / 4, atol=1e-6)
    wide = [np.asarray(each, np.float64) for each in (output, x0, noise)]
    noisy = wide[1] + sigma[:, None, None, None] * wide[2]
    denoised = skip[:, None, None, None] * noisy + out[:, None, None, None] * wide[0]
    found = process.predict(output, x_t, T)
    np.testing.assert_allclose(found.data, denoised, atol=1e-5)
    expected = (noisy - denoised) / sigma[:, None, None, None]
    np.testing.assert_allclose(found.noise, expected, atol=1e-4)
    loss = weight * ((denoised - wide[1]) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(process.loss(output, x0, noise, T), loss, rtol=1e-4)


def test_edm_inputs_and_targets_have_variance_one_at_any_noise():
    process = EDM()
    t = jnp.linspace(0.001, 1, 50)
    ones = jnp.ones((50, 1))
    x0 = process.sigma_data * ones * jnp.array([1.0, 1, -1, -1])
    noise = ones * jnp.array([1.0, -1, 1, -1])
    read, _ = process.inputs(process.noised(x0, noise, t), t)
    np.testing.assert_allclose(jnp.square(read).mean(1), 1, rtol=1e-5)
    np.testing.assert_allclose(process.loss(0 * x0, x0, noise, t), 1, rtol=1e-5)


def test_edm_trains_on_log_normal_noise_within_its_bounds():
    process = EDM(p_mean=-0.5, p_std=2.0, sigma_max=10.0)
    u = np.linspace(0.001, 0.999, 333)
    sigma = process.path(process.times(jnp.asarray(u, jnp.float32), 1))[1]
    expected = np.exp(-0.5 + 2 * jax.scipy.special.ndtri(u))
    np.testing.assert_allclose(sigma, np.clip(expected, 0.002, 10), rtol=1e-4)


@pytest.mark.parametrize("steps", [2, 18, 40, 256])
def test_edm_visits_its_own_noise(steps):
    place = np.arange(steps) / (steps - 1)
    expected = (80 ** (1 / 7) + place * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    process = EDM()
    sigma = process.path(process.grid("uniform", steps, 1))[1]
    np.testing.assert_allclose(sigma[:-1], expected, rtol=1e-6)
    assert sigma[-1] == 0


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (Linear, "prediction", "eps"),
        (Linear, "time", "normal"),
        (Linear, "floor", 0.0),
        (Linear, "spread", -1.0),
        (Linear, "shift", -0.5),
        (EDM, "sigma_data", 0.0),
        (EDM, "sigma_min", math.nan),
        (EDM, "rho", math.inf),
        (EDM, "sigma_max", 0.001),
        (DDPM, "steps", 1),
        (DDPM, "beta_first", 0.03),
        (DDPM, "beta_last", 1.0),
    ],
)
def test_processes_check_themselves(kind, field, value):
    with pytest.raises(UserError, match=rf"process\..*{field}="):
        kind(**{field: value})
