"""Masked diffusion of codes: the objectives against exact likelihoods and against each other."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumerated import CODES, LENGTH, MASKS, VALUES, conditionals, joint, lookup

from dlc_jax.diffusion import masked
from dlc_jax.diffusion.masked import Masked
from dlc_jax.diffusion.noise import Noise
from dlc_jax.errors import UserError

SCHEDULES = ("linear", "cosine", "polynomial")


def order_average(table, code):
    """-log p(code) from `table`, averaged over all orders in which positions can be revealed."""
    total = 0.0
    for order in itertools.permutations(range(LENGTH)):
        noisy = [VALUES] * LENGTH
        for position in order:
            total -= table[tuple(noisy)][position, code[position]]
            noisy[position] = code[position]
    return total / math.factorial(LENGTH)


def expected(table, code, process=Masked(), measure="bound", scale=1.0):  # noqa: B008
    """The mean of a process's measure over t (Gauss-Legendre) and every mask, by its chance."""
    nodes, weights = np.polynomial.legendre.leggauss(24)
    t, weights = np.repeat((nodes + 1) / 2, len(MASKS)), np.repeat(weights / 2, len(MASKS))
    masks = np.tile(MASKS, (len(nodes), 1))
    codes = np.tile(code, (len(t), 1))
    share = process.noise.hidden(t, np)[:, None]
    chance = np.where(masks, share, 1 - share).prod(1)
    noisy = jnp.asarray(np.where(masks, VALUES, codes))
    outputs = scale * lookup(table)(noisy)
    t = jnp.asarray(t, jnp.float32)
    found = getattr(process, measure)(outputs, jnp.asarray(codes), noisy, t, values=VALUES)
    return (weights * chance * np.asarray(found, np.float64)).sum()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bound_of_the_exact_model_is_the_likelihood(schedule):
    p = joint()
    table, process = conditionals(p), Masked(noise=Noise(schedule=schedule))
    for index in (0, 7, 25):
        found = expected(table, CODES[index], process)
        assert found == pytest.approx(-math.log(p[index]), rel=1e-5)


def test_bound_of_any_model_is_the_average_over_orders():
    table = np.random.default_rng(1).normal(size=(VALUES + 1,) * LENGTH + (LENGTH, VALUES))
    table -= np.log(np.exp(table).sum(-1, keepdims=True))
    for index in (3, 20):
        average = order_average(table, CODES[index])
        assert expected(table, CODES[index]) == pytest.approx(average, rel=1e-5)


def test_bound_on_average_is_at_least_the_entropy():
    p = joint()
    wrong = conditionals(joint(5))
    bound = sum(p[i] * expected(wrong, CODES[i]) for i in range(len(CODES)))
    assert bound > -(p * np.log(p)).sum() + 0.1


def sedd(outputs, codes, noisy, t, noise):
    """The score entropy as SEDD defines it, from log-scores, in NumPy and float64."""
    sigma = -np.log1p(-noise.hidden(t, np))[:, None]
    log_s = outputs - np.log(np.expm1(sigma))[..., None] - np.log(VALUES)
    r = 1 / np.expm1(sigma)
    true = np.take_along_axis(log_s, codes[..., None], -1)[..., 0]
    each = np.exp(log_s).sum(-1) - r * true + r * (np.log(r) - 1)
    step = 1e-6
    rate = -(np.log1p(-noise.hidden(t + step, np)) - np.log1p(-noise.hidden(t - step, np)))
    return rate / (2 * step) * np.where(noisy == VALUES, each, 0).sum(-1)


@pytest.mark.parametrize("schedule", ["log_linear", "cosine", "geometric"])
def test_the_score_entropy_is_sedds(schedule):
    rng = np.random.default_rng(2)
    outputs = rng.normal(size=(8, LENGTH, VALUES))
    codes, t = rng.integers(0, VALUES, (8, LENGTH)), rng.uniform(0.1, 0.9, 8)
    noisy = np.where(rng.random((8, LENGTH)) < 0.5, VALUES, codes)
    noise = Noise(schedule=schedule)
    found = Masked(objective="score", noise=noise).loss(
        *(jnp.asarray(each) for each in (outputs.astype(np.float32), codes, noisy, t)),
        values=VALUES,
    )
    np.testing.assert_allclose(found, sedd(outputs, codes, noisy, t, noise), rtol=2e-4)


def test_a_normalized_score_is_the_bound():
    """SEDD's head, normalized, is MDLM's: exp(output) has the mean 1."""
    table = np.random.default_rng(1).normal(size=(VALUES + 1,) * LENGTH + (LENGTH, VALUES))
    table -= np.log(np.exp(table).sum(-1, keepdims=True))
    score = expected(table + np.log(VALUES), CODES[5], Masked(objective="score"))
    assert score == pytest.approx(expected(table, CODES[5]), rel=1e-5)
    assert expected(table, CODES[5], Masked(objective="score")) > score + 0.1  # another mass


def test_simple_weighs_all_times_alike():
    """An even guess costs log V a position under both; what is left out differs."""
    even = np.zeros((VALUES + 1,) * LENGTH + (LENGTH, VALUES))
    for schedule in SCHEDULES:
        process = Masked(objective="simple", noise=Noise(schedule=schedule))
        for measure in ("loss", "bound"):
            found = expected(even, CODES[0], process, measure)
            assert found == pytest.approx(LENGTH * math.log(VALUES), rel=1e-5)
    table = conditionals(joint())
    simple = expected(table, CODES[7], Masked(objective="simple"), "loss")
    # Of the three positions, k are hidden with the chance 1/4 each, and weigh 2 instead of 1/t.
    mean = []
    for k in range(1, LENGTH + 1):
        masks = MASKS[MASKS.sum(1) == k]
        noisy = np.where(masks, VALUES, CODES[7])
        rows = np.array([table[tuple(row)] for row in noisy])
        nats = -np.take_along_axis(rows, np.tile(CODES[7], (len(masks), 1))[..., None], -1)[..., 0]
        mean.append(np.where(masks, nats, 0).sum(1).mean())
    assert simple == pytest.approx(2 * sum(mean) / 4, rel=1e-5)


def test_nats_against_numpy():
    rng = np.random.default_rng(0)
    logits, codes = rng.normal(size=(2, 5, 7)) * 3, rng.integers(0, 7, (2, 5))
    hidden = rng.random((2, 5)) < 0.5
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = -np.where(hidden, np.take_along_axis(log_p, codes[..., None], -1)[..., 0], 0).sum(-1)
    belief = Masked().belief(jnp.asarray(logits, jnp.float32), values=7)
    found = masked.nats(belief, jnp.asarray(codes), jnp.asarray(hidden))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_outputs_beyond_the_values_are_not_read():
    outputs = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 8)), jnp.float32)
    for objective in ("elbo", "score"):
        process = Masked(objective=objective)
        whole, part = (process.belief(each, values=7) for each in (outputs, outputs[..., :7]))
        jax.tree.map(np.testing.assert_array_equal, whole, part)


def test_bound_is_finite_at_the_ends_of_time():
    codes = jnp.zeros((2, 4), jnp.int32)
    t = jnp.array([0.0, 1.0])
    for schedule in SCHEDULES:
        process = Masked(noise=Noise(schedule=schedule))
        noisy = process.corrupt(codes, t, jax.random.split(jax.random.key(0), 2), values=5)
        assert (noisy[0] == 0).all() and (noisy[1] == 5).all()
        assert np.isfinite(process.bound(jnp.ones((2, 4, 5)), codes, noisy, t, values=5)).all()


def test_hiding_takes_its_share_and_each_example_alone():
    b = 2000
    keys = jax.random.split(jax.random.key(1), b)
    codes = jax.random.randint(jax.random.key(2), (b, 16), 0, 9)
    process = Masked(noise=Noise(schedule="polynomial", power=2.0))
    t = jnp.full((b,), math.sqrt(0.3))
    noisy = process.corrupt(codes, t, keys, values=9)
    hidden = noisy == 9
    assert abs(float(hidden.mean()) - 0.3) < 4 * math.sqrt(0.3 * 0.7 / (16 * b))
    np.testing.assert_array_equal(noisy, np.where(hidden, 9, codes))
    few = process.corrupt(codes[5:8], t[5:8], keys[5:8], values=9)
    np.testing.assert_array_equal(few, noisy[5:8])


def test_a_process_checks_itself():
    with pytest.raises(UserError, match="process.objective='nelbo' is unknown; known: elbo, "):
        Masked(objective="nelbo")
