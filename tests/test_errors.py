"""What a person can get wrong on the command line: one line on stderr, exit code 2, nothing lost. Every case runs main."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
TINY = "--config=configs/quickstart.py:tiny"

HOLD = """
import os, pathlib, sys
from dlc_jax import workdir
with workdir.lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def start(*arguments):
    command = [sys.executable, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=os.environ.copy(), stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def refused(*arguments):
    """Runs main, checks that it refuses in one line, and returns the line."""
    process = start("-m", "dlc_jax.main", *arguments)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err.count("\n")) == (2, "", 1), f"exit {process.returncode}\n{out}\n{err}"
    return err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--config=", "configs/quickstart.py"]),
        (["--config=configs/nope.py"], ["configs/nope.py"]),
        (["--config=configs"], ["configs"]),
        (["--config=configs/quickstart.py:nope"], ["nope", "ablation"]),
        ([TINY, "--config.seeed=1"], ["seeed", "seed"]),
        ([TINY, "--config.encoder.trian.steps=1"], ["trian"]),
        ([TINY, "--config.seed=many"], ["seed", "many"]),
        ([TINY, "--config.steps=('nope',)"], ["nope"]),
        ([TINY, "--wrkdir=x"], ["wrkdir", "workdir"]),
        ([TINY, "steps=3"], ["steps=3"]),
    ],
    ids="nothing no_file folder variant field nested_field type step flag rest".split(),
)
def test_command_line(arguments, words, tmp_path):
    if any(argument.startswith("--config=") for argument in arguments):
        arguments = [*arguments, f"--workdir={tmp_path / 'workdir'}"]
    line = refused(*arguments)
    assert all(word in line for word in words), line
    assert "\\n" not in line and "Error" not in line, line  # a sentence, not the remains of a traceback


def test_workdir_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    line = refused(TINY, f"--workdir={tmp_path / 'file' / 'workdir'}")
    assert str(tmp_path / "file") in line


def test_workdir_of_another_run_is_refused_until_that_run_ends(tmp_path):
    workdir = tmp_path / "workdir"
    holder = start("-c", HOLD, str(workdir))
    assert holder.stdout.readline() == "held\n", holder.communicate()[1]
    try:
        assert str(workdir) in refused(TINY, f"--workdir={workdir}")
    finally:
        holder.kill()  # kill -9: no lock may stay behind
        holder.communicate()
    again = start("-c", HOLD, str(workdir))
    assert again.communicate(timeout=60) == ("held\n", "")


def test_workdir_of_another_model_is_refused_by_the_names_of_its_fields(tmp_path):
    """The first run stops at a batch that nothing divides, after it has remembered its recipe; what it wrote stays."""
    workdir = tmp_path / "workdir"
    line = refused(TINY, f"--workdir={workdir}", "--config.encoder.train.batch=7")
    assert "batch" in line and "7" in line
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    line = refused(TINY, f"--workdir={workdir}", "--config.encoder.model.width=96")
    assert "encoder.model.width" in line
    after = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    assert {path: text for path, text in after.items() if path in before} == before
    assert json.loads((workdir / "config.json").read_text())
