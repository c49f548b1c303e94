"""Which steps on disk are good: a seal beside each step directory holds the size and SHA-256 of its files. Knows no arrays.

Orbax restores a flipped byte without a word, takes an empty directory for its latest step and remembers steps whose saving
failed. So what is there is read from the disk each time, by process 0, and all processes do as it says.
"""

import concurrent.futures
import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from dlc_jax.errors import Interrupted, UserError

log = logging.getLogger("dlc_jax.checkpoint")
log.setLevel(logging.INFO)

EMPTY = "it is empty"
UNSEALED = "it has no seal: the run was killed while saving it"
_MONTH = 30 * 24 * 3600 * 1000  # milliseconds
_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR)


def steps(directory: Path) -> list[int]:
    """Newest first. Orbax renames whole directories into place, so what has a plain number for a name claims to be a checkpoint.

    Raises:
      UserError: the directory cannot be read.
    """
    try:
        names = [path.name for path in directory.iterdir() if path.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read checkpoints under {directory}: {error.strerror}") from error
    return sorted((int(name) for name in names if name.isdecimal() and str(int(name)) == name), reverse=True)


def newest(directory: Path, refused: dict[int, str], *, log_refused: bool = True) -> int | None:
    """The newest step that verifies and is not refused yet. What does not verify is logged and added to `refused`."""
    chosen = -1
    if jax.process_index() == 0:
        found = steps(directory)
        sealed = any(path_of(directory, step).exists() for step in found)
        for step in found:
            if step in refused:
                continue
            reason = damage(directory, step)
            if reason == UNSEALED and not sealed:
                reason = incomplete(directory / str(step))
            if reason is None:
                chosen = step
                break
            refuse(directory, refused, step, reason, log_it=log_refused)
    if jax.process_count() > 1:
        chosen = int(multihost_utils.broadcast_one_to_all(np.int32(chosen)))
    return None if chosen < 0 else chosen


def refuse(directory: Path, refused: dict[int, str], step: int, reason: str, *, log_it: bool = True) -> None:
    refused[step] = reason
    if log_it and jax.process_index() == 0:
        log.warning("checkpoint %s skipped: %s", directory / str(step), reason)


def damage(directory: Path, step: int) -> str | None:
    """Why a step is not as it was sealed, or None."""
    path = directory / str(step)
    try:
        if not any(path.iterdir()):
            return EMPTY
        if not path_of(directory, step).exists():
            return UNSEALED
        found = json.loads(path_of(directory, step).read_text())
        if (sealed := found.get("step", step)) != step:  # a seal that names no step is accepted
            return f"its seal is of step {sealed}: it was renamed"
        files = found["files"]
        if reason := incomplete(path):
            return reason
        for name, (size, _) in files.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if (path / name).stat().st_size != size:
                return f"{name} has {(path / name).stat().st_size} bytes and not {size}"
        for name, digest in _digests(path, files).items():
            if digest != files[name][1]:
                return f"{name} is not what was written, its SHA-256 differs"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"its seal or its files cannot be read ({error})"
    return None


def incomplete(path: Path) -> str | None:
    missing = [name for name in ("_CHECKPOINT_METADATA", "state", "meta") if not (path / name).exists()]
    return f"{missing[0]} is missing" if missing else None


def path_of(directory: Path, step: int) -> Path:
    return directory / f"{step}.sha256.json"


def seal(directory: Path, step: int) -> None:
    """Hashes a step that is whole and writes its seal, which is there completely or not at all."""
    path = directory / str(step)
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    digests = _digests(path, names)
    files = {name: [(path / name).stat().st_size, digests[name]] for name in names}
    temporary = path_of(directory, step).with_suffix(".tmp")
    with open(temporary, "w") as file:
        json.dump({"step": step, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path_of(directory, step))


def prune(directory: Path, keep: int) -> None:
    """Deletes what is older than the newest `keep` sealed steps, and what killed runs left half done."""
    sealed = [step for step in steps(directory) if path_of(directory, step).exists()]
    for step in sealed[keep:]:
        os.replace(directory / str(step), directory / f"{step}.deleting")
        path_of(directory, step).unlink()
    clear(directory)


def clear(directory: Path) -> None:
    """Removes what killed runs left half written or half deleted. Process 0 does it, while nothing is saved there."""
    for path in directory.iterdir() if directory.is_dir() and jax.process_index() == 0 else ():
        if found := re.fullmatch(r"(\d+)\.(deleting|orbax-checkpoint-tmp.*)", path.name):
            if found[2] == "deleting" and not (directory / found[1]).exists():
                path_of(directory, int(found[1])).unlink(missing_ok=True)  # the kill came between directory and seal
            shutil.rmtree(path, ignore_errors=True)


def settle(directory: Path, step: int | None, refused: Mapping[int, str]) -> None:
    """Moves skipped steps aside, so that they do not stand in the way of the next saves, and seals the one that was restored.

    What killed runs left half done is removed.
    """
    if jax.process_index() == 0:
        for bad in refused:
            aside, number = directory / f"{bad}.damaged", 0
            while aside.exists():
                number += 1
                aside = directory / f"{bad}.damaged.{number}"
            os.replace(directory / str(bad), aside)
            if path_of(directory, bad).exists():
                os.replace(path_of(directory, bad), directory / f"{aside.name}.sha256.json")
        clear(directory)
        if step is not None and not path_of(directory, step).exists():
            seal(directory, step)
        if step is not None and refused:
            log.warning("going on from %s, the newest good one; what was skipped is kept as *.damaged", directory / str(step))
    barrier("settled")


def agreed(answer: bool) -> bool:
    """Process 0's answer."""
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(answer))) if jax.process_count() > 1 else answer


def barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"dlc_jax.checkpoint.{name}")


def meet(name: str) -> None:
    """Waits for all processes, for as long as they take; no device takes part, so each may have run other programs meanwhile.

    Raises:
      Interrupted: one of them is gone.
    """
    if jax.process_count() == 1:
        return
    try:
        ocp.multihost.get_barrier_sync_fn()(key=f"dlc_jax.{name}", timeout_ms=_MONTH)
    except jax.errors.JaxRuntimeError as error:
        raise Interrupted(f"{name}: another process has ended; the same command, in all of them, goes on") from error


def storage_reason(error: BaseException | None) -> str | None:
    """What the system said, if the error or one of its causes is about storage; TensorStore has it only in its text."""
    while error is not None:
        if isinstance(error, OSError):
            return error.strerror or str(error)
        for number in _STORAGE:
            if os.strerror(number).lower() in str(error).lower():
                return os.strerror(number)
        error = error.__cause__ or error.__context__
    return None


def _digests(path: Path, names: Iterable[str]) -> dict[str, str]:
    def digest(name):
        with open(path / name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return dict(zip(names, pool.map(digest, names)))
