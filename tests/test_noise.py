"""Schedules of discrete noise: values by hand, and derivatives by differences."""

import jax.numpy as jnp
import numpy as np
import pytest

from dlc_jax.diffusion import noise
from dlc_jax.diffusion.noise import SCHEDULES, Noise
from dlc_jax.errors import UserError

T = np.array([0.05, 0.3, 0.5, 0.9])


def test_shares_by_hand():
    share = {name: Noise(schedule=name).hidden(0.5, np) for name in SCHEDULES}
    assert share["linear"] == 0.5
    assert share["log_linear"] == pytest.approx(0.4995)
    assert share["cosine"] == pytest.approx(np.sqrt(0.5))
    assert share["polynomial"] == 0.25
    assert share["geometric"] == pytest.approx(1 - np.exp(-np.sqrt(1e-4 * 20)))


@pytest.mark.parametrize("name", SCHEDULES)
def test_derivatives(name):
    schedule, step = Noise(schedule=name), 1e-6
    slope = (schedule.hidden(T + step, np) - schedule.hidden(T - step, np)) / (2 * step)
    hidden = schedule.hidden(T, np)
    np.testing.assert_allclose(schedule.weight(T, np), slope / hidden, rtol=1e-6)
    np.testing.assert_allclose(schedule.rate(T, np), slope / (1 - hidden), rtol=1e-6)
    np.testing.assert_allclose(schedule.sigma(T, np), -np.log1p(-hidden), rtol=1e-6)
    for method in ("hidden", "weight", "rate", "sigma"):
        on_device = getattr(schedule, method)(jnp.asarray(T, jnp.float32))
        np.testing.assert_allclose(on_device, getattr(schedule, method)(T, np), rtol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_mean_share(name):
    fine = (np.arange(100_000) + 0.5) / 100_000
    assert Noise(schedule=name).mean == pytest.approx(
        Noise(schedule=name).hidden(fine, np).mean(), 1e-5
    )


def test_the_noise_is_finite_where_all_is_hidden():
    assert np.isfinite(noise.total(jnp.ones(1)))[0]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"schedule": "sqrt"},
            "noise.schedule='sqrt' is unknown; known: linear, log_linear, cosine",
        ),
        ({"eps": 0.0}, "noise.eps=0.0 must be between 0 and 1"),
        ({"power": -1.0}, "noise.power=-1.0 must be above 0 and at most 10"),
        ({"smallest": 30.0}, "noise.smallest=30.0 must be above 0 and below noise.largest=20.0"),
    ],
)
def test_a_schedule_checks_itself(fields, words):
    with pytest.raises(UserError, match=words):
        Noise(**fields)
