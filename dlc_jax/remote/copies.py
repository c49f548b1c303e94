"""Local copies of folders of object stores, which ones there are, and what is sent and fetched."""

import atexit
import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dlc_jax.errors import UserError
from dlc_jax.remote.lease import NAME, Lease, has_ended, machine, named
from dlc_jax.remote.local_copy import Copy
from dlc_jax.remote.store import Store, StoreError, Unreachable, is_url

BEGUN = ".begun"  # the end of a note's name
_copies: dict[str, Copy] = {}  # by URL


def local(place: str | Path) -> Path:
    """The folder of a path; of a URL, its local copy, made when it is first asked for.

    Raises:
      StoreError: the store cannot be read.
      UserError: an unknown scheme, or its package is not installed.
    """
    if not is_url(place):
        return Path(place)
    url = Store(str(place)).url
    for known, copy in _copies.items():
        if url == known or url.startswith(f"{known}/"):
            return copy.folder / url[len(known) :].lstrip("/")
    copy = Copy(Store(url), _scratch())
    try:
        copy.fetch("")
    except Unreachable as error:  # from the start: a mistake rather than an outage
        raise StoreError(str(error)) from error
    _copies[url] = copy
    return copy.folder


def is_copy(path: str | Path) -> bool:
    """Whether a path is in the copy of a store's folder."""
    return _find(path)[0] is not None


def url_of(path: str | Path) -> str | None:
    """The URL of a path in a copy; None of another."""
    copy, name = _find(path)
    return None if copy is None else f"{copy.store.url}/{name}".rstrip("/")


def shown(text: str) -> str:
    """A message with URLs in place of the paths of copies."""
    for url, copy in _copies.items():
        text = text.replace(str(copy.folder), url)
    return text


@contextlib.contextmanager
def hold(path: str | Path) -> Iterator[None]:
    """Within it, this run alone writes to the store that `path` is a copy of.

    Raises:
      UserError: another live run does.
    """
    copy, _ = _find(path)
    copy.lease = Lease(Store(copy.store.url))  # its signs of life wait for no upload
    try:
        yield
    finally:
        with contextlib.suppress(UserError):  # whoever ends for another reason says that one
            copy.send("")
        lease, copy.lease = copy.lease, None
        with contextlib.suppress(StoreError):  # then the lock is outlived, as after a kill
            lease.release()


def holder(path: str | Path) -> str | None:
    """Who has, or had when it was killed, the right to write to the store of a copy, in words."""
    copy, _ = _find(path)
    text = None if copy is None else copy.store.read(NAME)
    return None if text is None or has_ended(text) else named(text)


def send(path: str | Path) -> None:
    """Sends what is new or changed below a path of a copy; nothing is removed there.

    Raises:
      StoreError: the store refuses, or cannot be reached.
      UserError: another run has taken over meanwhile; nothing is sent.
    """
    copy, name = _find(path)
    if copy is not None:
        copy.send(name)


def fetch(path: str | Path, *, whole: bool = False) -> None:
    """Makes what is below a path of a copy what the store has, but for what was changed here.

    Args:
      whole: with the arrays of checkpoints, the shards of code stores and the event files below it,
        which else come when asked for. Their folders are made in any case.

    Raises:
      StoreError: the store refuses, or cannot be reached.
    """
    copy, name = _find(path)
    if copy is not None:
        copy.fetch(name, whole=whole)


def begin(path: str | Path) -> None:
    """Notes in the store that what is at a path of a copy is sent or removed from now on."""
    copy, name = _find(path)
    if copy is not None:
        copy.store.write({f"{name}{BEGUN}": b"{}"})


def end(path: str | Path) -> None:
    """Takes the note of `begin` away."""
    copy, name = _find(path)
    if copy is not None:
        copy.remove(f"{name}{BEGUN}")
        (copy.folder / f"{name}{BEGUN}").unlink(missing_ok=True)


def begun(path: str | Path) -> list[Path]:
    """Paths in a folder of a copy whose sending or removal was begun and not ended."""
    copy, name = _find(path)
    if copy is None:
        return []
    found = [each for each in copy.store.versions(name) if each.endswith(BEGUN)]
    return [copy.folder / each.removesuffix(BEGUN) for each in found]


def size(path: str | Path) -> int | None:
    """Bytes in the store below a path of a copy; None of what is not in one."""
    copy, name = _find(path)
    return None if copy is None else sum(size for size, _ in copy.store.versions(name).values())


def remove(path: str | Path) -> None:
    """Removes what is at or below a path of a copy: in the store, and here what came from there."""
    copy, name = _find(path)
    if copy is not None:
        copy.remove(name)


def _find(path: str | Path) -> tuple[Copy | None, str]:
    """(the copy that a path is in, its name there)."""
    if _copies:
        path = Path(path).absolute()
        for copy in _copies.values():
            if path.is_relative_to(copy.folder):
                name = path.relative_to(copy.folder).as_posix()
                return copy, "" if name == "." else name
    return None, ""


def _scratch() -> Path:
    """A new folder of this process; those of dead processes of this machine are removed."""
    mine = "dlc_jax_" + hashlib.sha256(machine().encode()).hexdigest()[:12]
    parent = Path(os.environ.get("DLC_SCRATCH") or tempfile.gettempdir()).absolute()
    with contextlib.suppress(OSError):
        for left in parent.glob(f"{mine}-*-*") if machine() else ():
            pid = left.name.split("-")[1]
            if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
                shutil.rmtree(left, ignore_errors=True)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f"{mine}-{os.getpid()}-", dir=parent))
    except OSError as error:
        raise UserError(
            f"cannot make a folder in {parent} for the local copy: {error.strerror}; set "
            "DLC_SCRATCH to a folder with room"
        ) from error
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made
