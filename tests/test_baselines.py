"""The benchmark of conditions: how children are made, and what is counted of them."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from commands import ROOT

from dlc_jax.data import shapes
from dlc_jax.evals.factors import Factors

_spec = importlib.util.spec_from_file_location("children", ROOT / "benchmarks" / "children.py")
children = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(children)
NAMES, CLASSES = ("shape", "color", "background", "size"), (6, 6, 4, 2)
FACTORS = np.array([[0, 1, 2, 0], [3, 4, 1, 1], [5, 0, 3, 0]])
OTHERS = np.array([[2, 3, 0, 1], [1, 5, 0, 0], [4, 2, 1, 1]])


def test_slerp_goes_along_the_arc():
    a, b = np.array([[2.0, 0.0], [3.0, 0.0]]), np.array([[0.0, 4.0], [3.0, 0.0]])
    np.testing.assert_allclose(children.slerp(a, b), [[3 / 2**0.5] * 2, [3.0, 0.0]], rtol=1e-6)


def test_a_child_of_factors_has_each_from_a_parent_and_shows_both():
    first, second = np.tile(FACTORS, (200, 1)), np.tile(OTHERS, (200, 1))
    found = children.assigned(first, second, 0)
    own = found == first
    assert (own | (found == second)).all()
    known = own[:, :3]
    assert known.any(1).all() and not known.all(1).any()
    assert set(map(tuple, known[::3].tolist())) == {
        (a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1) if 0 < a + b + c < 3
    }
    np.testing.assert_array_equal(found, children.assigned(first, second, 0))
    assert (found != children.assigned(first, second, 1)).any()


def test_labels_number_the_combinations_that_training_shows():
    seen = shapes.combinations(held_out=False)
    with_size = np.concatenate([seen, np.ones((len(seen), 1), np.int32)], 1)
    np.testing.assert_array_equal(children.label_of(with_size), np.arange(len(seen)))
    with pytest.raises(ValueError, match="never showed"):
        children.label_of(np.array([[*shapes.HELD_OUT[3], 0]]))
    assert children.held_out(shapes.combinations(held_out=True)).all()
    assert not children.held_out(seen.reshape(2, 61, 3)).any()


def test_distinct_counts_only_what_counts():
    factors = np.array([[[0], [1]], [[0], [2]], [[3], [1]]])  # three draws of two pairs
    counts = np.array([[True, True], [True, False], [True, True]])
    np.testing.assert_array_equal(children.distinct(factors, counts), [2, 1])


def test_the_interval_is_that_of_a_mean_over_pairs():
    values = np.random.default_rng(1).normal(0.3, 0.2, 400)
    low, high = children.interval(values)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=2e-3)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.1)


def test_a_line_of_the_table_by_hand():
    """Two seeds with two draws of three pairs."""
    mixed = FACTORS.copy()
    mixed[:, 1] = OTHERS[:, 1]  # (0, 3, 2), (3, 5, 1), (5, 2, 3): each a success
    assert children.held_out(mixed[:, :3]).tolist() == [False, False, False]
    none = FACTORS.copy()  # of one parent
    row = {"factors": [mixed.tolist(), none.tolist()], "asked": None}
    row["valid"] = [[True, True, False], [True] * 3]
    other = row | {"factors": [mixed.tolist()] * 2, "asked": None}
    rates = Factors(None, NAMES, CLASSES)
    cells = children.measured([row, other], [FACTORS, OTHERS], rates)
    success, interval, by_seed, valid, shape, color, background, size, every, good, new, *_ = cells
    assert (success, by_seed, valid) == ("58.3", "33.3 83.3", "83.3")  # 2 of 6, then 5 of 6
    assert (shape, background, size) == ("100.0 / 0.0 / 0.0",) * 3
    assert color == "25.0 / 75.0 / 0.0"
    assert (every, good, new) == ("1.50", "0.83", "0.0")  # 2 and 1; 2/3 and 1
    asked = [shapes.HELD_OUT[0], shapes.HELD_OUT[1], tuple(mixed[2, :3].tolist())]
    found = children.measured(
        [row | {"asked": [asked] * 2}, other | {"asked": [asked] * 2}], [FACTORS, OTHERS], rates
    )
    assert found[-2:] == ["75.0", "25.0"]  # the first two pairs, the last
    low, high = map(float, interval.split(" to "))
    assert low <= 58.3 <= high
    text = children.composition(
        {("codes", "coin", 1.0): [row]}, [FACTORS, OTHERS], rates, chance=0.042
    )
    assert "chance of success 4.2" in text and text.count("\n|") == 3


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_it_runs_and_goes_on(quickstart, tmp_path):
    """On a tiny run; a second time nothing is measured again."""

    def run():
        command = [sys.executable, "benchmarks/baselines.py", quickstart / "run", "--workdir"]
        command += [tmp_path / "bench", "--steps=2", "--seeds=0", "--pairs=4", "--draws=2"]
        command += ["--conditions=embedding,label", "--guidance=1.5", "--embedding=class"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
        how = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
        done = subprocess.run(list(map(str, command)), **how, timeout=500)
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = run()
    for line in ("| embedding | slerp | 1.5 |", "| label | mean | 1.5 |"):
        assert line in first
    place = tmp_path / "bench" / "baselines.json"
    rows, written = json.loads(place.read_text()), place.stat().st_mtime_ns
    assert len(rows) == 5 and run() == first and place.stat().st_mtime_ns == written
