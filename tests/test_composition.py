"""Choosing parents and mixing their codes."""

import functools
import itertools

import numpy as np
import pytest

from dlc_jax.composition import mix as mixed_codes
from dlc_jax.composition.mix import PRIOR, kept, mix, mixing
from dlc_jax.errors import UserError
from dlc_jax.evals import composition

CLASSES = (6, 6, 4, 2)


def _factors(count, seed=0):
    draws = [np.random.default_rng([seed, k]) for k in range(len(CLASSES))]
    return np.stack([draw.integers(0, n, count) for draw, n in zip(draws, CLASSES)], axis=1)


def test_pairs_differ_in_every_factor():
    factors = _factors(200)
    pairs = composition.choose_parents(factors, 64, parents=2, seed=3)
    assert pairs.shape == (64, 2)
    assert np.all(factors[pairs[:, 0]] != factors[pairs[:, 1]])
    np.testing.assert_array_equal(pairs, composition.choose_parents(factors, 64, parents=2, seed=3))
    assert np.any(pairs != composition.choose_parents(factors, 64, parents=2, seed=4))


def test_three_parents_differ_among_each_other():
    factors = _factors(200)[:, :3]
    chosen = factors[composition.choose_parents(factors, 32, parents=3, seed=0)]  # [32 3 f]
    for i, j in itertools.combinations(range(3), 2):
        assert np.all(chosen[:, i] != chosen[:, j])


def test_impossible_groups_are_refused():
    with pytest.raises(ValueError, match="2 values"):
        composition.choose_parents(_factors(100), 4, parents=3, seed=0)
    # each factor varies, but no two rows differ in all
    rows = np.array([[0, 0, 0], [1, 1, 0], [1, 0, 1], [0, 1, 1]])
    with pytest.raises(ValueError, match="found 0 of 4"):
        composition.choose_parents(rows, 4, parents=2, seed=0)


def test_mix_copies_each_position_from_a_parent_in_the_weights_proportion():
    a, b = np.zeros((400, 50), np.uint8), np.ones((400, 50), np.uint8)
    even = mix([a, b], seed=1)
    assert even.dtype == np.uint8 and even.shape == a.shape
    assert even.mean() == pytest.approx(0.5, abs=0.02)  # standard error 0.0035
    assert mix([a, b], seed=1, weights=(1, 3)).mean() == pytest.approx(0.75, abs=0.02)
    np.testing.assert_array_equal(mix([a, b], seed=1, weights=(0, 2)), b)
    np.testing.assert_array_equal(mix([a, b], seed=1, weights=(1, 0)), a)
    assert not np.array_equal(even[0], even[1])
    three = mix([a, b, b + 1], seed=2)
    np.testing.assert_allclose(np.bincount(three.ravel()) / three.size, 1 / 3, atol=0.02)


def test_mix_where_parents_agree_changes_nothing():
    codes = np.random.default_rng(0).integers(0, 9, (10, 6))
    np.testing.assert_array_equal(mix([codes, codes], seed=5), codes)


def test_simplices_are_drawn_from_their_weighted_mean():
    random = np.random.default_rng(0)
    a, b = random.dirichlet(np.ones(5), (2, 7)).astype(np.float32)  # [7 positions, 5 values] each
    mixed = mix([np.broadcast_to(part, (6000, 7, 5)) for part in (a, b)], seed=3, weights=(1, 3))
    found = (mixed[..., None] == np.arange(5)).mean(0)
    np.testing.assert_allclose(found, (a + 3 * b) / 4, atol=0.03)  # standard error at most 0.0065
    one, two = (mixed[:, position, None] == np.arange(5) for position in (0, 1))
    together = (one[:, :, None] & two[:, None]).mean(0)  # positions are independent
    np.testing.assert_allclose(together, np.outer(found[0], found[1]), atol=0.03)


def test_simplices_near_their_corners_mix_as_their_codes():
    codes = np.random.default_rng(0).integers(0, 9, (3, 40, 12))
    corners = np.eye(9, dtype=np.float32)[codes]
    of = functools.partial(mix, seed=4, weights=(1, 2, 3), keep=(2,))
    np.testing.assert_array_equal(of([*corners]), of([*codes]))
    np.testing.assert_array_equal(of([codes[0], *corners[1:]]), of([*codes]))


def test_values_without_probability_are_never_drawn():
    simplices = np.zeros((5000, 1, 4), np.float32)
    simplices[..., 1:3] = 0.5
    assert set(mix([simplices], seed=0).ravel()) == {1, 2}
    ends = [mixed_codes._drawn(simplices[:1], np.full((1, 1), end)) for end in (0, 1 - 2.0**-53)]
    assert [int(end.item()) for end in ends] == [1, 2]


def test_kept_positions_are_the_first_parents():
    random = np.random.default_rng(0)
    a, b = random.integers(0, 4, (2, 300, 10))
    held, free = mix([a, b], seed=1, keep=(0, 7)), mix([a, b], seed=1)
    np.testing.assert_array_equal(held[:, [0, 7]], a[:, [0, 7]])
    others = [position for position in range(10) if position not in (0, 7)]
    # what is kept does not change the other draws
    np.testing.assert_array_equal(held[:, others], free[:, others])
    soft = random.dirichlet(np.ones(4), (300, 10))
    np.testing.assert_array_equal(mix([soft, b], seed=1, keep=range(10)), soft.argmax(-1))
    for outside in ((10,), (-1,)):
        with pytest.raises(UserError, match=rf"0\.\.9; got {outside[0]}"):
            mix([a, b], seed=1, keep=outside)


def test_a_part_mixes_as_in_the_whole():
    random = np.random.default_rng(0)
    a, b = random.integers(0, 9, (2, 20, 8))
    whole = mix([a, b], seed=7)
    part = mix([a[5:9], b[5:9]], seed=7, position=np.arange(5, 9))
    np.testing.assert_array_equal(part, whole[5:9])
    assert mix([a[:0], b[:0]], seed=7).shape == (0, 8)


@pytest.mark.parametrize("weights", [(1,), (1, -1), (0, 0), (np.nan, 1)])
def test_bad_weights_are_refused(weights):
    with pytest.raises(UserError, match="weights"):
        mix([np.zeros((1, 1), int)] * 2, seed=0, weights=weights)


def test_a_deal_gives_every_parent_its_count_and_the_rest_to_the_prior():
    parents, free = [np.zeros((600, 10), int)] * 2, np.arange(10) % 5 != 2
    one = np.arange(10)
    owner = mixing(parents, seed=0, keep=(2, 7)).dealt((3, 2), one)
    assert (owner[:, ~free] == 0).all()
    for whose, count in ((0, 3), (1, 2), (PRIOR, 3)):
        found = owner[:, free] == whose
        assert (found.sum(1) == count).all()
        np.testing.assert_allclose(found.mean(0), count / 8, atol=0.08)  # standard error 0.02
    few = mixing(parents, seed=0, keep=range(7)).dealt((2, 5), one)[:, 7:]
    assert ((few == 0).sum(1) == 2).all() and ((few == 1).sum(1) == 1).all()
    pairs = mixing(parents, seed=0).dealt((1, 2), one // 2).reshape(-1, 5, 2)
    assert (pairs[..., 0] == pairs[..., 1]).all()
    assert ((pairs[..., 0] == 1).sum(1) == 2).all() and ((pairs[..., 0] == PRIOR).sum(1) == 2).all()
    some = [parent[5:8] for parent in parents]
    part = mixing(some, seed=0, keep=(2, 7), position=np.arange(5, 8)).dealt((3, 2), one)
    np.testing.assert_array_equal(part, owner[5:8])
    assert (mixing(parents, seed=1, keep=(2, 7)).dealt((3, 2), one) != owner).any()


def test_what_is_kept_is_told_by_positions_or_by_masks():
    mask = np.array([True, False, True])
    for keep in ([0, 2], (2, 0), range(0, 3, 2), mask, np.tile(mask, (4, 1))):
        np.testing.assert_array_equal(kept(keep, (4, 3)), np.tile(mask, (4, 1)))
    assert not kept((), (4, 3)).any()
    parents = [np.zeros((4, 3), int), np.ones((4, 3), int)]
    mixed = mix(parents, seed=0, weights=(0, 1), keep=mask)
    np.testing.assert_array_equal(mixed, np.tile([0, 1, 0], (4, 1)))
