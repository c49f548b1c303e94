"""Code health on codes whose numbers are known."""

import json

import numpy as np
import pytest

from dlc_jax.evals import codes as health


def test_entropy_perplexity_and_dead_entries_by_hand():
    # Position 0 uses 2 of 4 values equally, position 1 always the same one.
    codes = np.array([[0, 3], [1, 3], [0, 3], [1, 3]])
    result = health.health(codes, values=4)
    assert result["entropy"] == pytest.approx(np.log(2) / 2)
    assert (result["entropy_min"], result["entropy_max"]) == pytest.approx((0, np.log(2)))
    assert result["perplexity"] == pytest.approx((2 + 1) / 2 / 4)
    assert result["dead"] == pytest.approx((2 + 3) / 8)
    assert health.health(codes[:2, :1], values=3)["dead"] == pytest.approx(
        1 / 3
    )  # once is not never
    assert result["distinct"] == 0.5 and result["count"] == 4
    assert all(type(number) in (float, int) for number in result.values())


def test_mutual_information_of_equal_independent_and_partly_equal_positions():
    grid = np.array([[a, b] for a in range(4) for b in range(4)])
    assert health.mutual_information(grid[:, 0], grid[:, 1], values=4) == pytest.approx(
        0, abs=1e-12
    )
    assert health.mutual_information(grid[:, 0], grid[:, 0], values=4) == pytest.approx(np.log(4))
    assert health.mutual_information(grid[:, 0], grid[:, 0] // 2, values=4) == pytest.approx(
        np.log(2)
    )


def test_mean_mutual_information_is_over_pairs_and_stands_beside_its_chance_level():
    column = np.random.default_rng(0).integers(0, 4, 4000)
    other = np.random.default_rng(1).integers(0, 4, 4000)
    result = health.health(np.stack([column, column, other], axis=1), values=4)
    # Of the pairs 01, 02, 12 one is equal and two are independent.
    assert result["mutual_information"] == pytest.approx(np.log(4) / 3, abs=0.01)
    assert result["mutual_information_chance"] == pytest.approx(9 / 8000, abs=1e-3)
    assert 0 < result["mutual_information_chance"]


def test_pairs_are_sampled_alike_for_a_seed_and_one_position_has_none():
    codes = np.random.default_rng(2).integers(0, 3, (50, 10))
    assert health.health(codes, values=3, pairs=5, seed=1) == health.health(
        codes, values=3, pairs=5, seed=1
    )
    assert "mutual_information" not in health.health(codes[:, :1], values=3)


def test_agreement_by_hand():
    a, b = np.array([[0, 1], [2, 3], [4, 5], [6, 7]]), np.array([[0, 1], [2, 0], [4, 0], [6, 7]])
    found = health.agreement(a, b, values=8)
    chance = (
        4 * (2 / 8) ** 2 + (2 / 8) ** 2 + (1 / 8) ** 2 + (1 / 8) ** 2 + 2 * (2 / 8) ** 2
    ) / 2  # second position: 0 1 7 twice, 3 5 once
    assert found.pop("chance_positions") == pytest.approx(chance) and found.pop(
        "times_chance"
    ) == pytest.approx(0.75 / chance)
    assert found == {"positions": 0.75, "positions_min": 0.5, "whole": 0.5, "count": 4}
    with pytest.raises(ValueError, match="shapes"):
        health.agreement(a, b[:2], values=8)
    with pytest.raises(ValueError, match="0..6"):
        health.agreement(a, b, values=7)


def test_agreement_of_equal_independent_and_constant_codes():
    random = np.random.default_rng(0)
    a, b = (random.choice(4, p=(0.7, 0.1, 0.1, 0.1), size=(4000, 6)) for _ in range(2))
    equal, independent = health.agreement(a, a, values=4), health.agreement(a, b, values=4)
    assert equal["positions"] == equal["whole"] == 1 and equal["times_chance"] == pytest.approx(
        1 / 0.52, rel=0.02
    )
    assert independent["positions"] == pytest.approx(0.52, abs=0.01) and independent[
        "times_chance"
    ] == pytest.approx(1, abs=0.02)
    assert (
        health.agreement(np.zeros((5, 2), int), np.zeros((5, 2), int), values=4)["times_chance"]
        == 1
    )


@pytest.mark.parametrize(
    "codes", [np.array([[0, 4]]), np.array([[-1, 0]]), np.zeros((0, 3), int), np.zeros(3, int)]
)
def test_bad_codes_are_refused(codes):
    with pytest.raises(ValueError):
        health.health(codes, values=4)


def test_usage_by_hand():
    codes = np.array([[0, 3], [1, 3], [0, 3], [1, 3]])
    found = health.usage(codes, values=4)
    assert found == {
        "values": 4,
        "count": 4,
        "perplexity": [2.0, 1.0],
        "by_rank": [0.75, 0.25, 0.0, 0.0],
    }
    json.dumps(found)


def test_all_numbers_against_counting_one_by_one():
    random = np.random.default_rng(3)
    codes = random.integers(0, 3, (40, 3))
    codes[:, 2] = (codes[:, 0] + (random.random(40) < 0.2)) % 3
    found = health.health(codes, values=4)
    entropies = []
    for i in range(3):
        shares = [np.mean(codes[:, i] == value) for value in range(4)]
        entropies.append(-sum(p * np.log(p) for p in shares if p))
    assert found["entropy"] == pytest.approx(np.mean(entropies))
    assert found["perplexity"] == pytest.approx(
        np.mean([np.exp(entropy) / 4 for entropy in entropies])
    )
    assert found["dead"] == np.mean(
        [not (codes[:, i] == value).any() for i in range(3) for value in range(4)]
    )
    informed = []
    for i, j in ((0, 1), (0, 2), (1, 2)):
        total = 0.0
        for u in range(4):
            for v in range(4):
                both = np.mean((codes[:, i] == u) & (codes[:, j] == v))
                total += (
                    both * np.log(both / np.mean(codes[:, i] == u) / np.mean(codes[:, j] == v))
                    if both
                    else 0
                )
        informed.append(total)
    assert found["mutual_information"] == pytest.approx(np.mean(informed))
