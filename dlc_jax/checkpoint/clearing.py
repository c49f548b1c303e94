"""What goes of a run's checkpoints, and what is moved aside."""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax

from dlc_jax import remote
from dlc_jax.checkpoint import arrays, seal
from dlc_jax.checkpoint.retention import Retention
from dlc_jax.hosts.agreement import meet


def prune(directory: Path, retention: Retention) -> None:
    """Deletes the sealed steps that are not to be kept, and what killed runs left."""
    sealed = [step for step in seal.steps(directory) if seal.path_of(directory, step).exists()]
    kept = retention.reasons(sealed, lambda step: arrays.metrics_of(directory / str(step)))
    for step in (step for step in sealed if step not in kept):
        remote.begin(directory / str(step))
        os.replace(directory / str(step), directory / f"{step}.deleting")
        seal.path_of(directory, step).unlink()
        remote.remove(seal.path_of(directory, step))
        remote.remove(directory / str(step))
        remote.end(directory / str(step))
    clear(directory)


def clear(directory: Path) -> None:
    """Removes what killed runs left half written or half deleted.

    Process 0 does it, while nothing is saved there.
    """
    if jax.process_index() or not directory.is_dir():
        return
    for path in remote.begun(directory):  # sent or removed by halves, unless its seal is there
        if not seal.path_of(directory, int(path.name)).exists():
            shutil.rmtree(path, ignore_errors=True)
            remote.remove(path)
        remote.end(path)
    for path in directory.iterdir():
        if match := re.fullmatch(r"(\d+)\.(deleting|orbax-checkpoint-tmp.*)", path.name):
            if match[2] == "deleting" and not (directory / match[1]).exists():
                # the kill came between directory and seal
                seal.path_of(directory, int(match[1])).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)
            remote.remove(path)


def settle(directory: Path, step: int | None, refused: Mapping[int, str]) -> None:
    """Moves skipped steps aside, out of the way of the next saves; seals the one restored.

    What killed runs left half done is removed.
    """
    if jax.process_index() == 0:
        for bad in refused:
            aside, number = directory / f"{bad}.damaged", 0
            while aside.exists():
                number += 1
                aside = directory / f"{bad}.damaged.{number}"
            os.replace(directory / str(bad), aside)
            if seal.path_of(directory, bad).exists():
                os.replace(seal.path_of(directory, bad), directory / f"{aside.name}.sha256.json")
            remote.send(directory)
            remote.remove(seal.path_of(directory, bad))
            remote.remove(directory / str(bad))
        clear(directory)
    if step is not None:
        seal.seal_if_none(directory, step)
        if refused and jax.process_index() == 0:
            line = "going on from %s, the newest good one; what was skipped is kept as *.damaged"
            seal.log.warning(line, directory / str(step))
    meet("settled")
