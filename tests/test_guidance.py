"""Guidance has one meaning: base + scale * (conditional - base)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlc_jax.diffusion.guidance import Guidance, guided
from dlc_jax.errors import UserError

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, 2, 3)), jnp.float32)
T = jnp.array([0.1, 0.4, 0.6, 0.9])
CODES = jnp.arange(4.0)


def model(x, t, codes):
    """A stand-in that tells condition, time and position apart."""
    return (x * t[:, None, None, None] if codes is None else x + codes[:, None, None, None]) + 1


CONDITIONAL, BASE = model(X, T, CODES), model(X, T, None)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5, 4.0])
def test_guided_is_the_line_through_base_and_conditional(scale):
    expected = np.asarray(BASE, np.float64) + scale * (np.asarray(CONDITIONAL, np.float64) - BASE)
    np.testing.assert_allclose(
        guided(model, CODES, Guidance(scale=scale))(X, T), expected, atol=1e-5
    )


def test_scale_zero_is_the_base_and_scale_one_the_conditional_alone():
    np.testing.assert_array_equal(guided(model, CODES, Guidance(scale=0.0))(X, T), BASE)
    calls = []
    function = guided(
        lambda *a: calls.append(a[2]) or model(*a),
        CODES,
        Guidance(scale=1.0),
        null_fn=lambda x, t: 1 / 0,
    )
    np.testing.assert_array_equal(function(X, T), CONDITIONAL)
    assert len(calls) == 1


def test_outside_the_interval_the_conditional_stands():
    out = jax.jit(guided(model, CODES, Guidance(scale=3.0, interval=(0.4, 0.6))))(
        X, T
    )  # ends are inside
    everywhere = guided(model, CODES, Guidance(scale=3.0))(X, T)
    np.testing.assert_array_equal(out[jnp.array([0, 3])], CONDITIONAL[jnp.array([0, 3])])
    np.testing.assert_allclose(out[1:3], everywhere[1:3], atol=1e-5)


def test_the_base_is_not_run_where_no_example_needs_it():
    ran = []

    def base(x, t):
        jax.debug.callback(lambda t: ran.append(np.asarray(t)), t)
        return model(x, t, None)

    function = jax.jit(guided(model, CODES, Guidance(scale=2.0, interval=(0.3, 0.7)), null_fn=base))
    function(X, jnp.full((4,), 0.9))
    jax.effects_barrier()
    assert not ran
    function(X, jnp.full((4,), 0.5))
    jax.effects_barrier()
    assert len(ran) == 1


def test_only_the_first_channels_are_guided_when_said_so():
    out = guided(model, CODES, Guidance(scale=2.0, channels=2))(X, T)
    np.testing.assert_allclose(out[..., :2], (2 * CONDITIONAL - BASE)[..., :2], atol=1e-5)
    np.testing.assert_array_equal(out[..., 2:], CONDITIONAL[..., 2:])


def test_another_model_can_be_the_base():
    out = guided(model, CODES, Guidance(scale=2.0), null_fn=lambda x, t: 0.5 * model(x, t, CODES))(
        X, T
    )
    np.testing.assert_allclose(out, 1.5 * CONDITIONAL, atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("scale", float("nan")),
        ("scale", float("inf")),
        ("interval", (0.6, 0.4)),
        ("interval", (-0.1, 1.0)),
        ("interval", (0.0, 1.5)),
        ("channels", 0),
    ],
)
def test_guidance_checks_itself(field, value):
    with pytest.raises(UserError, match=rf"guidance\.{field}="):
        Guidance(**{field: value})
