"""Which checkpoints stay: the newest, every n-th, the best; and it is decided from disk."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from dlc_jax.checkpoint import Checkpoints, seal
from dlc_jax.checkpoint.retention import Retention
from dlc_jax.errors import UserError

LOSSES = {1: 5.0, 2: 1.0, 3: 4.0, 4: float("nan"), 5: 3.0, 6: 2.0}


def saved(directory, steps, metric="validation/loss", **retention):
    checkpoints = Checkpoints(directory, **retention)
    for step in steps:
        metrics = {metric: np.float32(LOSSES[step])} if step in LOSSES else {}
        checkpoints.save(step, {"a": jnp.ones(3)}, None, {"identity": {}}, metrics=metrics)
    checkpoints.close()
    return sorted(seal.steps(directory))


@pytest.mark.parametrize(
    "retention, left",
    [
        ({}, [5, 6]),
        ({"keep": 3}, [4, 5, 6]),
        ({"keep_period": 3}, [3, 5, 6]),
        ({"keep_best": "validation/loss"}, [2, 5, 6]),
        ({"keep_best": "-validation/loss"}, [1, 5, 6]),
        ({"keep_period": 4, "keep_best": "validation/loss"}, [2, 4, 5, 6]),
    ],
)
def test_the_last_every_and_the_best_stay(tmp_path, retention, left):
    assert saved(tmp_path, range(1, 7), **retention) == left
    assert {path.name for path in tmp_path.glob("*.json")} == {f"{n}.sha256.json" for n in left}


def test_the_best_is_decided_from_disk_after_a_restart(tmp_path):
    """Steps without the metric are not best; a better one takes the place of the one before."""
    for step in range(1, 5):
        saved(tmp_path, [step], keep_best="validation/loss")
    assert sorted(seal.steps(tmp_path)) == [2, 3, 4]
    assert saved(tmp_path, [7, 8, 9], keep_best="validation/loss") == [2, 8, 9]
    checkpoints = Checkpoints(tmp_path, keep_best="validation/loss")
    for step, loss in ((10, 0.5), (11, 0.7), (12, 0.6)):
        metrics = {"validation/loss": loss}
        checkpoints.save(step, {"a": jnp.ones(3)}, None, {"identity": {}}, metrics=metrics)
    checkpoints.close()
    assert sorted(seal.steps(tmp_path)) == [10, 11, 12]
    meta = json.loads((tmp_path / "10" / "meta" / "metadata").read_text())
    assert meta["metrics"] == {"validation/loss": 0.5}


def test_an_older_one_goes_only_after_the_newer_ones_are_sealed(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    saved(tmp_path, [1, 2], keep_best="-validation/loss")
    monkeypatch.setattr(seal, "seal", full)
    with pytest.raises(UserError, match="No space left"):
        saved(tmp_path, [3], keep_best="-validation/loss")
    assert {1, 2} <= set(seal.steps(tmp_path))


def test_a_metric_that_is_not_measured_is_refused_by_name_and_the_save_is_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_best="-validation/acuracy")
    checkpoints.save(1, {"a": jnp.ones(3)}, None, {"identity": {}}, metrics={"grid/x": 1.0})
    with pytest.raises(UserError, match="'-validation/acuracy': validation does not .* validatio"):
        metrics = {"validation/loss": 1.0, "grid/x": 1.0}
        checkpoints.save(2, {"a": jnp.ones(3)}, None, {"identity": {}}, metrics=metrics)
    checkpoints.close()
    assert Checkpoints(tmp_path).latest() == 2


def test_of_equals_the_newest_is_best():
    reasons = Retention(keep_best="x").reasons([4, 3, 2, 1], lambda step: {"x": float(step > 2)})
    assert reasons == {4: ["last"], 3: ["last"], 2: ["best"]}
