"""One live run per workdir, of one config; results and marks are there completely or not at all."""

import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys

import jax
import pytest

from dlc_jax import workdir
from dlc_jax.errors import UserError

HOLD = """
import sys
from dlc_jax import workdir
with workdir.lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(directory):
    pipe = subprocess.PIPE
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory)], stdin=pipe, stdout=pipe, text=True
    )
    assert child.stdout.readline() == "held\n"
    return child


@contextlib.contextmanager
def full_disk():
    """No file may grow: what the system says on a full disk, but for the words.

    Only within, since pytest's own output is a file too.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_lock_names_the_live_run_and_survives_kill_9(tmp_path):
    child = hold(tmp_path / "a" / "run")
    try:
        with pytest.raises(UserError, match=f"process {child.pid} on {socket.gethostname()}"):
            with workdir.lock(tmp_path / "a" / "run"):
                pass
        # the attempt changed nothing
        lock = json.loads((tmp_path / "a" / "run" / ".lock").read_text())
        assert lock["pid"] == child.pid
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdin.close()
        child.stdout.close()
    with workdir.lock(tmp_path / "a" / "run") as directory:
        assert json.loads((directory / ".lock").read_text())["pid"] == os.getpid()
        with pytest.raises(UserError, match=str(os.getpid())):
            with workdir.lock(directory):
                pass
    with workdir.lock(tmp_path / "a" / "run"):
        pass


def test_lock_is_released_by_an_exception(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with workdir.lock(tmp_path):
            raise ZeroDivisionError
    with workdir.lock(tmp_path):
        pass


def test_lock_refuses_what_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="cannot write in"):
            with workdir.lock(path):
                pass
    with full_disk(), pytest.raises(UserError, match="too large"):
        with workdir.lock(tmp_path / "run"):
            pass


CONFIG = {
    "seed": 0,
    "steps": ("encoder",),
    "mesh": {"data": -1},
    "data": {"image": 16, "path": "here"},
    "encoder": {
        "model": {"width": 64, "heads": (4, 4)},
        "train": {"steps": 10, "batch": 8, "save_every": 5},
    },
}


def changed(**fields):
    config = json.loads(json.dumps(CONFIG))
    for name, value in fields.items():
        *parents, last = name.split("__")
        inner = config
        for parent in parents:
            inner = inner[parent]
        inner[last] = value
    return config


def remembered(directory):
    return json.loads((directory / "config.json").read_text())


def test_same_config_writes_nothing(tmp_path):
    workdir.remember(tmp_path, CONFIG)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    workdir.remember(tmp_path, changed())  # from JSON: lists where there were tuples
    assert (
        {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        == before
        == {"config.json": before["config.json"]}
    )


def test_model_and_data_may_not_change(tmp_path):
    workdir.remember(tmp_path, CONFIG)
    with pytest.raises(
        UserError, match=r"data\.image: 16 -> 32; encoder\.model\.width: 64 -> 128\)"
    ) as caught:
        workdir.remember(
            tmp_path, changed(encoder__model__width=128, data__image=32, encoder__train__steps=20)
        )
    assert "\n" not in str(caught.value) and "train.steps" not in str(caught.value)
    for wrong in (
        {"seed": 1},
        {"encoder__model__depth": 2},
        {"encoder__train__batch": 4},
        {"encoder": {}},
        {"new": 1},
    ):
        with pytest.raises(UserError):
            workdir.remember(tmp_path, changed(**wrong))
    assert remembered(tmp_path) == changed() and not (tmp_path / "config_history.jsonl").exists()


def test_at_most_ten_keys_are_named(tmp_path):
    workdir.remember(tmp_path, {"model": {f"k{i:02}": 0 for i in range(13)}})
    with pytest.raises(UserError, match="k09: 0 -> 1; and 3 more"):
        workdir.remember(tmp_path, {"model": {f"k{i:02}": 1 for i in range(13)}})


def test_operational_changes_are_recorded(tmp_path):
    workdir.remember(tmp_path, CONFIG)
    new = changed(
        encoder__train__steps=20, mesh__data=2, data__path="there", steps=["encoder", "prior"]
    )
    workdir.remember(tmp_path, new)
    assert remembered(tmp_path) == new
    (line,) = (tmp_path / "config_history.jsonl").read_text().splitlines()
    assert json.loads(line)["changed"]["encoder.train.steps"] == [10, 20]
    workdir.remember(
        tmp_path, changed(**{"seed": 5}) | {"steps": new["steps"]}, operational=("seed", ".*")
    )
    with pytest.raises(UserError, match="encoder.train.steps"):  # patterns match whole names
        workdir.remember(
            tmp_path, new, operational=("train.steps", "steps", "seed", "mesh.*", "data.*")
        )


def test_what_is_learned_lasts_and_how_it_is_run_does_not():
    config = changed(
        data={
            "name": "images",
            "image": 16,
            "path": "here",
            "cache": "there",
            "cache_gb": 1.0,
            "limit": 9,
            "data_dir": None,
        },
        log={"tensorboard": True, "wandb": "x"},
        samples={"batch": 8, "count": 4, "grid": {"every": 3}},
    )
    assert workdir.lasting(config) == {
        "seed": 0,
        "data.name": "images",
        "data.image": 16,
        "encoder.model.width": 64,
        "encoder.model.heads": [4, 4],
        "encoder.train.batch": 8,
        "samples.count": 4,
    }
    moved = changed(data__path="elsewhere", encoder__train__save_every=1)
    assert workdir.lasting({"data": moved["data"]}) == workdir.lasting({"data": CONFIG["data"]})


def test_new_sections_join_and_absent_ones_stay(tmp_path):
    workdir.remember(tmp_path, CONFIG)
    ablation = changed(ablation={"model": {"width": 8}})
    workdir.remember(tmp_path, ablation)
    assert remembered(tmp_path) == ablation
    workdir.remember(tmp_path, CONFIG)
    assert remembered(tmp_path) == ablation
    workdir.remember(tmp_path, changed(encoder__train__steps=20))
    assert remembered(tmp_path) == changed(encoder__train__steps=20, ablation=ablation["ablation"])
    with pytest.raises(UserError, match="ablation.model.width: 8 -> 9"):
        workdir.remember(
            tmp_path, changed(encoder__train__steps=20, ablation={"model": {"width": 9}})
        )


def test_results_merge_sorted_and_strict(tmp_path):
    workdir.merge_results(tmp_path, {"probe/shape": 0.5, "loss": float("nan")})
    workdir.merge_results(tmp_path, {"judge/all": 1, "probe/shape": 0.75})
    text = (tmp_path / "results.json").read_text()
    assert list(json.loads(text).items()) == [
        ("judge/all", 1),
        ("loss", None),
        ("probe/shape", 0.75),
    ]


def test_full_disk_leaves_what_was_there(tmp_path):
    workdir.merge_results(tmp_path, {"a": 1})
    with full_disk(), pytest.raises(UserError, match="too large"):
        workdir.merge_results(tmp_path, {"b": 2})
    assert json.loads((tmp_path / "results.json").read_text()) == {"a": 1}


def test_done(tmp_path):
    assert workdir.done(tmp_path / "encoder") is None
    workdir.mark_done(tmp_path / "encoder", {"steps": 10})
    assert workdir.done(tmp_path / "encoder")["steps"] == 10


def test_damaged_files_are_named(tmp_path):
    for name, call in (
        ("config.json", lambda: workdir.remember(tmp_path, CONFIG)),
        ("results.json", lambda: workdir.merge_results(tmp_path, {})),
        ("done.json", lambda: workdir.done(tmp_path)),
    ):
        for text in ('{"a": ', "[]"):
            (tmp_path / name).write_text(text)
            with pytest.raises(UserError, match=name):
                call()
            assert (tmp_path / name).read_text() == text


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"steps": "10"}',
        '{"steps": 1, "after": []}',
        '{"steps": 1, "after": {"a": null}}',
        '{"steps": 1, "settings": 3}',
    ],
)
def test_a_mark_that_says_too_little_is_named(tmp_path, text):
    """It is JSON, but a guess could cost results.

    Taken for incomplete, the step's could be thrown away; taken for complete, they could be
    another's.
    """
    (tmp_path / "done.json").write_text(text)
    with pytest.raises(
        UserError,
        match="done.json is damaged; move it away: the same command then completes the step",
    ):
        workdir.done(tmp_path)


@pytest.mark.parametrize("text", ["[]", "\x00", '{"before": "3"}', '{"before": NaN}'])
def test_time_that_cannot_be_read_is_none(tmp_path, text):
    (tmp_path / "seconds.json").write_text(text)
    assert workdir.seconds(tmp_path, 2.0) == 2.0
    (tmp_path / "results.json").write_text('{"seconds/encoder": 5.0, "seconds/prior": "long"}')
    assert workdir.total_seconds(tmp_path) == 5.0


def test_seconds(tmp_path):
    assert workdir.seconds(tmp_path, 2.0) == 2.0
    (tmp_path / "seconds.json").write_text('{"before": 3.0, "seconds": 4.5, "step": 8}')
    assert workdir.seconds(tmp_path, 2.0) == 5.0
    workdir.merge_results(
        tmp_path, {"seconds/encoder": 5.0, "seconds/prior": 1.0, "probe/shape": 1.0}
    )
    assert workdir.total_seconds(tmp_path) == workdir.total_seconds(tmp_path) == 6.0
    assert json.loads((tmp_path / "results.json").read_text())["seconds/total"] == 6.0


def test_commit_is_of_this_checkout_or_none(monkeypatch, tmp_path):
    assert re.fullmatch("[0-9a-f]{40}( with local changes)?", workdir.commit() or "0" * 40)
    # installed, or within another project
    monkeypatch.setattr(workdir, "__file__", str(tmp_path / "workdir.py"))
    assert workdir.commit() is None


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with workdir.lock(tmp_path):
        workdir.remember(tmp_path, CONFIG)
        workdir.merge_results(tmp_path, {"a": 1})
        workdir.mark_done(tmp_path, {})
    assert list(tmp_path.iterdir()) == []
