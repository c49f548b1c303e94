"""What positions say: information of known joints, swaps by hand, groups, and their picture."""

import json

import numpy as np
import pytest

from dlc_jax.cli import positions as verb
from dlc_jax.evals import positions
from dlc_jax.report import heat


def test_information_of_known_joints():
    a = np.repeat(np.arange(4), 50)  # exactly uniform, 200 of them
    over = 1 / (2 * 200 * np.log(2))  # bits that Miller and Madow add for each cell after the first
    assert positions.entropy(a) == pytest.approx(2 + 3 * over)
    assert positions.entropy(np.zeros(9, int)) == 0
    half = a // 2
    codes = np.stack([a, half, np.zeros(200, int), np.tile(np.arange(2), 100)], 1)
    found = positions.about(codes, np.stack([a, half], 1))
    expected = [[2 + 3 * over, 1 + over], [1 + over, 1 + over], [0, 0]]
    np.testing.assert_allclose(found[:3], expected, atol=1e-12)
    # the last is independent of both: counts agree exactly, and the correction goes below 0
    np.testing.assert_array_equal(found[3], 0)
    shared = positions.among(codes)
    np.testing.assert_array_equal(shared, shared.T)
    np.testing.assert_allclose(shared[0, 1], 1 + over)
    np.testing.assert_allclose(np.diag(shared), [2 + 3 * over, 1 + over, 0, 1 + over])
    assert positions.about(codes, np.empty((200, 0), int)).shape == (4, 0)


def test_the_correction_takes_away_what_independent_positions_seem_to_share():
    random = np.random.default_rng(0)
    codes = random.integers(0, 8, (1000, 20))
    pairs = np.triu_indices(20, 1)
    plain = []
    for i, j in zip(*pairs, strict=True):
        p = np.bincount(8 * codes[:, i] + codes[:, j], minlength=64).reshape(8, 8) / 1000
        outer = p.sum(1, keepdims=True) * p.sum(0)
        plain.append((p[p > 0] * np.log2(p[p > 0] / outer[p > 0])).sum())
    assert np.mean(plain) == pytest.approx(49 / 2000 / np.log(2), rel=0.1)
    assert positions.among(codes)[pairs].mean() < 0.15 * np.mean(plain)


def test_information_of_a_noisy_copy():
    """Of 40 codes of a factor's value 31 copy it, and 3 have each other value."""
    counts = 100 * (28 * np.eye(4, dtype=int) + 3)
    code, factor = (np.repeat(each, counts.ravel()) for each in np.divmod(np.arange(16), 4))
    p = counts / counts.sum()
    exact = (p * np.log2(16 * p)).sum()
    lowered = (16 - 2 * 4 + 1) / (2 * counts.sum() * np.log(2))  # cells of the joint, of each
    found = positions.about(code[:, None], factor[:, None]).item()
    assert found == pytest.approx(exact - lowered) and 0.8 < exact < 0.9


def test_swaps_by_hand():
    """Pixels are 10 times values; the factors are position 0, and whether 1 and 2 are both 1."""
    first = np.array([[0, 0, 0], [1, 0, 0], [2, 0, 3], [0, 1, 0], [0, 0, 1]])
    second = np.array([[1, 1, 1], [1, 1, 1], [2, 0, 1], [0, 1, 1], [0, 1, 1]])

    def decode(codes):
        return (10 * codes).astype(np.uint8)[:, None, :, None]

    def read(images):
        values = images[:, 0, :, 0] // 10
        return np.stack([values[:, 0], (values[:, 1:] == 1).all(1)], 1)

    places = [[0], [1], [2], [1, 2]]
    rms, changed = positions.swaps(first, second, places, decode, read)
    thirds = np.sqrt(100 / 3)  # one of three pixels moves by 10
    last, both = np.sqrt((3 * 100 + 400) / 12), np.sqrt((200 + 200 + 400 + 100 + 100) / 15)
    np.testing.assert_allclose(rms, [thirds, thirds, last, both])
    # factor 0 differs in the first pair alone, which no other position changes
    np.testing.assert_array_equal(changed[:, 0], [1, 0, 0, 0])
    # factor 1 differs in all but the third; of these position 1 in three, and so does position 2
    np.testing.assert_allclose(changed[:, 1], [0, 1 / 3, 1 / 3, 1])
    rms, changed = positions.swaps(first, first, places, decode, read)
    assert np.isnan(rms).all() and np.isnan(changed).all()
    assert positions.swaps(first, second, places, decode)[1] is None


def test_positions_that_say_the_same_are_grouped():
    random = np.random.default_rng(0)
    sources = random.integers(0, 6, (3, 4000))
    of = [0, 1, 0, 2, 1, 1, 0, 2, 2]
    noise = random.random((9, 4000)) < 0.2
    codes = np.where(noise, random.integers(0, 6, (9, 4000)), sources[of]).T
    shared = positions.among(codes)
    groups = [[0, 2, 6], [1, 4, 5], [3, 7, 8]]
    assert positions.clusters(shared, 3) == positions.clusters(shared) == groups
    assert positions.clusters(shared, 1) == [list(range(9))]
    assert len(positions.clusters(shared, 5)) == 5
    information = positions.about(codes, sources[:2].T)
    names = positions.named(groups, information, {"shape": 2.6, "color": 2.6})
    assert names["shape"] == groups[0] and names["color"] == groups[1]
    assert names["c2"] == groups[2]  # it says nothing of either
    twice = positions.named([[0, 2], [6], [1]], information, {"shape": 2.6, "color": 2.6})
    assert twice == {"c0": [0, 2], "c1": [6], "color": [1]}  # two say most of the shape
    none = positions.named(groups, np.empty((9, 0)), {})
    assert none == {"c0": groups[0], "c1": groups[1], "c2": groups[2]}
    dead = np.zeros((50, 1), int)
    assert positions.clusters(positions.among(dead)) == [[0]]
    assert positions.clusters(positions.among(np.repeat(dead, 2, 1)), 2) == [[0], [1]]


def test_numbers_are_drawn_as_colors():
    columns = {"bits": {"a": [0.0, 1.0, 2.0], "b": [np.nan, 0.5, 0.0]}, "rms": {"c": [3.0, 0, 1]}}
    found = heat.table(["0 form", "1", "2"], columns)
    assert found.dtype == np.uint8 and found.ndim == 3
    deep = (found == heat.DEEP).all(-1)
    assert deep.any(1).sum() > 20  # the largest of either group, in two rows
    apart = heat.table(["0 form", "1", "2"], columns, first=2)  # 1 is the largest of the last row
    assert (apart == heat.DEEP).all(-1).sum() > deep.sum()
    grown = heat.table(
        ["0 form", "1", "2"], columns | {"a long title of one column": {"d": [1] * 3}}
    )
    assert grown.shape[1] > found.shape[1] + 2 * heat.SCALE * 64
    square = heat.matrix(np.array([[9.0, 1.0], [1.0, 9.0]]), "shared")
    cells = (square == heat.DEEP).all(-1).sum()
    side = heat.SCALE * heat.MATRIX
    assert 2 * (side - heat.SCALE) ** 2 <= cells <= 2 * side**2  # off the diagonal alone
    beside = heat.beside(found, square)
    assert beside.shape[1] == found.shape[1] + square.shape[1]


def test_a_table_in_print():
    columns = {"bits own": np.array([1.0, np.nan]), "rms image": np.array([12.345, 3.0])}
    lines = verb.text(["0 form", "all form"], columns).splitlines()
    assert lines[:2] == ["1: bits own", "2: rms image"]
    assert lines[3].split() == ["0", "form", "1.00", "12.35"]
    assert lines[4].split() == ["all", "form", "3.00"] and len(lines[3]) == len(lines[4])
    assert (
        json.dumps(verb.listed({"a": {"b": np.ones(2)}, "c": [1]}))
        == '{"a": {"b": [1.0, 1.0]}, "c": [1]}'
    )
