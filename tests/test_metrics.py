"""Metrics of the step before, each step once on file also after a kill, and a progress line."""

import errno
import io
import json
import resource
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from dlc_jax import metrics
from dlc_jax.errors import UserError
from dlc_jax.metrics import boards


class Terminal(io.StringIO):
    def isatty(self):
        return True


def writer(directory, **keywords):
    usual = {
        "total": 10,
        "log_every": 4,
        "name": "encoder",
        "batch": 8,
        "tensorboard": False,
        "stream": io.StringIO(),
    }
    return metrics.Writer(directory, **usual | keywords)


def lines(directory):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return [
        json.loads(line, parse_constant=refuse)
        for line in (directory / "metrics.jsonl").read_text().splitlines()
    ]


def steps(directory):
    return [line["step"] for line in lines(directory)]


class Lazy:
    """Stands for a device array; records when it is read."""

    dtype = np.float32

    def __init__(self, value, read):
        self.value, self.read = value, read

    def __array__(self, dtype=None, copy=None):
        self.read.append(self.value)
        return np.asarray(self.value, dtype or np.float32)


def test_a_step_is_read_only_after_the_next_was_dispatched(tmp_path):
    read, made = [], writer(tmp_path, log_every=1)
    for step in (1, 2, 3):
        made.step(step, {"loss": Lazy(float(step), read)})
        assert max(read, default=0) == step - 1
        assert steps(tmp_path) == list(range(1, step))
    made.close()
    assert steps(tmp_path) == [1, 2, 3]


def test_step_returns_and_last_waits(tmp_path):
    made = writer(tmp_path, log_every=1)
    assert made.step(1, {"loss": jnp.float32(3)}) == {"step": 0}
    assert made.step(2, {"loss": jnp.float32(2), "parts": jnp.arange(2)}) == {
        "loss": 3.0,
        "step": 1,
    }
    assert made.last == made.last | {"loss": 2.0, "parts": [0, 1], "step": 2}
    assert steps(tmp_path) == [1, 2]  # on file before a checkpoint of step 2 is saved
    made.close()


@pytest.mark.parametrize("first", [0, 5, 7])
def test_resume_has_each_step_once(tmp_path, first):
    made = writer(tmp_path, log_every=1)
    for step in range(1, 8):
        made.step(step, {"loss": jnp.float32(step)})
    made.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    made = writer(tmp_path, first=first, log_every=1)
    for step in range(first + 1, 11):
        made.step(step, {"loss": jnp.float32(-step)})
    made.close()
    assert steps(tmp_path) == list(range(1, 11))
    assert [line["loss"] for line in lines(tmp_path)] == [
        *range(1, first + 1),
        *(-step for step in range(first + 1, 11)),
    ]


def test_a_damaged_line_is_dropped(tmp_path):
    """Bytes that are no UTF-8 are the mark of a disk, not of a run that must not go on."""
    made = writer(tmp_path, log_every=1)
    for step in (1, 2, 3):
        made.step(step, {"loss": float(step)})
    made.close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"step": 2, "loss"', b'"step": 2, "\xff\x85ss', 1))
    writer(tmp_path, first=3).close()
    assert steps(tmp_path) == [1, 3] and b"\xff" not in path.read_bytes()


def test_only_due_steps_are_on_file_and_the_last_one(tmp_path):
    """Half a million steps must not make a hundred megabytes.

    A resumed run has the lines of an uninterrupted one.
    """
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for directory, runs in (
        (whole, [(0, 10)]),
        (parts, [(0, 7), (6, 10)]),
    ):  # saved at step 6, killed at 7
        for first, stop in runs:
            made = writer(directory, first=first)
            for step in range(first + 1, stop + 1):
                made.step(step, {"loss": jnp.float32(step)})
                if step == 5:
                    made.scalars(5, {"validation/loss": 0.5})  # an evaluation is, whatever its step
            assert made.last == {
                **made.last,
                "step": stop,
                "loss": stop,
            }  # every step can be asked for
    made.close()
    assert steps(whole) == steps(parts) == [4, 5, 8, 10]
    keys = ("step", "loss", "validation/loss")  # the others are of the clock
    assert [[line.get(key) for key in keys] for line in lines(whole)] == [
        [line.get(key) for key in keys] for line in lines(parts)
    ]


def test_evaluations_are_written_once(tmp_path):
    made = writer(tmp_path, log_every=1)
    made.step(1, {"loss": 1.0})
    made.scalars(1, {"validation/loss": np.float64(0.5)})
    made.close()
    assert lines(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 1, "validation/loss": 0.5}]
    made = writer(tmp_path, first=1)
    made.scalars(
        1, {"validation/loss": 0.5, "probe/shape": 1.0}
    )  # measured again by the resumed run
    made.close()
    assert lines(tmp_path) == [
        {"step": 1, "loss": 1.0, "validation/loss": 0.5},
        {"step": 1, "probe/shape": 1.0},
    ]


def test_not_finite_is_null(tmp_path):
    made = writer(tmp_path, log_every=1)
    made.step(1, {"loss": jnp.float32("nan"), "parts": jnp.array([1.0, jnp.inf])})
    made.close()
    assert lines(tmp_path) == [{"step": 1, "loss": None, "parts": [1.0, None]}]


def test_seconds_add_up_over_runs(tmp_path):
    noted = []
    for first in (0, 4):
        made = writer(tmp_path, first=first)
        time.sleep(0.02)
        for step in range(first + 1, first + 5):
            made.step(step, {"loss": 1.0})
        assert made.last["step"] == first + 4  # logged; never closed, as after a kill
        noted.append(json.loads((tmp_path / "seconds.json").read_text()))
    assert noted[0]["before"] == 0 and noted[0]["seconds"] > 0.02 and noted[0]["step"] == 4
    assert (
        noted[1]["before"] == noted[0]["seconds"]
        and noted[1]["seconds"] > noted[0]["seconds"] + 0.02
    )
    assert noted[1]["step"] == 8


def run(made, *, wait=0.01, work=0.01):
    for step in range(1, 11):
        with made.waiting():
            time.sleep(wait)
        time.sleep(work)
        made.step(step, {"loss": jnp.float32(0.5)})
    made.close()


def test_progress_in_a_log(tmp_path):
    out = io.StringIO()
    run(writer(tmp_path, stream=out))
    text = out.getvalue()
    assert "\r" not in text
    shown = text.splitlines()
    assert [line.split("  ")[0] for line in shown] == [
        "encoder 4/10 40%",
        "encoder 8/10 80%",
        "encoder 10/10 100%",
    ]
    words = shown[1].split("  ")
    assert (
        words[1] == "loss 0.5000"
        and words[2].endswith(" images/s")
        and words[3].endswith(" ms/step")
    )
    assert words[4].startswith("data ") and words[5].startswith("ETA ")
    rated = [line for line in lines(tmp_path) if "images_per_second" in line]
    assert [line["step"] for line in rated] == [4, 8, 10]
    assert all(
        np.isclose(line["images_per_second"] * line["seconds_per_step"], 8) for line in rated
    )
    assert rated[1]["seconds_per_step"] >= 0.02 and 0.1 < rated[1]["data_wait"] < 0.9


def test_evaluations_do_not_slow_the_rates(tmp_path):
    made = writer(tmp_path)
    for step in range(1, 9):
        made.step(step, {"loss": 1.0})
        if step == 5:
            with made.paused():
                time.sleep(0.3)
    made.close()
    assert all(line["seconds_per_step"] < 0.05 for line in lines(tmp_path))


def test_progress_in_place_on_a_terminal(tmp_path):
    out = Terminal()
    run(writer(tmp_path, stream=out), wait=0, work=0.05)
    text = out.getvalue()
    assert text.count("\n") == 1 and text.endswith("\n")
    assert len(text.split("\r")) > 4  # oftener than log_every
    assert "encoder 10/10 100%" in text


def test_a_terminal_that_is_gone_stops_nothing(tmp_path):
    """What comes then is SIGHUP, and the loop saves; an error of the line would come before."""

    class Gone(Terminal):
        def flush(self):
            raise OSError(errno.EIO, "Input/output error")

    made = writer(tmp_path, log_every=1, stream=Gone())
    for step in (1, 2):
        made.step(step, {"loss": 1.0})
    made.close()
    assert steps(tmp_path) == [1, 2]


def test_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    made = writer(tmp_path, tensorboard=True)
    for step in range(1, 9):
        made.step(step, {"loss": jnp.float32(step)})
    made.scalars(8, {"validation/loss": 2.0})
    made.images("grid", np.zeros((3, 4, 4, 3), np.uint8), 8)
    made.close()
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("loss")] == [(4, 4.0), (8, 8.0)]
    assert [(event.step, event.value) for event in found.Scalars("validation/loss")] == [(8, 2.0)]
    assert [(event.width, event.height) for event in found.Images("grid")] == [(8, 8)]


def test_tiles_keep_their_order():
    tiles = boards.tiled(
        np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 1), np.uint8)
    )
    assert np.array_equal(tiles[..., 0], [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 0, 0], [2, 2, 0, 0]])


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
    out = io.StringIO()
    made = writer(tmp_path / "run", stream=out, tensorboard=True)
    made.step(4, {"loss": jnp.float32(1)})
    made.scalars(4, {"x": 1.0})
    made.images("grid", np.zeros((2, 2, 3)), 4)
    assert made.last["loss"] == 1.0  # every process decides on the same numbers
    made.close()
    assert not (tmp_path / "run").exists() and out.getvalue() == ""


def test_full_disk_and_no_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        writer(tmp_path / "file")
    made = writer(tmp_path, log_every=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        made.step(1, {"loss": 1.0})
        with pytest.raises(UserError, match="too large"):
            made.last  # noqa: B018
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_peak_memory():
    before = metrics.peak_memory_gb()
    block = np.ones(40_000_000, np.uint8)
    assert (
        0.02 < metrics.peak_memory_gb() < 64 and metrics.peak_memory_gb() >= before and block.all()
    )
    held = metrics.peak_memory_gb()
    subprocess.run([sys.executable, "-c", "x = bytearray(3_000_000_000)"], check=True)
    assert metrics.peak_memory_gb() < held + 1


def test_goodput_counts_lost_steps_and_restarts(tmp_path):
    """Six of ten steps are kept: what the other four took was not useful."""
    run(writer(tmp_path, total=10, log_every=1), wait=0.0)
    noted = json.loads((tmp_path / "seconds.json").read_text())
    before = lines(tmp_path)[-1]
    assert before["restarts"] == 0 and 0.3 < before["goodput"] <= 1
    assert noted["useful"] == pytest.approx(before["goodput"] * noted["seconds"], rel=0.2)
    made = writer(tmp_path, total=10, log_every=1, first=6)
    for step in (7, 8):
        made.step(step, {"loss": 1.0})
    made.close()
    again = lines(tmp_path)[-1]
    assert again["step"] == 8 and again["restarts"] == 1
    now = json.loads((tmp_path / "seconds.json").read_text())
    assert now["useful"] == pytest.approx(0.6 * noted["useful"], abs=0.02)
    assert again["goodput"] < before["goodput"]
