"""Images in ArrayRecord shards, as `dlc data convert` writes them.

    DIR/manifest.json
        description of the set, each shard's count, bytes and SHA-256; written last
    DIR/index.json
        {"names": [...], "labels": [...] or null}, in the order of the records
    DIR/images-00003-of-00010.arrayrecord
        records 3 * shard_size and on

A record is a 4-byte little-endian length, a JSON header of that length, {"name": relative name,
"label": int or null}, and the bytes of the image file, unchanged. `record_writer` writes them.
"""

import json
import pathlib
import struct

from array_record.python.array_record_module import ArrayRecordReader

from dlc_jax import checksum
from dlc_jax.data import shard
from dlc_jax.data.listing import Listing, digest
from dlc_jax.errors import UserError

FORMAT = 1
PREFIX = "images"
# Shards. Many systems let a process have 1024 files open, some 256; opening takes less time than
# decoding an image.
MAX_OPEN = 128
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


def index_digest(names, labels):
    """What the manifest says of index.json; labels are a list or None."""
    return digest([json.dumps([names, labels])])


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
                f"{directory} is not a set of images of format {FORMAT}; convert the images again"
            )
        index = json.loads((directory / "index.json").read_text())
        names, labels, classes = index["names"], index["labels"], manifest["classes"]
        shards = [(entry["file"], entry["count"], entry["bytes"]) for entry in manifest["shards"]]
        sound = manifest["index"] == index_digest(names, labels)
        sound = sound and sum(count for _, count, _ in shards) == len(names)
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
        if wrong := shard.wrong_size(directory / name, size):
            raise UserError(f"damaged images: {directory / name} {wrong}; convert again")
    reader = RecordReader([str(directory / name) for name, *_ in shards], shard_size)
    size = sum(size for *_, size in shards)
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
    """Reads every byte of a set, and returns its manifest.

    Args:
      progress: called as progress(images done, images in all) after every shard.

    Raises:
      UserError: names the first shard whose SHA-256 is not the manifest's.
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
