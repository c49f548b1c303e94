"""Images in ArrayRecord shards, as `dlc data convert` writes them.

    DIR/manifest.json                         description of the set, each shard's count, bytes and SHA-256; written last
    DIR/index.json                            {"names": [...], "labels": [...] or null}, in the order of the records
    DIR/images-00003-of-00010.arrayrecord     records 3 * shard_size and on

A record is a 4-byte little-endian length, a JSON header of that length, {"name": relative name,
"label": int or null}, and the bytes of the image file, unchanged.
"""

import concurrent.futures
import json
import pathlib
import struct
import threading

from array_record.python.array_record_module import ArrayRecordReader

from dlc_jax import checksum
from dlc_jax.data import shard
from dlc_jax.data.listing import DAMAGE, Listing, digest
from dlc_jax.errors import UserError

FORMAT = 1
PREFIX = "images"
MAX_OPEN = 128  # shards; many systems let a process have 1024 files open, some 256, and opening takes less than decoding an image
WHAT = "records of images"


def pack(name, data, label=None):
    """One record, bytes, of an image's relative name, encoded bytes and class (int or None)."""
    header = json.dumps({"label": label, "name": name}, sort_keys=True).encode()
    return struct.pack("<I", len(header)) + header + data


def unpack(record):
    """(name, data, label) of a record. Raises ValueError for bytes that `pack` did not make."""
    try:
        (length,) = struct.unpack_from("<I", record)
        header = json.loads(record[4 : 4 + length])
        return header["name"], record[4 + length :], header["label"]
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise ValueError("not a record of an image") from error


def describe(listing, *, shard_size):
    """What a set of records is, the manifest without its shards."""
    labels = None if listing.labels is None else listing.labels.tolist()
    about = dict(
        count=len(listing), classes=listing.classes, content=listing.content, shard_size=shard_size
    )
    return shard.plain(
        dict(
            format=FORMAT,
            kind=PREFIX,
            crop=None,
            index=digest([json.dumps([listing.names, labels])]),
            **about,
        )
    )


def bytes_of(listing, index):
    """An image's bytes, or None if they are damaged. UserError if the place itself refuses: a
    record must not stand for that.
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

    A shard that is complete is not written again; the bytes are the same however often it was
    interrupted. An image that cannot be read (a damaged member of an archive) is kept as a record
    of no bytes, counted as `unreadable` in its shard's entry.

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
    description = describe(listing, shard_size=shard_size)
    names = shard.file_names(PREFIX, count=len(listing), shard_size=shard_size)
    with shard.disk(f"{WHAT} {directory}"):
        directory.mkdir(parents=True, exist_ok=True)
        known = shard.complete(directory, PREFIX, description, what=WHAT)
    done, lock, stop = 0, threading.Lock(), threading.Event()

    def rows(start, end, unreadable):
        nonlocal done
        for index in range(start, end):
            if stop.is_set():
                raise InterruptedError("stopped")
            data = bytes_of(listing, index)
            if data is None:
                unreadable.append(index)
            label = None if listing.labels is None else int(listing.labels[index])
            yield pack(listing.names[index], data or b"", label)
            with lock:
                done += 1
                if progress is not None:
                    progress(done, len(listing))

    def make(k):
        nonlocal done
        start, end, unreadable = k * shard_size, min(len(listing), (k + 1) * shard_size), []
        try:
            if shard.is_intact(directory / names[k], known.get(names[k])):
                with lock:
                    done += end - start
                    if progress is not None:
                        progress(done, len(listing))
                return
            path, taken = directory / names[k], rows(start, end, unreadable)
            shard.write_shard(
                path, taken, description=description, unreadable=lambda: len(unreadable)
            )
        except BaseException:
            stop.set()
            raise

    with shard.disk(f"{WHAT} {directory}"):
        with concurrent.futures.ThreadPoolExecutor(1 if listing.sequential else workers) as pool:
            jobs = [pool.submit(make, k) for k in range(len(names))]
            try:
                finished, _ = concurrent.futures.wait(
                    jobs, return_when=concurrent.futures.FIRST_EXCEPTION
                )
            except BaseException:  # Ctrl-C
                stop.set()
                raise
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
            first = [job.exception() for job in finished if job.exception() is not None]
            first.sort(key=lambda error: isinstance(error, InterruptedError))
            if first:
                raise first[0]
        labels = None if listing.labels is None else listing.labels.tolist()
        shard.write_json(
            directory / "index.json", {"names": listing.names, "labels": labels}, indent=None
        )
        shard.finish(directory, names, PREFIX, description, what=WHAT)
    return json.loads((directory / "manifest.json").read_text())


def is_set(directory):
    """Whether a folder holds a complete set of records of images."""
    try:
        found = json.loads((pathlib.Path(directory) / "manifest.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("kind") == PREFIX


def open_records(directory):
    """The `Listing` of a set of records, in the order of the records.

    Raises:
      UserError: if it is unfinished or damaged; the file is named.
    """
    directory = pathlib.Path(directory)
    try:
        manifest = json.loads((directory / "manifest.json").read_text())
        if manifest["format"] != FORMAT or manifest["kind"] != PREFIX:
            raise UserError(
                f"{directory} is no set of images of format {FORMAT}; convert the images again"
            )
        index = json.loads((directory / "index.json").read_text())
        names, labels, classes = index["names"], index["labels"], manifest["classes"]
        shards = [(entry["file"], entry["count"], entry["bytes"]) for entry in manifest["shards"]]
        sound = manifest["index"] == digest([json.dumps([names, labels])]) and sum(
            s[1] for s in shards
        ) == len(names)
        shard_size, content = manifest["shard_size"], manifest["content"]
    except OSError as error:
        raise UserError(
            f"cannot read images in {directory}: {error.strerror or error}; convert the images "
            "again"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"damaged images in {directory}: the manifest or index.json cannot be read; convert "
            "again"
        ) from error
    if not sound:
        raise UserError(
            f"damaged images in {directory}: index.json does not match the manifest; convert again"
        )
    for name, _, size in shards:
        path = directory / name
        found = path.stat().st_size if path.exists() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise UserError(f"damaged images: {path} {what}; convert again")
    reader = RecordReader([str(directory / name) for name, *_ in shards], shard_size)
    size = sum(s[2] for s in shards)
    return Listing(
        "records", names, reader, labels=labels, classes=classes, content=content, size=size
    )


class RecordReader:
    """Index -> bytes of the image file."""

    def __init__(self, paths, shard_size):
        self.paths, self.shard_size, self._readers = paths, shard_size, {}

    def __call__(self, index):
        k, row = divmod(index, self.shard_size)
        try:
            # setdefault is atomic; a second thread's reader of the same shard is dropped.
            reader = self._readers.get(k) or self._readers.setdefault(k, self._open(k))
            for old in list(self._readers)[:-MAX_OPEN]:
                self._readers.pop(old, None)  # it closes when no thread reads from it any more
            return unpack(reader.read([row])[0])[1]
        except (RuntimeError, OSError, IndexError) as error:
            raise ValueError(
                f"damaged shard {self.paths[k]}: {str(error).splitlines()[0]}"
            ) from error

    def close(self):
        self._readers.clear()  # each closes when no thread reads from it any more

    def _open(self, k):
        return ArrayRecordReader(self.paths[k], "readahead_buffer_size:0")

    def __getstate__(self):  # readers do not travel to worker processes
        return {**self.__dict__, "_readers": {}}


def verify(directory, *, progress=None):
    """Reads every byte of a set; UserError names the first shard whose SHA-256 is not the
    manifest's. Returns the manifest.

    progress(images done, images in all) is called after every shard.
    """
    directory = pathlib.Path(directory)
    open_records(directory)
    manifest = json.loads((directory / "manifest.json").read_text())
    done = 0
    for entry in manifest["shards"]:
        if checksum.of_file(directory / entry["file"]) != entry["sha256"]:
            raise UserError(
                f"damaged images: {directory / entry['file']} has changed; convert again"
            )
        done += entry["count"]
        if progress is not None:
            progress(done, manifest["count"])
    return manifest
