"""Flow on one-hots: times, the bound against exact likelihoods, its samplers, and a student's aim.

The network is exact: of codes whose joint distribution is written down, the posterior given what
is seen of each position is the joint times that.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumerated import CODES, LENGTH, VALUES, joint, variation

from dlc_jax.diffusion.code_sampler import CodeSampler
from dlc_jax.diffusion.flow import Flow, wrong
from dlc_jax.diffusion.noise import Noise
from dlc_jax.errors import UserError
from dlc_jax.models.masked_transformer import MaskedTransformer
from dlc_jax.stages.prior import distill

P = joint(floor=0.1)
HOT = jnp.asarray(np.eye(VALUES)[CODES], jnp.float32)  # [27, l, v]
SMALL = MaskedTransformer(positions=LENGTH, values=VALUES)


def exact(soft, *_):
    """Log chances of each value given all positions, [b, l, v]."""
    chance = jnp.einsum("blv,clv->blc", soft, HOT).prod(1) * jnp.asarray(P, jnp.float32)
    return jnp.log(jnp.einsum("bc,clv->blv", chance, HOT) / chance.sum(1)[:, None, None] + 1e-30)


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


@pytest.mark.parametrize("values", [2, 16, 4096])
def test_at_t_that_share_is_wrong(values):
    """Beyond those that are right by chance."""
    count, process = 200_000 // values + 200, Flow()
    codes = jnp.zeros((count, 8), jnp.int32)
    for t in (0.9, 0.5, 0.1):
        y = process.noisy(codes, jnp.full(count, t), keys(count), values=values)
        found = (jnp.argmax(y, -1) != 0).mean() * values / (values - 1)
        assert abs(found - t) < 5 * math.sqrt(t / codes.size)
    shares, gains = wrong(values)
    assert (np.diff(shares) > 0).all() and (np.diff(gains) < 0).all()
    assert process.gain(jnp.array([1.0, 0.0]), values=values).tolist() == [0, 9]


def test_what_is_seen_is_each_positions_own_posterior():
    """Of those seen as (0.7, 0.2, 0.1), about 0.7 are of the first value."""
    count, process = 40_000, Flow(noise=Noise(schedule="cosine"))
    codes = jax.random.randint(jax.random.key(1), (count, 1), 0, VALUES)
    t = jnp.full(count, 0.1)
    soft = process.corrupt(codes, t, keys(count), values=VALUES)
    np.testing.assert_allclose(soft.sum(-1), 1, rtol=1e-5)
    for low in (0.2, 0.5, 0.8):
        some = (low < soft[:, 0, 0]) & (soft[:, 0, 0] < low + 0.1)
        found = (codes[:, 0] == 0)[some].mean()
        assert abs(found - soft[:, 0, 0][some].mean()) < 4 * math.sqrt(0.25 / some.sum())
    few = process.corrupt(codes[5:8], t[5:8], keys(count)[5:8], values=VALUES)
    np.testing.assert_allclose(few, soft[5:8], rtol=1e-5)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_bound_of_the_exact_mean_is_the_likelihood(schedule):
    process, count = Flow(noise=Noise(schedule=schedule)), 100_000
    t = (jnp.arange(count) + 0.5) / count

    @jax.jit
    def bound(code, shift):
        codes = jnp.tile(code, (count, 1))
        soft = process.corrupt(codes, t, keys(count), values=VALUES)
        return process.bound(exact(soft) + shift, codes, soft, t, values=VALUES)

    for code in (0, 7, 25):
        nats = np.asarray(bound(jnp.asarray(CODES[code]), 0.0), np.float64)
        error = nats.std() / math.sqrt(count)
        assert abs(nats.mean() + math.log(P[code])) < 4 * error + 0.005
    wrong_mean = jnp.array([0.0, 1.0, 0.0])
    each = [bound(jnp.asarray(code), wrong_mean).mean() for code in CODES]
    assert P @ np.asarray(each) > -(P * np.log(P)).sum() + 0.05


def test_what_is_learned_is_the_cross_entropy_of_all_positions():
    outputs = jnp.log(jnp.array([[[0.5, 0.25, 0.25, 9.0], [0.1, 0.1, 0.8, 9.0]]]))
    codes, t = jnp.array([[0, 2]]), jnp.array([0.3])
    soft = jnp.full((1, 2, 3), 1 / 3)
    nats = Flow().loss(outputs, codes, soft, t, values=3)
    np.testing.assert_allclose(nats, -math.log(0.5) - math.log(0.8), rtol=1e-5)


@pytest.mark.parametrize("method", ["ancestral", "euler"])
def test_draws_the_joint_distribution(method):
    count = 20_000

    def draws(calls):
        sampler = CodeSampler(method=method, calls=calls)
        draw = jax.jit(lambda keys: sampler.draw(Flow(), exact, keys, LENGTH, VALUES))
        return draw(keys(count))

    few, many = draws(2), draws(64)
    noise = 0.4 * np.sqrt(P * (1 - P) / count).sum()
    assert variation(many.codes, P) < noise + 0.02 < 0.5 * variation(few.codes, P)
    assert (many.calls == 64).all() and many.codes.dtype == jnp.int32
    one = CodeSampler(method=method, calls=64).draw(Flow(), exact, keys(count)[3:4], 3, 3)
    np.testing.assert_array_equal(one.codes, many.codes[3:4])


def test_with_one_call_each_position_has_its_own_chances():
    count, alone = 20_000, np.einsum("c,clv->lv", P, np.asarray(HOT))
    for method in ("ancestral", "euler"):
        sampler = CodeSampler(method=method, calls=1)
        codes = sampler.draw(Flow(), exact, keys(count), LENGTH, VALUES).codes
        found = np.stack([np.bincount(column, minlength=VALUES) for column in codes.T]) / count
        np.testing.assert_allclose(found, alone, atol=0.015)


def test_a_temperature_leads_to_likely_codes():
    likely = []
    for temperature in (1.0, 0.5, 0.0):
        sampler = CodeSampler(method="euler", calls=16, temperature=temperature)
        codes = sampler.draw(Flow(), exact, keys(4000), LENGTH, VALUES).codes
        likely.append(P[np.ravel_multi_index(np.asarray(codes).T, (VALUES,) * LENGTH)].mean())
    assert likely[0] < likely[1] and likely[0] < likely[2]


def aim(y, t, *, calls, teacher_calls):
    section = distill.Section(model=SMALL, process=Flow(), calls=calls, teacher_calls=teacher_calls)
    said = lambda soft, t: (None, exact(soft))  # noqa: E731
    return jax.jit(lambda y, t: distill.carried(section, said, y, t))(y, t)


def test_one_step_of_a_student_ends_where_its_teachers_do():
    process, count = Flow(), 64
    codes = jnp.asarray(CODES[np.random.default_rng(0).choice(27, count, p=P)])
    t = jnp.full(count, 0.7)
    gain = lambda t: process.gain(jnp.full(count, t), values=VALUES)[:, None, None]  # noqa: E731
    y = process.noisy(codes, t, keys(count), values=VALUES)
    target = aim(y, t, calls=4, teacher_calls=16)
    np.testing.assert_allclose(jnp.exp(target).sum(-1), 1, rtol=1e-5)
    there = y
    for step in range(4):
        now = 0.7 - step / 16
        mean = jnp.exp(exact(process.seen(there, gain(now))))
        there = there + (gain(now - 1 / 16) - gain(now)) * mean
    np.testing.assert_allclose(y + (gain(0.45) - gain(0.7)) * jnp.exp(target), there, atol=1e-4)
    for late in (0.1, 1e-7):  # steps that end beyond the code count for nothing
        assert np.isfinite(aim(y, jnp.full(count, late), calls=4, teacher_calls=16)).all()


def test_what_goes_wrong_is_said():
    with pytest.raises(UserError, match="'maskgit' cannot follow process.name='flow'; those that"):
        CodeSampler(method="maskgit").resolved(Flow(), 8)
    assert CodeSampler(method="auto").resolved(Flow(), 8).method == "ancestral"
    model = MaskedTransformer(positions=2, values=3, width=8, depth=1, heads=1)
    with pytest.raises(UserError, match="soft codes of 4 values do not fit a model of 3"):
        model.init(jax.random.key(0), jnp.zeros((1, 2, 4)))
