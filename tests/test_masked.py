"""Masked diffusion of codes: the bound against exact likelihoods, the sampler against a joint."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlc_jax.diffusion import masked
from dlc_jax.diffusion.masked import CodeSampler
from dlc_jax.errors import UserError

LENGTH, VALUES = 3, 3
CODES = np.array(list(itertools.product(range(VALUES), repeat=LENGTH)))  # [27, 3]
MASKS = np.array(list(itertools.product([False, True], repeat=LENGTH)))  # [8, 3]


def joint(seed=0):
    return np.random.default_rng(seed).dirichlet(np.full(len(CODES), 0.4))


def conditionals(p):
    """[4 4 4 l v], log p(value of a position | visible values), by noisy code; 3 is the mask."""
    table = np.zeros((VALUES + 1,) * LENGTH + (LENGTH, VALUES))
    for noisy in itertools.product(range(VALUES + 1), repeat=LENGTH):
        fits = np.all((CODES == noisy) | (np.array(noisy) == VALUES), axis=1)
        for position in range(LENGTH):
            for value in range(VALUES):
                table[noisy][position, value] = p[fits & (CODES[:, position] == value)].sum()
    return np.log(table / table.sum(-1, keepdims=True) + 1e-30)


def lookup(table):
    table = jnp.asarray(table, jnp.float32)
    return lambda noisy: table[tuple(noisy[:, i] for i in range(LENGTH))]


def order_average(table, code):
    """-log p(code) from `table`, averaged over all orders in which positions can be revealed."""
    total = 0.0
    for order in itertools.permutations(range(LENGTH)):
        noisy = [VALUES] * LENGTH
        for position in order:
            total -= table[tuple(noisy)][position, code[position]]
            noisy[position] = code[position]
    return total / math.factorial(LENGTH)


def expected_bound(table, code):
    """The mean of `masked.bound` over t (Gauss-Legendre) and every mask, weighted by its chance."""
    nodes, weights = np.polynomial.legendre.leggauss(24)
    t, weights = np.repeat((nodes + 1) / 2, len(MASKS)), np.repeat(weights / 2, len(MASKS))
    hidden = np.tile(MASKS, (len(nodes), 1))
    codes = np.tile(code, (len(t), 1))
    chance = np.where(hidden, t[:, None], 1 - t[:, None]).prod(1)
    logits = lookup(table)(np.where(hidden, VALUES, codes))
    codes, hidden, t = jnp.asarray(codes), jnp.asarray(hidden), jnp.asarray(t, jnp.float32)
    values = masked.bound(logits, codes, hidden, t)
    return (weights * chance * np.asarray(values, np.float64)).sum()


def test_bound_of_the_exact_model_is_the_likelihood():
    p = joint()
    table = conditionals(p)
    for index in (0, 7, 25):
        assert expected_bound(table, CODES[index]) == pytest.approx(-math.log(p[index]), rel=1e-5)


def test_bound_of_any_model_is_the_average_over_orders():
    table = np.random.default_rng(1).normal(size=(VALUES + 1,) * LENGTH + (LENGTH, VALUES))
    table -= np.log(np.exp(table).sum(-1, keepdims=True))
    for index in (3, 20):
        expected = order_average(table, CODES[index])
        assert expected_bound(table, CODES[index]) == pytest.approx(expected, rel=1e-5)


def test_bound_on_average_is_at_least_the_entropy():
    p = joint()
    wrong = conditionals(joint(5))
    bound = sum(p[i] * expected_bound(wrong, CODES[i]) for i in range(len(CODES)))
    assert bound > -(p * np.log(p)).sum() + 0.1


def test_cross_entropy_against_numpy():
    rng = np.random.default_rng(0)
    logits, codes = rng.normal(size=(2, 5, 7)) * 3, rng.integers(0, 7, (2, 5))
    hidden = rng.random((2, 5)) < 0.5
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.where(hidden, np.take_along_axis(log_p, codes[..., None], -1)[..., 0], 0).sum(-1)
    found = masked.cross_entropy(
        jnp.asarray(logits, jnp.float32), jnp.asarray(codes), jnp.asarray(hidden)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    uniform = masked.cross_entropy(
        jnp.zeros((1, 6, 8)), jnp.zeros((1, 6), jnp.int32), jnp.ones((1, 6), bool)
    )
    assert float(uniform[0]) == pytest.approx(6 * math.log(8))


def test_bound_is_finite_at_the_ends_of_time():
    codes = jnp.zeros((2, 4), jnp.int32)
    t = jnp.array([0.0, 1.0])
    noisy, hidden = masked.mask_codes(codes, t, jax.random.split(jax.random.key(0), 2), values=5)
    assert not hidden[0].any() and hidden[1].all()
    assert (noisy[0] == 0).all() and (noisy[1] == 5).all()
    assert np.isfinite(masked.bound(jnp.ones((2, 4, 5)), codes, hidden, t)).all()


def test_mask_codes_hides_its_share_and_each_example_alone():
    b = 2000
    keys = jax.random.split(jax.random.key(1), b)
    codes = jax.random.randint(jax.random.key(2), (b, 16), 0, 9)
    t = jnp.full((b,), 0.3)
    noisy, hidden = masked.mask_codes(codes, t, keys, values=9)
    assert abs(float(hidden.mean()) - 0.3) < 4 * math.sqrt(0.3 * 0.7 / (16 * b))
    np.testing.assert_array_equal(noisy, np.where(hidden, 9, codes))
    few, _ = masked.mask_codes(codes[5:8], t[5:8], keys[5:8], values=9)
    np.testing.assert_array_equal(few, noisy[5:8])


def chi_square(codes, p):
    counts = np.bincount(
        np.ravel_multi_index(np.asarray(codes).T, (VALUES,) * LENGTH), minlength=len(CODES)
    )
    return ((counts - len(codes) * p) ** 2 / (len(codes) * p)).sum()


def test_one_position_a_call_samples_the_joint_distribution():
    p = joint() * 0.9 + 0.1 / len(CODES)
    logits_fn = lookup(conditionals(p))
    keys = jax.random.split(jax.random.key(3), 20_000)

    @functools.partial(jax.jit, static_argnums=0)
    def draw(calls):
        return CodeSampler(calls=calls).draw(logits_fn, keys, LENGTH, VALUES)

    limit = 26 + 4 * math.sqrt(
        2 * 26
    )  # four standard deviations of chi-square with 26 degrees of freedom
    assert chi_square(draw(LENGTH), p) < limit
    marginals = np.exp(conditionals(p)[(VALUES,) * LENGTH])
    independent = np.prod([marginals[i, CODES[:, i]] for i in range(LENGTH)], axis=0)
    assert chi_square(draw(1), independent) < limit
    assert chi_square(draw(1), p) > 10 * limit  # the test sees the difference
    np.testing.assert_array_equal(draw(50), draw(LENGTH))
    np.testing.assert_array_equal(draw(0), draw(LENGTH))


def watched(length, values, calls, b=3, known=None):
    """The noisy codes that each call of the network saw."""
    seen = []

    def logits_fn(noisy):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), noisy, ordered=True)
        return jnp.zeros(noisy.shape + (values,))

    keys = jax.random.split(jax.random.key(4), b)
    prompt = None if known is None else jnp.full((b, length), 1, jnp.int32)
    draw = functools.partial(CodeSampler(calls=calls).draw, prompt=prompt, known=known)
    out = jax.jit(lambda keys: draw(logits_fn, keys, length, values))(keys)
    jax.effects_barrier()
    return seen + [np.asarray(out)]


@pytest.mark.parametrize("calls", [1, 3, 5, 7])
def test_every_call_reveals_its_share_and_changes_nothing_else(calls):
    states = watched(7, 4, calls)
    runs = min(calls, 7)
    assert len(states) == runs + 1
    assert (states[0] == 4).all() and (states[-1] < 4).all()
    for index, (before, after) in enumerate(itertools.pairwise(states)):
        np.testing.assert_array_equal(
            (before == 4).sum(1) - (after == 4).sum(1), (index + 1) * 7 // runs - index * 7 // runs
        )
        np.testing.assert_array_equal(after[before < 4], before[before < 4])


def test_known_positions_stay_and_the_rest_is_spread_over_the_calls():
    known = jnp.array([[True] * 7, [True, False] * 3 + [True], [False] * 7])
    states = watched(7, 4, 3, known=known)
    assert all((state[known] == 1).all() for state in states)
    assert (states[-1] < 4).all()
    left = np.array([(state == 4).sum(1) for state in states])
    np.testing.assert_array_equal(left, [[0, 3, 7], [0, 2, 5], [0, 1, 3], [0, 0, 0]])


def test_a_sample_depends_on_its_key_alone():
    logits_fn = lookup(conditionals(joint()))
    keys = jax.random.split(jax.random.key(6), 9)
    draw = jax.jit(lambda keys: CodeSampler(calls=2).draw(logits_fn, keys, LENGTH, VALUES))
    whole = draw(keys)
    parts = [draw(keys[i : i + 3]) for i in range(0, 9, 3)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert len(np.unique(whole, axis=0)) > 1


def test_orders_differ_between_examples():
    first = [tuple(row < 4) for row in watched(7, 4, 7, b=30)[1]]
    assert len(set(first)) == 7


def test_temperature_zero_takes_the_likeliest_value():
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(1, 6, 5)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 4)
    draw = CodeSampler(calls=2, temperature=0.0).draw
    out = jax.jit(lambda keys: draw(lambda _: jnp.broadcast_to(logits, (4, 6, 5)), keys, 6, 5))(
        keys
    )
    np.testing.assert_array_equal(out, np.broadcast_to(logits.argmax(-1), (4, 6)))


def test_noise_of_a_position_is_the_same_in_any_number_of_calls():
    def draw(keys):
        logits = jnp.zeros((4, 6, 5))
        return [CodeSampler(calls=calls).draw(lambda _: logits, keys, 6, 5) for calls in (1, 6)]

    one, many = jax.jit(draw)(jax.random.split(jax.random.key(0), 4))
    np.testing.assert_array_equal(one, many)
    assert len(np.unique(one, axis=0)) == 4


def test_temperature_divides_the_logits():
    p = np.array([0.7, 0.2, 0.1])
    logits = jnp.asarray(np.log(p), jnp.float32)
    keys = jax.random.split(jax.random.key(8), 10_000)
    draw = CodeSampler(temperature=2.0).draw
    out = jax.jit(
        lambda keys: draw(lambda _: jnp.broadcast_to(logits, (10_000, 1, 3)), keys, 1, 3)
    )(keys)
    expected = np.sqrt(p) / np.sqrt(p).sum()
    np.testing.assert_allclose(
        np.bincount(np.asarray(out)[:, 0], minlength=3) / 10_000, expected, atol=0.02
    )


def test_noise_has_the_high_range(monkeypatch):
    # In the common mode noise ends at 16, and a value of chance 1e-7 is drawn about half as often
    # as it should be. Seeing that would take a billion draws, hence a look at the call.
    asked = []
    real = jax.random.gumbel

    def gumbel(key, shape, *a, mode=None):
        asked.append((shape, mode))
        return real(key, shape, *a, mode=mode)

    monkeypatch.setattr(jax.random, "gumbel", gumbel)
    keys, draw = jax.random.split(jax.random.key(9), 2), CodeSampler(calls=3).draw
    jax.make_jaxpr(lambda keys: draw(lambda _: jnp.zeros((2, 6, 50)), keys, 6, 50))(keys)
    assert set(asked) == {((50,), "high")}


def test_a_code_sampler_checks_itself():
    for wrong, words in [
        ({"calls": -1}, "sampler.calls=-1 must be at least 0"),
        ({"temperature": -0.5}, "sampler.temperature=-0.5 must be"),
        ({"order": "confidence"}, "sampler.order='confidence' is unknown; known: random"),
    ]:
        with pytest.raises(UserError, match=words):
            CodeSampler(**wrong)
    keys = jax.random.split(jax.random.key(0), 2)
    with pytest.raises(ValueError, match="together"):
        CodeSampler().draw(lambda _: None, keys, 3, 3, known=jnp.ones((2, 3), bool))
