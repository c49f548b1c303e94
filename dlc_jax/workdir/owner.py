"""Who writes in a directory: one live run, which the system knows however it ends."""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from dlc_jax import remote
from dlc_jax.errors import UserError
from dlc_jax.workdir import files


def check(directory: str | Path, *, alone: bool = True) -> None:
    """Refuses at once what `lock` would refuse later, and takes nothing.

    Args:
      alone: this is not one of several processes, of which the first may hold it already.

    Raises:
      UserError: another live run holds it; a part of its path is a file.
    """
    directory = Path(directory).absolute()
    nearest = next(path for path in (directory, *directory.parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"{nearest} is not a directory; give another --workdir")
    if remote.is_copy(directory):  # a lock there may be of a killed run: `lock` waits for it
        return
    if alone and (by := holder(directory)):
        raise UserError(_in_use(directory, by))


@contextlib.contextmanager
def lock(directory: str | Path) -> Iterator[Path]:
    """Makes `directory` and holds it for this run.

    Raises:
      UserError: another live run holds it; it cannot be made or written.
    """
    directory = Path(directory).absolute()
    if not files.writes():
        yield directory
        return
    if remote.is_copy(directory):
        with remote.hold(directory):
            yield directory
        return
    with contextlib.ExitStack() as stack:
        with files.writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(directory / ".lock", "ab", buffering=0))
            try:
                # Held by the open file: the system releases it when the process is gone, kill -9
                # included.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(_in_use(directory, _named(directory))) from None
            os.truncate(file.fileno(), 0)
            facts = {"pid": os.getpid(), "host": socket.gethostname(), "started": files.now()}
            file.write(json.dumps(facts).encode())
        try:
            yield directory
        finally:
            # Nobody's now. After a kill the text stays, but the system has released the lock.
            with contextlib.suppress(OSError):
                os.truncate(file.fileno(), 0)


def holder(directory: str | Path) -> str | None:
    """Who holds the lock of `directory`, in words; None if nobody does.

    It takes the lock for no longer than asking.
    """
    directory = Path(directory)
    if remote.is_copy(directory):
        return remote.holder(directory)
    try:
        with open(directory / ".lock", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _named(directory)
    except OSError:  # there is none, or it cannot be opened
        return None
    return None


def _in_use(directory: Path, by: str) -> str:
    return f"{directory} is in use by {by}; wait for it, stop it, or give another --workdir"


def _named(directory: Path) -> str:
    try:
        facts = json.loads((directory / ".lock").read_text())
        return f"process {facts['pid']} on {facts['host']} since {facts['started']}"
    except (OSError, ValueError, KeyError):  # it has the lock but has not written its name yet
        return "another run"
