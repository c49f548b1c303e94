"""Guidance has one meaning: weak + scale * (conditional - weak)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlc_jax.diffusion.guidance import Guidance, conjoined, guided, guided_pair
from dlc_jax.diffusion.process import Prediction
from dlc_jax.errors import UserError

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, 2, 6)), jnp.float32)
T = jnp.array([0.1, 0.4, 0.6, 0.9])


def conditional(x, t):
    return Prediction(x + 1, 2 * x - t[:, None, None, None], x**2)


def weak(x, t):
    return Prediction(x * t[:, None, None, None], -x, 3 * x)


def pair(x, t):
    return conditional(x, t), weak(x, t)


def both_ways(guidance):
    """`guided` and `guided_pair` of the same two predictions."""
    return guided(conditional, weak, guidance), guided_pair(pair, guidance)


FOUND, WEAK = pair(X, T)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.5, 4.0])
def test_guided_is_the_line_through_weak_and_conditional(scale):
    for function in both_ways(Guidance(scale=scale)):
        out = function(X, T)
        for found, strong, base in zip(out[:2], FOUND, WEAK, strict=False):
            base = np.asarray(base, np.float64)
            np.testing.assert_allclose(found, base + scale * (strong - base), atol=1e-5)


def test_the_variance_is_the_conditional_prediction_s():
    for function in both_ways(Guidance(scale=3.0)):
        np.testing.assert_array_equal(function(X, T).mix, FOUND.mix)
    function = guided(lambda x, t: FOUND._replace(mix=None), weak, Guidance(scale=3.0))
    assert function(X, T).mix is None


def test_scale_zero_is_the_weak_one_and_scale_one_the_conditional_alone():
    for function in both_ways(Guidance(scale=0.0)):
        np.testing.assert_array_equal(function(X, T).data, WEAK.data)
    calls = []
    function = guided(
        lambda *a: calls.append(a) or conditional(*a), lambda x, t: 1 / 0, Guidance(scale=1.0)
    )
    np.testing.assert_array_equal(function(X, T).data, FOUND.data)
    assert len(calls) == 1
    assert guided(conditional, None, Guidance())(X, T).data is not None
    np.testing.assert_array_equal(guided_pair(pair, Guidance())(X, T).noise, FOUND.noise)


def test_outside_the_closed_interval_the_conditional_stands():
    inside, outside = jnp.array([1, 2]), jnp.array([0, 3])  # ends are inside
    for function in both_ways(Guidance(scale=3.0, interval=(0.4, 0.6))):
        out = jax.jit(function)(X, T)
        for found, strong, base in zip(out[:2], FOUND, WEAK, strict=False):
            np.testing.assert_array_equal(found[outside], strong[outside])
            expected = base + 3 * (strong - base)
            np.testing.assert_allclose(found[inside], expected[inside], atol=1e-5)


@pytest.mark.parametrize("end", [0.3, 0.7])
def test_a_batch_at_an_end_of_the_interval_is_guided(end):
    t = jnp.full((4,), end)
    for function in both_ways(Guidance(scale=2.0, interval=(0.3, 0.7))):
        expected = 2 * conditional(X, t).data - weak(X, t).data
        np.testing.assert_allclose(jax.jit(function)(X, t).data, expected, atol=1e-5)


def test_the_weak_one_is_not_run_where_no_example_needs_it():
    ran = []

    def told(x, t):
        jax.debug.callback(lambda t: ran.append(np.asarray(t)), t)
        return weak(x, t)

    function = jax.jit(guided(conditional, told, Guidance(scale=2.0, interval=(0.3, 0.7))))
    function(X, jnp.full((4,), 0.9))
    jax.effects_barrier()
    assert not ran
    function(X, jnp.full((4,), 0.5))
    jax.effects_barrier()
    assert len(ran) == 1


def test_only_the_first_channels_are_guided_when_said_so():
    for function in both_ways(Guidance(scale=2.0, channels=3)):
        out = function(X, T)
        for found, strong, base in zip(out[:2], FOUND, WEAK, strict=False):
            expected = 2 * strong - base
            np.testing.assert_allclose(found[..., :3], expected[..., :3], atol=1e-5)
            np.testing.assert_array_equal(found[..., 3:], strong[..., 3:])


def gaussian(mean, variance):
    """The exact prediction of N(mean, variance) data on the linear path, and log p of x_t."""

    def spread(t):
        t = t[:, None, None, None]
        return 1 - t, t, (1 - t) ** 2 * variance + t**2

    def log_p(x, t):
        alpha, _, total = spread(t)
        return (-0.5 * (x - alpha * mean) ** 2 / total).sum()

    def predict(x, t):
        alpha, sigma, total = spread(t)
        away = (x - alpha * mean) / total
        return Prediction(mean + alpha * variance * away, sigma * away)

    return predict, log_p


def test_a_conjunction_follows_the_score_of_the_product():
    base, *found = (gaussian(*each) for each in ((0.3, 2.0), (1.0, 0.5), (-2.0, 1.2)))
    scales = (1.5, 0.7)
    predict = conjoined([one for one, _ in found], base[0], Guidance(), scales)

    def log_p(x, t):
        each = zip(scales, found, strict=True)
        return base[1](x, t) + sum(scale * (p(x, t) - base[1](x, t)) for scale, (_, p) in each)

    out, t = predict(X, T), T[:, None, None, None]
    np.testing.assert_allclose(out.noise, -t * jax.grad(log_p)(X, T), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose((1 - t) * out.data + t * out.noise, X, atol=1e-5)  # one x


@pytest.mark.parametrize(
    "how", [{}, {"interval": (0.3, 0.7)}, {"channels": 3}, {"interval": (0.5, 1.0), "channels": 1}]
)
def test_a_conjunction_of_one_is_guidance(how):
    guidance = Guidance(scale=2.5, **how)
    found = conjoined([conditional], weak, guidance, (2.5,))(X, T)
    for one, other in zip(found, guided(conditional, weak, guidance)(X, T), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    twice = conjoined([conditional] * 2, weak, guidance, (1, 1))(X, T)
    for one, strong, base in zip(twice[:2], FOUND, WEAK, strict=False):
        np.testing.assert_allclose(one, 2 * strong - base, atol=1e-5)  # scale 1 is so everywhere
    np.testing.assert_array_equal(twice.mix, FOUND.mix)


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
