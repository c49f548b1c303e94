"""The local copy of a store's folder: what is alike in both, what is sent and what is fetched."""

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

from dlc_jax.remote.lease import NAME
from dlc_jax.remote.store import Removed, Store, StoreError

TRIES = 5
TOGETHER = 2**26  # bytes of small files that are sent in one call

# Large, and not everybody's: these come when they, or a folder of theirs, are fetched `whole`.
_LARGE = re.compile(r"(^|/)(checkpoints/[^/]+/(?!meta/)|tensorboard/)|\.arrayrecord$")
# Never changed once written under their names, so they need not be read at once to be sent.
_FIXED = re.compile(r"(^|/)checkpoints/[^/]+/|\.arrayrecord$")
_UNFINISHED = re.compile(r"\.(tmp|partial)$|\.orbax-checkpoint-tmp|\.deleting$|^\.")


class Copy:
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
            for rank in sorted({_rank(name) for name in changed}):
                if self.lease is not None:
                    self.lease.check()
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
                (self.folder / name).unlink(missing_ok=True)  # one that was fetched meanwhile
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
