"""The loss on the linear path: the same for both kinds of prediction, above the floor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlc_jax.diffusion import flow
from dlc_jax.errors import UserError
from dlc_jax.losses.diffusion import flow_loss


def draws():
    x0, noise, prediction = np.random.default_rng(0).normal(size=(3, 3, 4, 4, 2))
    return prediction, x0, noise, np.array([0.02, 0.2, 0.9])


@pytest.mark.parametrize("kind", ["v", "x"])
def test_against_numpy(kind):
    prediction, x0, noise, t = draws()
    if kind == "v":
        expected = ((prediction - (noise - x0)) ** 2).mean((1, 2, 3))
    else:
        expected = ((prediction - x0) ** 2).mean((1, 2, 3)) / np.maximum(t, 0.1) ** 2
    found = flow_loss(
        *(jnp.asarray(value, jnp.float32) for value in (prediction, x0, noise, t)),
        kind=kind,
        floor=0.1,
    )
    assert found.shape == (3,)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_kinds_agree_above_the_floor():
    prediction, x0, noise, t = (jnp.asarray(value, jnp.float32) for value in draws())
    velocity = flow.to_velocity(prediction, flow.interpolate(x0, noise, t), t, kind="x")
    of_data = flow_loss(prediction, x0, noise, t, kind="x", floor=0.1)
    of_velocity = flow_loss(velocity, x0, noise, t, kind="v")
    np.testing.assert_allclose(of_data[1:], of_velocity[1:], rtol=1e-4)
    assert of_data[0] < of_velocity[0] / 10  # t = 0.02 is held at 0.1: less by a factor of 25


def test_zero_at_the_truth_and_float32_from_half_precision():
    _, x0, noise, t = (jnp.asarray(value, jnp.float32) for value in draws())
    np.testing.assert_array_equal(flow_loss(noise - x0, x0, noise, t, kind="v"), 0)
    np.testing.assert_array_equal(flow_loss(x0, x0, noise, t, kind="x"), 0)
    narrow = (value.astype(jnp.bfloat16) for value in (x0, x0, noise))
    assert flow_loss(*narrow, t, kind="v").dtype == jnp.float32


def test_examples_are_apart():
    prediction, x0, noise, t = (jnp.asarray(value, jnp.float32) for value in draws())
    slope = jax.grad(lambda prediction: flow_loss(prediction, x0, noise, t, kind="x")[1])(
        prediction
    )
    assert (slope[1] != 0).all() and (slope[0] == 0).all() and (slope[2] == 0).all()


def test_an_unknown_kind_is_told():
    with pytest.raises(UserError, match="eps"):
        flow_loss(*(jnp.asarray(value, jnp.float32) for value in draws()), kind="eps")
