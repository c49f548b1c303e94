"""A folder of an object store: its objects by name, whole, and errors in one line."""

import contextlib
import errno
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dlc_jax.errors import UserError

SCHEMES = {"gs": "gcsfs", "s3": "s3fs"}  # and the package that reaches them
# What tells two versions of an object apart, by the names that file systems have for it.
_VERSIONS = ("ETag", "etag", "generation", "mtime", "LastModified", "created")


class StoreError(UserError):
    """The store refuses, or cannot be reached; the message names the URL."""


class Unreachable(StoreError):
    """No answer, or none that is understood: it may pass."""


class Removed(StoreError):
    """What was listed is not there any more."""


def is_url(text) -> bool:
    """Whether it names a place that is reached by a protocol: gs://bucket/folder."""
    return "://" in str(text)


class Store:
    """The objects below a URL, by their names relative to it.

    Every method raises StoreError: no such bucket, no right to it, no credentials, no connection.
    """

    def __init__(self, url: str):
        """Reaches nothing yet.

        Raises:
          UserError: the scheme is unknown, or its package is not installed.
        """
        scheme, _, path = url.partition("://")
        path = path.strip("/")
        self.url = f"{scheme}://{path}"
        if scheme not in SCHEMES:
            raise UserError(f"{url}: {scheme}:// is unknown; known: gs://bucket/…, s3://bucket/…")
        if not path:
            raise UserError(f"{url} names no bucket; give {scheme}://bucket/folder")
        import fsspec

        try:
            kind = fsspec.get_filesystem_class(scheme)
        except ImportError as error:
            package = SCHEMES[scheme]
            raise UserError(f"{url} needs the package {package}: pip install {package}") from error
        # What matters is raised; they log tracebacks before, and that there was a second try.
        for name in ("gcsfs", "s3fs", "google.auth"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        with self._reaching():
            self._files = kind(use_listings_cache=False, skip_instance_cache=True)
        self._root = path

    def versions(self, prefix: str = "") -> dict[str, tuple[int, str]]:
        """{name: (bytes, a text that changes with each version)} of what is below `prefix`."""
        with self._reaching():
            try:
                found = self._files.find(self._path(prefix), detail=True)
            except FileNotFoundError:
                self._check_bucket()
                return {}
        start = len(self._root) + 1
        return {
            path[start:]: _version(facts)
            for path, facts in found.items()
            if facts["type"] == "file" and not path.endswith("/")
        }

    def read(self, name: str) -> bytes | None:
        """An object's bytes; None if there is none."""
        with self._reaching():
            try:
                return self._files.cat_file(self._path(name))
            except FileNotFoundError:
                return None

    def write(self, objects: Mapping[str, bytes]) -> None:
        """Puts objects into the store, each whole or not at all, over those of before."""
        with self._reaching():
            self._files.pipe({self._path(name): value for name, value in objects.items()})

    def create(self, name: str, value: bytes) -> bool:
        """Puts an object there if there is none; whether it was this call that did.

        The store decides, so of many who call at once one succeeds.
        """
        with self._reaching():
            if self._files.exists(self._path(name)):
                return False
            try:
                self._files.pipe_file(self._path(name), value, mode="create")
            except FileExistsError:
                return False
            return self._files.cat_file(self._path(name)) == value

    def get(self, names: Sequence[str], folder: Path) -> None:
        """Downloads objects to files of the same names; their folders are made.

        Raises:
          Removed: one of them is not there.
        """
        files = [folder / name for name in names]
        for parent in {file.parent for file in files}:
            parent.mkdir(parents=True, exist_ok=True)
        if names:
            with self._reaching():
                try:
                    self._files.get([self._path(name) for name in names], [str(f) for f in files])
                except FileNotFoundError as error:
                    raise Removed(
                        f"{self.url}: objects were removed while they were read; run the same "
                        "command again"
                    ) from error

    def put(self, names: Sequence[str], folder: Path) -> None:
        """Uploads files that nobody changes meanwhile."""
        if names:
            with self._reaching():
                local = [str(folder / name) for name in names]
                self._files.put(local, [self._path(name) for name in names])

    def remove(self, names: Sequence[str]) -> None:
        """Removes objects; one that is not there is no error."""
        with self._reaching():
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    self._files.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")

    def _check_bucket(self) -> None:
        """Raises FileNotFoundError if the bucket, and not only a folder of it, is absent."""
        bucket = self._root.partition("/")[0]
        self._files.ls(bucket)

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except (UserError, MemoryError):
            raise
        except FileNotFoundError as error:
            raise StoreError(
                f"{self.url}: there is no such bucket; make it, or correct the URL"
            ) from error
        except PermissionError as error:
            raise StoreError(
                f"{self.url}: access is denied ({_first_line(error)}); give this machine's account "
                "the right to read, write and delete objects there"
            ) from error
        except Exception as error:  # each file system has errors of its own
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise StoreError(
                    f"no room for what comes from {self.url}: {error.strerror}; make room, or set "
                    "DLC_SCRATCH to a folder with more"
                ) from error
            what = f"{type(error).__name__}: {_first_line(error)}"
            raise Unreachable(
                f"{self.url} cannot be reached ({what}); check credentials and connection"
            ) from error


def _version(facts: Mapping) -> tuple[int, str]:
    return facts["size"], " ".join(str(facts[name]) for name in _VERSIONS if facts.get(name))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else "no more is said"
