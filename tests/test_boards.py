"""TensorBoard and Weights & Biases get the same numbers and pictures as the file.

Without the package it is one line.
"""

import io
import resource
import sys
import types

import numpy as np
import pytest

from dlc_jax.errors import UserError
from dlc_jax.metrics import Writer
from dlc_jax.metrics.boards import TensorBoard


def write(directory, *, first=0, stop=10, **keywords):
    keywords = {"tensorboard": False, "stream": io.StringIO()} | keywords
    made = Writer(directory, total=10, log_every=4, name="generator", first=first, **keywords)
    for step in range(first + 1, stop + 1):
        made.step(step, {"loss": np.float32(1 / step), "parts": np.zeros(2)})
        if step == 6:
            made.images("grid/samples", np.full((4, 8, 3), 7, np.uint8), 6)
            made.scalars(6, {"validation/loss": 0.5})
    made.close()


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package, which writes down what it is told."""
    module = types.ModuleType("wandb")
    module.told, module.Image = [], lambda pixels: ("picture", pixels.shape)

    class Run:
        def log(self, values, step):
            module.told.append((step, values))

        def finish(self):
            module.told.append("finished")

    def init(**keywords):
        module.told.append(keywords)
        return Run()

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_numbers_and_pictures_in_the_order_of_steps(tmp_path, wandb):
    write(tmp_path / "run" / "generator", wandb="codes", about={"seed": 0})
    start, *told, end = wandb.told
    assert (start["project"], start["name"], start["group"]) == ("codes", "run/generator", "run")
    assert (start["config"], start["dir"]) == ({"seed": 0}, str(tmp_path / "run" / "generator"))
    assert [step for step, _ in told] == [4, 6, 6, 8, 10] and end == "finished"
    assert told[0][1]["loss"] == 0.25 and "parts" not in told[0][1]
    assert told[1][1] == {"grid/samples": ("picture", (4, 8, 3))} and told[2][1] == {
        "validation/loss": 0.5
    }


def test_wandb_goes_on_with_the_same_run_and_only_with_that(tmp_path, wandb):
    for directory, first, stop in (("one", 0, 7), ("one", 4, 10), ("two", 0, 10)):
        write(tmp_path / directory, first=first, stop=stop, wandb="codes")
    first, again, other = (told for told in wandb.told if isinstance(told, dict))
    assert first["id"] == again["id"] != other["id"] and again["resume"] == "allow"


def test_wandb_that_is_absent_or_refuses_is_one_line(tmp_path, wandb, monkeypatch):
    def refuse(**keywords):
        raise ValueError("No API key configured.\nmore of it")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(
        UserError, match=r"^log.wandb='codes': No API key configured; .*WANDB_MODE=offline.*$"
    ):
        write(tmp_path, wandb="codes")
    monkeypatch.setitem(
        sys.modules, "wandb", None
    )  # what `import wandb` meets where it is not installed
    with pytest.raises(UserError, match=r"not installed; pip install -e '\.\[tracking\]'"):
        write(tmp_path, wandb="codes")


def test_nothing_is_imported_for_what_is_off(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    write(tmp_path)
    assert (tmp_path / "metrics.jsonl").exists() and not (tmp_path / "tensorboard").exists()


def test_a_full_disk_is_told_at_once(tmp_path):
    """The board's own writer would wait for ever for a thread that the disk has ended."""
    board = TensorBoard(tmp_path, first=0)
    board.scalars({"loss": 1.0}, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            board.image("grid", np.zeros((64, 64, 3), np.uint8), 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_runs_that_start_in_one_second_write_files_of_their_own(tmp_path):
    for first in (0, 1):
        board = TensorBoard(tmp_path, first=first)
        board.scalars({"loss": 1.0}, first + 1)
        board.close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
