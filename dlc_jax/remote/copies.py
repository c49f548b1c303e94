"""Local copies of folders of object stores, which ones there are, and what is sent and fetched."""

import atexit
import contextlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from dlc_jax.errors import UserError
from dlc_jax.remote.lease import NAME, Lease, has_ended, named
from dlc_jax.remote.store import Removed, Store, StoreError, is_url

TRIES = 5
TOGETHER = 2**26  # bytes of small files that are sent in one call

# Large, and not everybody's: these come when they, or a folder of theirs, are fetched `whole`.
_LARGE = re.compile(r"(^|/)(checkpoints/[^/]+/(?!meta/)|tensorboard/)|\.arrayrecord$")
# Never changed once written under their names, so they need not be read at once to be sent.
_FIXED = re.compile(r"(^|/)checkpoints/[^/]+/|\.arrayrecord$")
_UNFINISHED = re.compile(r"\.tmp$|\.orbax-checkpoint-tmp|\.deleting$|^\.")
_copies: dict[str, "_Copy"] = {}  # by URL


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
    copy = _Copy(Store(url), _scratch())
    copy.fetch("")
    _copies[url] = copy
    return copy.folder


def is_copy(path: str | Path) -> bool:
    """Whether a path is in the copy of a store's folder."""
    return _find(path)[0] is not None


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
    copy.lease = Lease(copy.store)
    try:
        yield
    finally:
        with contextlib.suppress(UserError):  # whoever ends for another reason says that one
            copy.send("")
        lease, copy.lease = copy.lease, None
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


def size(path: str | Path) -> int | None:
    """Bytes in the store below a path of a copy; None of what is not in one."""
    copy, name = _find(path)
    return None if copy is None else sum(size for size, _ in copy.store.versions(name).values())


def remove(path: str | Path) -> None:
    """Removes from the store what is at or below a path of a copy, which is gone here."""
    copy, name = _find(path)
    if copy is not None:
        copy.remove(name)


class _Copy:
    """A store's folder and its local copy: which versions are alike.

    Attributes:
      lease: the right to write, if this process has it.
    """

    def __init__(self, store: Store, folder: Path):
        self.store, self.folder, self.lease = store, folder, None
        # {name: (version in the store, size and time of the file here)} when they were alike
        self._alike: dict[str, tuple] = {}
        self._lock = threading.RLock()

    def send(self, prefix: str) -> None:
        with self._lock:
            found = {name: _stamp(self.folder / name) for name in self._here(prefix)}
            changed = [
                name
                for name, stamp in found.items()
                if stamp is not None and self._alike.get(name, (None, None))[1] != stamp
            ]
            if not changed:
                return
            if self.lease is not None:
                self.lease.check()
            for rank in sorted({_rank(name) for name in changed}):
                names = [name for name in changed if _rank(name) == rank]
                self._put(names)
                there = self.store.versions(prefix)
                for name in names:
                    self._check(name, found[name], there.get(name))
                    self._alike[name] = there.get(name), found[name]

    def _check(self, name: str, stamp: tuple, there: tuple[int, str] | None) -> None:
        """Refuses what did not arrive whole, before anything vouches for it."""
        size = None if there is None else there[0]
        if size != stamp[0] and _stamp(self.folder / name) == stamp:  # and has not changed since
            raise StoreError(
                f"{self.store.url}/{name} has {size} bytes after {stamp[0]} were sent; run the "
                "same command again"
            )

    def fetch(self, prefix: str, *, whole: bool = False) -> None:
        for _ in range(TRIES):  # another process may remove what was just listed
            with contextlib.suppress(Removed):
                return self._fetch(prefix, whole)
        self._fetch(prefix, whole)

    def _fetch(self, prefix: str, whole: bool) -> None:
        with self._lock:
            there = self.store.versions(prefix)
            there.pop(NAME, None)
            if prefix not in there and prefix:
                (self.folder / prefix).mkdir(parents=True, exist_ok=True)
            wanted = []
            for name, version in there.items():
                known, stamp = self._alike.get(name, (None, None))
                if not whole and _LARGE.search(name):
                    (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                elif known != version or stamp is None or _stamp(self.folder / name) is None:
                    wanted.append(name)
            try:
                self.store.get(wanted, self.folder)
            except BaseException:  # what came of it would count as made here, and be sent
                for name in wanted:
                    (self.folder / name).unlink(missing_ok=True)
                raise
            for name in wanted:
                self._alike[name] = there[name], _stamp(self.folder / name)
            for name in [name for name in self._alike if _below(name, prefix)]:
                if name not in there:  # another process has removed it
                    (self.folder / name).unlink(missing_ok=True)
                    del self._alike[name]

    def remove(self, prefix: str) -> None:
        with self._lock:
            if self.lease is not None:
                self.lease.check()
            names = [name for name in self.store.versions(prefix) if _below(name, prefix)]
            self.store.remove(sorted(names, key=_rank, reverse=True))
            for name in [name for name in self._alike if _below(name, prefix)]:
                del self._alike[name]

    def _here(self, prefix: str) -> Iterator[str]:
        """Names of complete files; in an unfinished folder that is asked for, of all files."""
        top, everything = self.folder / prefix, bool(_UNFINISHED.search(prefix))
        if top.is_file():
            yield prefix
        for place, folders, files in os.walk(top):
            if not everything:
                folders[:] = [name for name in folders if not _UNFINISHED.search(name)]
            for name in files:
                if everything or not _UNFINISHED.search(name):
                    yield (Path(place) / name).relative_to(self.folder).as_posix()

    def _put(self, names: list[str]) -> None:
        fixed = [name for name in names if _FIXED.search(name)]
        self.store.put(fixed, self.folder)
        rest, some = [name for name in names if name not in set(fixed)], {}
        for number, name in enumerate(rest, 1):
            with contextlib.suppress(FileNotFoundError):  # it was temporary
                some[name] = (self.folder / name).read_bytes()
            if some and (number == len(rest) or sum(map(len, some.values())) > TOGETHER):
                self.store.write(some)
                some = {}


def _find(path: str | Path) -> tuple[_Copy | None, str]:
    """(the copy that a path is in, its name there)."""
    if _copies:
        path = Path(path).absolute()
        for copy in _copies.values():
            if path.is_relative_to(copy.folder):
                name = path.relative_to(copy.folder).as_posix()
                return copy, "" if name == "." else name
    return None, ""


def _below(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(f"{prefix}/")


def _rank(name: str) -> int:
    """What vouches for other files is sent after them."""
    return 2 if name.endswith("done.json") else 1 if name.endswith(".json") else 0


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        facts = path.stat()
        return facts.st_size, facts.st_mtime_ns
    except OSError:
        return None


def _scratch() -> Path:
    """A new folder of this process; those of dead processes are removed."""
    parent = Path(os.environ.get("DLC_SCRATCH") or tempfile.gettempdir()).absolute()
    with contextlib.suppress(OSError):
        for left in parent.glob("dlc_jax-*-*"):
            pid = left.name.split("-")[1]
            if pid.isdecimal() and not Path(f"/proc/{pid}").exists() and Path("/proc").is_dir():
                shutil.rmtree(left, ignore_errors=True)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f"dlc_jax-{os.getpid()}-", dir=parent))
    except OSError as error:
        raise UserError(
            f"cannot make a folder in {parent} for the local copy: {error.strerror}; set "
            "DLC_SCRATCH to a folder with room"
        ) from error
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made
