"""Which steps on disk are good, by seals: the size and SHA-256 of every file of a step.

A seal stands beside the directory of its step; of arrays nothing here knows more than the metrics
beside them.

Orbax restores a flipped byte silently, takes an empty directory for its latest step and remembers
steps whose saving failed. So the disk is read each time, and all processes do as process 0 decides.
Sizes are always compared. Files are hashed when a seal is written and before their bytes are
trusted: by all processes, a share each, and once while they stay unchanged.
"""

import errno
import functools
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from dlc_jax import checksum, remote
from dlc_jax.errors import UserError
from dlc_jax.hosts.agreement import agreed, gather

log = logging.getLogger("dlc_jax.checkpoint")
log.setLevel(logging.INFO)

EMPTY = "it is empty"
UNSEALED = "it has no seal: the run was killed while saving it"
_STORAGE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENOTDIR,
)
# {step directory: (what its seal, sizes and times were when it was hashed, what was wrong)}
_hashed: dict[Path, tuple[tuple, str | None]] = {}


def steps(directory: Path) -> list[int]:
    """Newest first: Orbax renames a complete directory into place, named by a plain number.

    Raises:
      UserError: the directory cannot be read.
    """
    try:
        names = [path.name for path in directory.iterdir() if path.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read checkpoints under {directory}: {error.strerror}") from error
    numbers = (int(name) for name in names if name.isdecimal() and str(int(name)) == name)
    return sorted(numbers, reverse=True)


def newest(
    directory: Path, refused: dict[int, str], *, hashed: bool = True, log_refused: bool = True
) -> int | None:
    """The newest step that verifies and is not refused yet; others are logged and refused.

    Args:
      hashed: reads the files whole; otherwise seals, sizes and what was hashed before decide.
    """
    remote.fetch(directory)
    while True:
        chosen = None
        if jax.process_index() == 0:
            chosen = _newest_by_size(directory, refused, log_refused)
        chosen = agreed("newest", chosen)
        if chosen is not None:
            remote.fetch(directory / str(chosen), whole=True)
        if chosen is None or not hashed or (reason := altered(directory, chosen)) is None:
            return chosen
        refuse(directory, refused, chosen, reason, log_it=log_refused)


def _newest_by_size(directory: Path, refused: dict[int, str], log_refused: bool) -> int | None:
    numbers = steps(directory)
    sealed = any(path_of(directory, step).exists() for step in numbers)
    for step in numbers:
        if step not in refused:
            remote.fetch(directory / str(step), whole=True)
            reason = damage(directory, step)
            # In a store it may have been cut short anywhere, while it was sent.
            if reason == UNSEALED and not sealed and not remote.is_copy(directory):
                reason = incomplete(directory / str(step))
            if reason is None:
                return step
            refuse(directory, refused, step, reason, log_it=log_refused)
    return None


def refuse(
    directory: Path, refused: dict[int, str], step: int, reason: str, *, log_it: bool = True
) -> None:
    refused[step] = reason
    if log_it and jax.process_index() == 0:
        log.warning("checkpoint %s skipped: %s", directory / str(step), reason)


def damage(directory: Path, step: int) -> str | None:
    """Why a step is not as it was sealed, by its sizes and by what was hashed before; or None."""
    path = directory / str(step)
    try:
        if not any(path.iterdir()):
            return EMPTY
        if not path_of(directory, step).exists():
            return UNSEALED
        content = json.loads(path_of(directory, step).read_text())
        if (sealed := content.get("step", step)) != step:  # a seal that names no step is accepted
            return f"its seal is of step {sealed}: it was renamed"
        if reason := incomplete(path):
            return reason
        for name, (size, _) in content["files"].items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if (path / name).stat().st_size != size:
                return f"{name} has {(path / name).stat().st_size} bytes and not {size}"
        stamp, reason = _hashed.get(path, (None, None))
        return reason if stamp == _stamp(path, content["files"]) else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return _unreadable(error)


def altered(directory: Path, step: int) -> str | None:
    """Why the bytes of a step are not those that were sealed; None if they are, or if no seal is.

    All processes call it: each hashes a share of the files, unless it has hashed them as they are.
    """
    path, reason, stamp = directory / str(step), None, None
    try:
        if path_of(directory, step).exists():
            files = json.loads(path_of(directory, step).read_text())["files"]
            stamp = _stamp(path, files)
            before, reason = _hashed.get(path, (None, None))
            if before != stamp:
                reason = None
                wrong = differing(path, files, _share({name: files[name][0] for name in files}))
                if wrong:
                    reason = f"{wrong[0]} is not what was written, its SHA-256 differs"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = _unreadable(error)
    reason = next((why for why in gather("altered", reason) if why is not None), None)
    _hashed[path] = stamp, reason
    return reason


def differing(path: Path, files: Mapping[str, list], names: Iterable[str]) -> list[str]:
    """Those of the named files whose bytes are not the sealed ones; it asks no other process."""
    digests = checksum.of_files(path, names)
    return [name for name, digest in digests.items() if digest != files[name][1]]


def changed(directory: Path, step: int) -> list[str]:
    """The files of a sealed step whose bytes are not the sealed ones; see `damage` for the rest."""
    files = json.loads(path_of(directory, step).read_text())["files"]
    return differing(directory / str(step), files, files)


def incomplete(path: Path) -> str | None:
    names = ("_CHECKPOINT_METADATA", "state", "meta")
    missing = [name for name in names if not (path / name).exists()]
    return f"{missing[0]} is missing" if missing else None


def path_of(directory: Path, step: int) -> Path:
    return directory / f"{step}.sha256.json"


def seal(directory: Path, step: int, meeting: Callable[[Any], list] | None = None) -> None:
    """Hashes a complete step and writes its seal, the whole file or none of it.

    All processes call it: each hashes a share of the files, process 0 writes.

    Args:
      meeting: (value) -> the values of all processes.
    """
    meeting = meeting or functools.partial(gather, f"{directory.parent.name}/seal")
    path, sizes = directory / str(step), None
    if jax.process_index() == 0:
        paths = {file.relative_to(path).as_posix(): file for file in path.rglob("*")}
        sizes = {name: paths[name].stat().st_size for name in paths if paths[name].is_file()}
    sizes, digests = meeting(sizes)[0], {}
    if not remote.is_copy(directory):
        names = _share(sizes)
    else:  # until it is sent, process 0's copy alone has it
        names = sizes if jax.process_index() == 0 else []
    mine = checksum.of_files(path, names)
    for part in meeting(mine):
        digests |= part
    files = {name: [sizes[name], digests[name]] for name in sorted(sizes)}
    if jax.process_index() == 0:
        remote.begin(path)
        temporary = path_of(directory, step).with_suffix(".tmp")
        with open(temporary, "w") as file:
            json.dump({"step": step, "files": files}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path_of(directory, step))
        remote.send(directory.parent)  # with what was measured up to here, and the seal last
        remote.end(path)
    if path.exists():
        _hashed[path] = _stamp(path, files), None


def seal_if_none(directory: Path, step: int) -> None:
    """Seals the step on which all processes have agreed, if it has no seal."""
    if agreed("unsealed", not path_of(directory, step).exists()):
        seal(directory, step)


def storage_reason(error: BaseException | None) -> str | None:
    """What the system said, if the error or one of its causes is about storage.

    TensorStore has it only in its text.
    """
    while error is not None:
        if isinstance(error, remote.StoreError):
            return str(error)
        if isinstance(error, OSError):
            return error.strerror or str(error)
        for number in _STORAGE:
            if os.strerror(number).lower() in str(error).lower():
                return os.strerror(number)
        error = error.__cause__ or error.__context__
    return None


def _share(sizes: Mapping[str, int]) -> list[str]:
    """The files that this process hashes: dealt out by size, so that all have alike to read."""
    names = sorted(sizes, key=lambda name: (-sizes[name], name))
    return names[jax.process_index() :: jax.process_count()]


def _stamp(path: Path, files: Mapping[str, list]) -> tuple:
    """What changes when a file is written again, or its seal."""
    facts = {name: (path / name).stat() for name in files}
    return tuple(
        (name, *files[name], fact.st_size, fact.st_mtime_ns) for name, fact in facts.items()
    )


def _unreadable(error: Exception) -> str:
    return f"its seal or its files cannot be read ({error})"
