"""Rates of factors, counted by hand and by brute force."""

import itertools
from typing import NamedTuple

import numpy as np
import pytest

from dlc_jax.evals.factors import Factors


class Reading(NamedTuple):
    factors: np.ndarray
    valid: np.ndarray
    distance: np.ndarray


class Judge:
    """Takes factors for images: those of a negative sum are invalid."""

    held_out = ((0, 0), (5, 5), (3, 0))

    def read(self, images):
        images = np.asarray(images)
        return Reading(np.abs(images), images.sum(1) >= 0, np.arange(len(images), dtype=float))

    def proof(self, count):
        return {"accepted": 1.0, "count": count}


def test_without_a_judge_there_are_no_rates():
    nothing, images = Factors(None, ("shape",), (4,)), np.zeros((2, 1), int)
    assert nothing.unconditional(images) == nothing.composition([images] * 2, images) == {}
    assert nothing.reconstruction(None, images, images) == ({}, {}) and nothing.proof(3) == {}


def test_proof_is_the_judges():
    assert Factors(Judge(), ("shape",), (4,)).proof(7) == {"accepted": 1.0, "count": 7}


def test_reconstruction_by_hand():
    true = np.array([[0, 1], [2, 3], [4, 5], [0, 0]])
    decoded, real = np.array([[0, 1], [2, 0], [-4, 0], [1, 1]]), np.array([*true[:3], [0, 2]])
    rates = Factors(Judge(), ("shape", "color"), (5, 6)).reconstruction(true, real, decoded)
    common = {"count": 4, "distance": 1.5}
    assert rates == (
        {"shape": 0.75, "color": 0.25, "all": 0.25, "valid": 0.75} | common,
        {"shape": 1.0, "color": 0.75, "all": 0.75, "valid": 1.0} | common,
    )


def test_unconditional_by_hand():
    images = np.array([[0, 0, 0], [-1, 0, 0], [2, 0, 1], [3, 0, 1]])
    rates = Factors(Judge(), ("shape", "color", "size"), (4, 6, 2)).unconditional(images)
    assert rates == {
        "valid": 0.75,
        "entropy_shape": pytest.approx(1),
        "values_shape": 4,
        "valid_values_shape": 3,
        "entropy_color": 0,
        "values_color": 1,
        "valid_values_color": 1,
        "entropy_size": pytest.approx(1),
        "values_size": 2,
        "valid_values_size": 2,
        "held_out": 0.5,
        "chance_held_out": pytest.approx(3 / 24),
        "count": 4,
        "distance": 1.5,
    }


def test_nothing_is_held_out_of_a_set_without_such_combinations():
    judge = Judge()
    judge.held_out = ()
    half = Factors(judge, ("shape",), (4,)).unconditional(np.array([[0], [1]]))
    assert half["entropy_shape"] == pytest.approx(0.5) and "held_out" not in half


def score(parents, children, names, classes):
    return Factors(Judge(), names, classes).composition(parents, children)


def test_composition_of_pairs_by_hand():
    a, b = np.array([[0, 0]] * 4), np.array([[1, 1]] * 4)
    child = np.array([[0, 1], [0, 0], [1, -5], [5, 5]])  # both; A alone; B and neither; neither
    assert score([a, b], child, ("shape", "color"), (6, 6)) == {
        "shape_from_parents": 0.75,
        "chance_shape_from_parents": pytest.approx(2 / 6),
        "color_from_parents": 0.5,
        "chance_color_from_parents": pytest.approx(2 / 6),
        "both_parents": 0.25,
        "chance_both_parents": pytest.approx(2 / 36),
        "success": 0.25,
        "chance_success": pytest.approx(2 / 36),
        "count": 4,
        "valid": 0.75,
    }


def test_a_value_that_both_parents_have_is_from_neither_alone():
    a, b, child = np.array([[2, 0]]), np.array([[2, 1]]), np.array([[2, 1]])
    result = score([a, b], child, ("shape", "color"), (6, 6))
    assert result["shape_from_parents"] == 1
    assert result["chance_shape_from_parents"] == pytest.approx(1 / 6)
    assert result["both_parents"] == 0 and result["chance_both_parents"] == pytest.approx(0)


@pytest.mark.parametrize(
    "parents",
    [
        [(0, 0, 0), (1, 1, 1)],
        [(0, 0, 0), (1, 0, 1)],
        [(0, 0, 0), (1, 1, 1), (2, 2, 2)],
        [(0, 0, 0), (1, 1, 1), (1, 2, 3)],
    ],
)
def test_chance_levels_are_those_of_all_children(parents):
    classes, names = (4, 3, 5), ("a", "b", "c")
    child = np.array(list(itertools.product(*map(range, classes))))
    result = score([np.tile(parent, (len(child), 1)) for parent in parents], child, names, classes)
    every = "both_parents" if len(parents) == 2 else "all_parents"
    for key in [f"{name}_from_parents" for name in names] + [every]:
        assert result[f"chance_{key}"] == pytest.approx(result[key]), key


@pytest.mark.parametrize(
    "parents",
    [
        [(0, 0, 0, 0), (1, 1, 1, 1)],
        [(0, 0, 0, 0), (1, 0, 1, 0)],
        [(0, 0, 0, 0), (1, 1, 1, 1), (2, 2, 2, 0)],
        [(0, 0, 0, 0), (1, 1, 1, 1), (1, 2, 3, 0)],
    ],
)
def test_success_and_its_chance_are_those_of_all_children(parents):
    """Of factors with more values than parents; each a parent's, and every parent shows in them."""
    classes, names = (5, 4, 6, 2), ("a", "b", "c", "size")
    child = np.array(list(itertools.product(*map(range, classes))))
    result = score([np.tile(parent, (len(child), 1)) for parent in parents], child, names, classes)
    columns = np.array(parents)[:, :3]
    expected = []
    for row in child[:, :3]:
        shows = [
            any(row[f] == own[f] and (columns[:, f] == own[f]).sum() == 1 for f in range(3))
            for own in columns
        ]
        expected.append(all(row[f] in columns[:, f] for f in range(3)) and all(shows))
    assert result["success"] == pytest.approx(np.mean(expected))
    assert result["chance_success"] == pytest.approx(np.mean(expected))


def test_the_chance_of_success_in_the_shapes():
    """Six shapes, six colors, four backgrounds: 1/3 1/3 1/2, less both cases of one parent only."""
    a, b = np.zeros((1, 4), int), np.ones((1, 4), int)
    names, classes = ("shape", "color", "background", "size"), (6, 6, 4, 2)
    result = score([a, b], np.array([[0, 0, 1, 0]]), names, classes)
    assert result["chance_success"] == pytest.approx(1 / 18 - 2 / 144) and result["success"] == 1
    for child in ([0, 0, 0, 1], [0, 2, 1, 0], [0, 0, -1, 0]):  # size alone; neither's; invalid
        assert score([a, b], np.array([child]), names, classes)["success"] == 0


def test_how_well_bits_tell_success():
    a, b, names = np.zeros((5, 2), int), np.ones((5, 2), int), ("shape", "color")
    child = np.array([[0, 1], [1, 0], [0, 0], [1, 1], [3, 3]])
    rate = Factors(Judge(), names, (6, 6)).composition
    bits = np.array([1.0, 3.0, 2.0, 3.0, 4.0])
    found = rate([a, b], child, bits)
    assert found["bits"] == 2.6 and found["auc_bits"] == pytest.approx((3 + 0 + 0.5 + 1) / 6)
    assert found["auc_bits"] == pytest.approx(1 - rate([a, b], child, -bits)["auc_bits"])
    assert "auc_bits" not in rate([a[:2], b[:2]], child[:2], bits[:2])  # all succeed
