"""Drawn codes beside real ones: counts by hand, and a classifier that sees pairs of positions."""

import numpy as np
import pytest
from scipy import stats

from dlc_jax.evals import two_samples
from dlc_jax.evals.code_likeness import copies, likeness

LENGTH, VALUES = 16, 4


def counted(shares, total=20):
    """Codes [total, l] with exactly these shares of outcomes, {code: share}."""
    rows = [np.tile(code, (round(share * total), 1)) for code, share in shares.items()]
    return np.concatenate(rows)


def test_variation_and_entropy_of_an_enumerated_distribution():
    """Two fair positions that are equal, beside two that are independent, and an unfair one."""
    real = counted({(0, 0, 0): 0.5, (1, 1, 0): 0.25, (1, 1, 2): 0.25})
    drawn = counted({(a, b, 0): 0.25 for a in (0, 1) for b in (0, 1)})
    found = likeness(drawn, real, values=3)
    # pairs: 0.5 of the mass is where the real pair never is; (0, 0), (1, 0), (1, 2) against halves
    assert found == pytest.approx(
        {
            "unigram": (0 + 0 + 0.25) / 3,
            "pairwise": (0.5 + 0.25 + 0.25) / 3,
            "entropy": (1 + 1 + 0) / 3,
            "entropy_real": (1 + 1 + (0.75 * np.log2(4 / 3) + 0.25 * 2)) / 3,
        }
    )


def test_pairs_are_those_of_two_positions_and_a_choice_of_them():
    random = np.random.default_rng(0)
    drawn, real = (random.integers(0, VALUES, (count, 6)) for count in (300, 200))
    tables = []
    for i in range(6):
        for j in range(i):
            edges = [np.arange(VALUES + 1) - 0.5] * 2
            joint = [np.histogram2d(x[:, i], x[:, j], edges)[0] / len(x) for x in (drawn, real)]
            tables.append(np.abs(joint[0] - joint[1]).sum() / 2)
    assert likeness(drawn, real, values=VALUES)["pairwise"] == pytest.approx(np.mean(tables))
    one = likeness(drawn, real, values=VALUES, pairs=1, seed=3)["pairwise"]
    assert min(abs(one - np.array(tables))) < 1e-12
    assert "pairwise" not in likeness(drawn[:, :1], real[:, :1], values=VALUES)


def test_copies_are_whole_codes_and_types_do_not_matter():
    training = np.uint8([[0, 1], [2, 3], [2, 3]])
    drawn = np.int32([[0, 1], [0, 1], [1, 0], [2, 1]])
    assert copies(drawn, training) == {"copies": 0.5, "distinct": 0.75}


def tied(count, seed=0):
    """Codes whose second half follows from the first, in another order of values a position."""
    random = np.random.default_rng(seed)
    half = random.integers(0, VALUES, (count, LENGTH // 2))
    order = np.stack([np.random.default_rng(i).permutation(VALUES) for i in range(LENGTH // 2)])
    return np.concatenate([half, order[np.arange(LENGTH // 2), half]], 1)


def loosened(codes):
    """Each position by itself as before, and independent of the others."""
    random = np.random.default_rng(1)
    return np.stack([random.permutation(column) for column in codes.T], 1)


def test_the_classifier_tells_nothing_of_two_draws_of_one_distribution():
    area, error = two_samples.auc(tied(1000), tied(1000, seed=1), values=VALUES)
    assert abs(area - 0.5) < 4 * error and 0.01 < error < 0.03


def test_the_classifier_sees_pairs_of_positions():
    """Of independent draws of the very values, which no single position can tell."""
    real = tied(1000)
    drawn = loosened(real)
    assert likeness(drawn, real, values=VALUES)["unigram"] == 0
    area, error = two_samples.auc(drawn, real, values=VALUES)
    assert area > 0.98 and error < 0.01
    swapped, _ = two_samples.auc(real, drawn, values=VALUES)
    assert swapped > 0.98  # whichever is called real


def test_the_classifier_comes_near_the_best_there_is_on_single_positions():
    """The best one counts how often the commoner value occurs; this one learns from 500 codes."""
    random = np.random.default_rng(2)
    skewed = random.choice(VALUES, (1000, LENGTH), p=(0.55, 0.15, 0.15, 0.15))
    even = random.integers(0, VALUES, (1000, LENGTH))
    best, _ = two_samples.area((even == 0).sum(1), (skewed == 0).sum(1))
    area, error = two_samples.auc(even, skewed, values=VALUES)
    assert best - 0.05 < area < best + 4 * error
    best, _ = two_samples.area(even[:, 0] == 0, skewed[:, 0] == 0)
    area, error = two_samples.auc(even[:, :1], skewed[:, :1], values=VALUES)
    assert abs(area - best) < 4 * error < best - 0.5  # where there are no pairs


def test_the_area_and_its_error_are_those_of_many_repetitions():
    random = np.random.default_rng(0)
    areas, errors = np.transpose(
        [two_samples.area(random.normal(0, 1, 60), random.normal(1, 1, 90)) for _ in range(4000)]
    )
    assert areas.mean() == pytest.approx(stats.norm.cdf(1 / np.sqrt(2)), abs=0.003)
    assert errors.mean() == pytest.approx(areas.std(), rel=0.05)


def test_ties_count_half():
    assert two_samples.area(np.zeros(4), np.zeros(3)) == (0.5, 0.0)
    assert two_samples.area(np.array([0, 1]), np.array([1, 2]))[0] == 7 / 8


def test_refused():
    codes = tied(8)
    with pytest.raises(ValueError, match="0..2"):
        likeness(codes, codes, values=3)
    with pytest.raises(ValueError, match=r"\(8, 16\) and \(8, 15\)"):
        likeness(codes, codes[:, 1:], values=VALUES)
    with pytest.raises(ValueError, match="3 and 8"):
        two_samples.auc(codes[:3], codes, values=VALUES)
