"""Writes sets of records (see `records`): by several threads, a shard each, and resumable."""

import concurrent.futures
import json
import pathlib
import threading

from dlc_jax.data import shard
from dlc_jax.data.listing import DAMAGE
from dlc_jax.data.records import FORMAT, PREFIX, WHAT, index_digest, pack
from dlc_jax.errors import UserError


def bytes_of(listing, index):
    """An image's bytes, or None if they are damaged.

    Raises:
      UserError: the place itself refuses; a record must not stand for that.
    """
    try:
        return listing.read(index)
    except DAMAGE as error:
        if getattr(error, "errno", None) is None:
            return None
        raise UserError(
            f"cannot read image {listing.names[index]}: {error.strerror}; complete shards are kept"
        ) from error


def write(directory, listing, *, shard_size=4096, workers=1, progress=None):
    """Writes the images of a listing, in its order, or what is missing of them.

    A shard that an earlier run completed is kept if its SHA-256 is still right; the bytes are the
    same however often it was interrupted. An image that cannot be read (a damaged member of an
    archive) is kept as a record of no bytes, counted as `unreadable` in its shard's entry.

    Args:
      directory: where; made if absent.
      listing: a `Listing`. A `sequential` one is read by one worker.
      shard_size: images per shard.
      workers: threads, a shard each.
      progress: called as progress(images done, images in all) now and then, from one thread at a
        time.

    Returns:
      The manifest.

    Raises:
      UserError: if the directory holds other records (differing keys are named), or a disk refuses
        to write or to read.
    """
    directory = pathlib.Path(directory)
    labels = None if listing.labels is None else listing.labels.tolist()
    description = shard.plain(
        {
            "format": FORMAT,
            "kind": PREFIX,
            "crop": None,
            "index": index_digest(listing.names, labels),
            "count": len(listing),
            "classes": listing.classes,
            "content": listing.content,
            "shard_size": shard_size,
        }
    )
    names = shard.file_names(PREFIX, count=len(listing), shard_size=shard_size)
    with shard.disk(f"{WHAT} {directory}"):
        directory.mkdir(parents=True, exist_ok=True)
        known = shard.complete(directory, PREFIX, description, what=WHAT)
        work = _Work(listing, description, progress)
        with concurrent.futures.ThreadPoolExecutor(1 if listing.sequential else workers) as pool:
            jobs = [
                pool.submit(work.make, directory / name, known.get(name), k * shard_size)
                for k, name in enumerate(names)
            ]
            try:
                finished, _ = concurrent.futures.wait(
                    jobs, return_when=concurrent.futures.FIRST_EXCEPTION
                )
            except BaseException:  # Ctrl-C
                work.stop.set()
                raise
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        errors = [job.exception() for job in finished if job.exception() is not None]
        errors.sort(key=lambda error: isinstance(error, InterruptedError))
        if errors:
            raise errors[0]
        index = {"names": listing.names, "labels": labels}
        shard.write_json(directory / "index.json", index, indent=None)
        shard.finish(directory, names, PREFIX, description, what=WHAT)
    return json.loads((directory / "manifest.json").read_text())


class _Work:
    """The shards of a set, each made by one thread. An error in one stops the others."""

    def __init__(self, listing, description, progress):
        self.stop = threading.Event()
        self._listing, self._description, self._progress = listing, description, progress
        self._done, self._lock = 0, threading.Lock()

    def make(self, path, entry, start):
        """Writes the shard whose first record is `start`, unless what its entry says is there."""
        end = min(len(self._listing), start + self._description["shard_size"])
        try:
            if shard.is_intact(path, entry):
                self._count(end - start)
                return
            unreadable = []
            shard.write_shard(
                path,
                self._records(start, end, unreadable),
                description=self._description,
                unreadable=lambda: len(unreadable),
            )
        except BaseException:
            self.stop.set()
            raise

    def _records(self, start, end, unreadable):
        listing = self._listing
        for index in range(start, end):
            if self.stop.is_set():
                raise InterruptedError("stopped")
            data = bytes_of(listing, index)
            if data is None:
                unreadable.append(index)
            yield pack(listing.names[index], data or b"", listing.label(index))
            self._count(1)

    def _count(self, images):
        with self._lock:
            self._done += images
            if self._progress is not None:
                self._progress(self._done, len(self._listing))
