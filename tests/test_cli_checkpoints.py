"""dlc checkpoints: what is on disk, which of it is good, and why it is kept; it changes nothing."""

import json
import os
import re
import shutil

import jax.numpy as jnp
import pytest

from dlc_jax import cli
from dlc_jax.checkpoint import Checkpoints


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints of two steps, the first with one that is kept for its loss."""
    train = {"keep": 2, "keep_period": 40, "keep_best": "validation/loss", "steps": 60}
    config = {"steps": ["encoder", "prior", "codes"], "encoder": {"train": train}, "prior": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    losses = {10: 3.0, 20: 1.25, 40: 2.0, 50: 2.0, 60: 2.0}
    for name, steps in {"encoder": losses, "prior": {7: 1.0}}.items():
        kept = {"keep_period": 40, "keep_best": "validation/loss"}
        checkpoints = Checkpoints(tmp_path / name / "checkpoints", **kept)
        for step, loss in steps.items():
            metrics = {"validation/loss": loss} if name == "encoder" else {}
            state = {"params": {"a": jnp.full(100, step)}}
            checkpoints.save(step, state, None, {"identity": {}}, metrics=metrics)
        checkpoints.close()
    return tmp_path


def listing(directory):
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def called(capsys, *arguments):
    code = cli.main(["checkpoints", *map(str, arguments)])
    out, error = capsys.readouterr()
    return code, out, error


def data(path):
    return max((file for file in path.rglob("*") if file.is_file()), key=lambda f: f.stat().st_size)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_it_lists_each_step_newest_first_and_changes_nothing(run, capsys):
    before = listing(run)
    code, out, error = called(capsys, run)
    assert (code, error) == (0, "")
    assert f"{run}/encoder/checkpoints, " in out and "the newest good one is of step 60" in out
    encoder, prior = out.split(f"{run}/prior")
    rows = [line.split() for line in encoder.splitlines() if " kB " in line and line[0] == " "]
    assert [row[0] for row in rows] == ["60", "50", "40", "20"]
    why = {row[0]: " ".join(row[6:]) for row in rows}
    assert why == {
        "60": "kept as last",
        "50": "kept as last",
        "40": "kept as every",
        "20": "kept as best",
    }
    assert "    validation/loss 1.25\n" in encoder and " good " in encoder and "  7  " in prior
    assert called(capsys, run, "prior")[1] == f"{run}/prior" + prior
    assert called(capsys, run, "--verify") == (0, out, "")
    assert listing(run) == before and not (run / ".lock").exists()


def test_verify_names_the_files_that_differ(run, capsys):
    checkpoints = run / "encoder" / "checkpoints"
    files = [data(checkpoints / "50"), checkpoints / "50" / "meta" / "metadata"]
    for path in files:
        flip(path)
    before = listing(run)
    assert called(capsys, run)[0] == 0  # of the same size: only reading tells
    code, out, error = called(capsys, run, "--verify")
    assert code == 2 and error.count("\n") == 1
    assert f"{checkpoints}/50: skipped: 2 files differ from what was written;" in error
    for path in files:
        assert f"    {path.relative_to(checkpoints / '50')}\n" in out
    assert out.count("differ") == 1 and listing(run) == before
    assert called(capsys, run, "prior", "--verify")[0] == 0


def test_what_a_run_would_skip_is_said_with_the_reason(run, capsys):
    checkpoints = run / "encoder" / "checkpoints"
    (checkpoints / "99").mkdir()
    (checkpoints / "60.damaged").mkdir()
    (checkpoints / "60.sha256.json").unlink()
    code, out, _ = called(capsys, run)
    assert code == 0 and "the newest good one is of step 50" in out
    assert "skipped: it is empty" in out and "skipped: it has no seal" in out
    assert "60.damaged" in out and "set aside, damaged" in out
    os.truncate(data(checkpoints / "50"), 10)
    code, out, error = called(capsys, run)
    assert code == 2 and "has 10 bytes and not" in out and "has 10 bytes and not" in error


def test_a_step_without_a_good_one_is_an_error(run, capsys):
    checkpoints = run / "prior" / "checkpoints"
    shutil.rmtree(checkpoints / "7")
    (checkpoints / "7").mkdir()
    code, out, error = called(capsys, run)
    assert code == 2 and "prior/checkpoints, 1" in out and "none is good" in out
    assert "/7: skipped: it is empty" in error
    (checkpoints / "7.sha256.json").unlink()
    assert "none of 1 checkpoints is good" in called(capsys, run)[2]
    (checkpoints / "7").rmdir()
    assert called(capsys, run)[0] == 0 and "nothing is saved yet" in called(capsys, run)[1]


def test_steps_whose_seals_are_all_gone_are_taken_as_a_run_takes_them(run, capsys):
    (run / "prior" / "checkpoints" / "7.sha256.json").unlink()
    code, out, _ = called(capsys, run, "prior")
    assert code == 0 and "complete, without a seal" in out and "is of step 7" in out


def test_mistakes_are_one_line(run, tmp_path, capsys):
    for arguments, words in (
        ((tmp_path / "none",), "none does not exist"),
        ((run, "codes"), "codes has no checkpoints in .*; those with some are encoder, prior"),
        ((run / "encoder",), "has no checkpoints; train a step first"),
    ):
        code, out, error = called(capsys, *arguments)
        assert (code, out) == (2, "") and error.count("\n") == 1
        assert re.search(words, error), error
