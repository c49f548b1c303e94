"""What a person can get wrong on the command line: one line on stderr, exit code 2, nothing lost.

Every case runs main.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import recipes

from dlc_jax import main
from dlc_jax import workdir as home

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
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ.copy(), stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )


def refused(*arguments):
    """Runs main, checks that it refuses in one line, and returns the line."""
    process = start("-m", "dlc_jax.main", *arguments)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err.count("\n")) == (2, "", 1), (
        f"exit {process.returncode}\n{out}\n{err}"
    )
    return err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--config=", "configs/quickstart.py"]),
        (["--config=configs/nope.py"], ["configs/nope.py"]),
        (["--config=configs"], ["configs"]),
        (["--config=configs/quickstart.py:nope"], ["nope", "ablation"]),
        ([TINY, "--config.seeed=1"], ["seeed", "seed"]),
        ([TINY, "--config.encoder.trian.steps=1"], ["'encoder.trian'", "'encoder.train'"]),
        ([TINY, "--config.encoder.train.stesp=1"], ["stesp", "'encoder.train.steps'"]),
        ([TINY, "--config.seed=many"], ["seed", "many"]),
        ([TINY, "--config.prior.train.steps=1.5"], ["prior.train.steps", "1.5"]),
        (
            [TINY, "--config.generator.grid.sampler.guidance.interval=late"],
            ["guidance.interval", "late", "tuple[float, float]"],
        ),
        ([TINY, "--config.encoder=big"], ["encoder", "big"]),
        ([TINY, "--config.steps=('nope',)"], ["nope"]),
        (["--config=README.md"], ["README.md", "config.json"]),
        (["--config=pyproject.json"], ["pyproject.json"]),
        ([TINY, "--wrkdir=x"], ["wrkdir", "workdir"]),
        ([TINY, "steps=3"], ["steps=3"]),
    ],
    ids=(
        "nothing no_file folder variant field nested_field last_field type part_type tuple section "
        "step text json flag rest"
    ).split(),
)
def test_command_line(arguments, words, tmp_path):
    if any(argument.startswith("--config=") for argument in arguments):
        arguments = [*arguments, f"--workdir={tmp_path / 'workdir'}"]
    line = refused(*arguments)
    assert all(word in line for word in words), line
    assert "\\n" not in line and "Error" not in line, (
        line
    )  # a sentence, not the remains of a traceback


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


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("encoder.train.batch=7", ["encoder.train.batch=7", "koleo_group=64"]),
        (
            "prior.train.batch=60",
            ["prior.train.batch=60 does not divide by 8", "the nearest that does is 64"],
        ),
        ("prior.train.accumulate=3", ["prior.train.batch=64 does not divide by 24"]),
        ("mesh.fsdp=3", ["mesh", "8 devices"]),
    ],
    ids="groups mesh accumulation devices".split(),
)
def test_a_batch_that_cannot_be_divided_is_refused_before_anything_is_written(
    field, words, tmp_path
):
    line = refused(TINY, f"--workdir={tmp_path / 'workdir'}", f"--config.{field}")
    assert all(word in line for word in words), line
    assert not (tmp_path / "workdir").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (["encoder.model.simplicial.values=65537"], "65537"),
        (
            ["encoder.model.simplicial.values=32"],
            "prior.model.values=16, but codes gives what encoder.model.simplicial.values=32 says",
        ),
        (["generator.model.positions=12"], "generator.model.positions=12, but codes gives"),
        (
            ["encoder.model.simplicial.positions=0"],
            "encoder.model.simplicial.positions=0 must be at least 1",
        ),
        (
            ["encoder.model.backbone.image=18"],
            "encoder.model: images of 18 pixels cannot be cut into patches of 8",
        ),
        (["encoder.model.backbone.patch=0"], "encoder.model.backbone.patch=0 must be at least 1"),
        (["encoder.crops.tint.global_size=20"], "give --config.encoder.crops.tint.global_size=16"),
        (
            ["encoder.crops.tint.local_size=6", "encoder.crops.tint.local_crops=2"],
            "encoder.crops.tint.local_size=6 cannot be cut",
        ),
        (
            ["encoder.model.simplicial.readout=mean"],
            "encoder.model: readout='mean' is not one of plain, shared, pos-shared",
        ),
        (
            ["encoder.model.backbone.heads=3"],
            "encoder.model: width 88 is not a multiple of 3 heads",
        ),
        (["seed=-1"], "seed=-1 is not in 0 to 2147483647"),
        (
            ["encoder.train.init_from=configs"],
            "encoder.train.init_from=configs: no good checkpoint",
        ),
    ],
)
def test_what_no_step_can_be_is_refused_before_the_folder_is_of_this_recipe(
    fields, words, tmp_path, capsys
):
    """Once it is, the corrected command would be one of another config."""
    assert (
        main.main(
            ["dlc", TINY, f"--workdir={tmp_path / 'W'}", *(f"--config.{field}" for field in fields)]
        )
        == 2
    )
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and words in err, err
    assert not (tmp_path / "W").exists()


@pytest.mark.parametrize(
    "kilobytes",
    [2, pytest.param(200, marks=pytest.mark.slow)],
    ids=["at_once", "at_the_first_checkpoint"],
)
def test_a_full_disk(kilobytes, tmp_path):
    """No file may grow beyond a size: what the system says on a full disk, but for the words.

    It neither hangs nor shows a traceback.
    """
    command = [
        sys.executable,
        "-m",
        "dlc_jax.main",
        TINY,
        f"--workdir={tmp_path / 'workdir'}",
        "--config.steps=encoder",
    ]
    limited = ["bash", "-c", f'ulimit -f {kilobytes}; exec "$@"', "bash", *command]
    # jax warns in words of its own if its cache of programs cannot grow
    environment = os.environ | {"XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(
        limited, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert (
        str(tmp_path / "workdir") in done.stderr
        and "too large" in done.stderr
        and "make room" in done.stderr
    )


def test_workdir_of_another_model_is_refused_by_the_names_of_its_fields(tmp_path):
    """What the run before wrote stays as it is."""
    workdir = tmp_path / "workdir"
    workdir.mkdir()
    home.remember(workdir, recipes.load("quickstart.py:tiny").to_dict())
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    line = refused(TINY, f"--workdir={workdir}", "--config.encoder.model.backbone.width=96")
    assert "encoder.model.backbone.width" in line
    after = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    assert {path: text for path, text in after.items() if path in before} == before
    assert json.loads((workdir / "config.json").read_text())
