"""Converts images of any place to ArrayRecord shards (see `records`), resumable and read back.

A set of records trains faster than a folder of a million files, and has a checksum for every shard.
The bytes of the image files stay as they are, so that both give the same batches.
"""

import contextlib
import fcntl
import os
import pathlib
import re

from dlc_jax.data import files, naming, record_writer, records, shard
from dlc_jax.data.sweep import sweep
from dlc_jax.errors import UserError

# What an unfinished conversion leaves, beside index.json at its end.
PART = re.compile(
    rf"{records.PREFIX}-\d{{5}}-of-\d{{5}}\.arrayrecord(\.json)?(\.tmp)?"
    r"|(index|manifest)\.json\.tmp"
)


def convert(
    source, destination, *, split=None, field="image", shard_size=1024, workers=None, progress=None
):
    """Writes the images of a place as a set of records, or what is missing of it.

    Killed at any moment, the same call goes on: complete shards are not written again, and the
    bytes are those of a conversion that was not interrupted. Every shard is read back before it
    counts; memory holds a few images per worker.

    Args:
      source: a place as `files.open_files` takes it.
      destination: a folder; made if absent, else it must be empty or hold this conversion.
      split: "train", "validation" or "test": only what is in the folder of that name; None for
        everything, folders kept in the names.
      field: image column of Parquet, image feature of TFDS, array of .npz.
      shard_size: images per shard.
      workers: threads, each at a shard; as many as there are cores if None. A compressed tar is
        read by one.
      progress: called as progress(done, total), now and then.

    Returns:
      A dict: "images", "shards", "resumed" (shards that were there), "bytes", "classes",
      "unreadable" (images kept without bytes) and "skipped", {reason: count} of what was left out.

    Raises:
      UserError: the source cannot be read, the destination is another's or inside the source, or
        the disk refuses.
    """
    source, destination = _place(source), _place(destination)
    if shard_size < 1 or (workers is not None and workers < 1):
        raise UserError(f"shard size and workers must be 1 or more; got {shard_size} and {workers}")
    _check(source, destination)
    images = _images(source, split=split, field=field)
    with _alone(destination):
        before = {path.name: path.stat().st_ino for path in destination.glob("*.arrayrecord")}
        workers = workers or os.cpu_count() or 1
        manifest = record_writer.write(
            destination, images, shard_size=shard_size, workers=workers, progress=progress
        )
        for path in destination.glob("*.tmp"):
            # Of a conversion into other shards that was killed before its first was complete.
            if PART.fullmatch(path.name):
                path.unlink()
        shards = manifest["shards"]
        names = [entry["file"] for entry in shards]
        resumed = sum((destination / name).stat().st_ino == before.get(name) for name in names)
    return {
        "images": manifest["count"],
        "shards": len(shards),
        "resumed": resumed,
        "bytes": sum(entry["bytes"] for entry in shards),
        "classes": len(manifest["classes"]),
        "unreadable": sum(entry["unreadable"] for entry in shards),
        "skipped": images.skipped,
    }


def verify(source, destination, *, split=None, field="image", workers=None, progress=None):
    """Compares a conversion with its source.

    Every checksum first, then the names, the classes and the bytes of every image.

    Args: as of `convert`; with the split that was converted.

    Returns:
      The number of images.

    Raises:
      UserError: a shard is damaged, or the two differ; the first ten images that do are named.
    """
    source, destination = _place(source), _place(destination)
    # Half of the way are the checksums, half the comparison.
    half = progress and (lambda done, total: progress(done, 2 * total))
    records.verify(destination, progress=half)
    copy, images = records.open_records(destination), _images(source, split=split, field=field)
    if sorted(copy.names) != sorted(images.names):
        only = sorted(set(copy.names) ^ set(images.names))
        where = destination if only[0] in set(copy.names) else source
        raise UserError(
            f"{destination} is not {source}: {len(only)} images are in one of them only, such as "
            f"{only[0]} in {where}"
        )
    if copy.classes != images.classes:
        raise UserError(f"{destination} is not {source}: it has other classes")
    place = {name: row for row, name in enumerate(copy.names)}

    def same(row):
        there = place[images.names[row]]
        try:
            data = record_writer.bytes_of(images, row) or b""
            return copy.label(there) == images.label(row) and copy.read(there) == data
        except ValueError:  # a record that cannot be read
            return False

    workers = 1 if images.sequential else workers or os.cpu_count() or 1
    halfway = progress and (lambda done, total: progress(total + done, 2 * total))
    alike = sweep(same, range(len(images)), workers=workers, progress=halfway)
    other = [images.names[row] for row, good in enumerate(alike) if not good]
    if other:
        raise UserError(
            f"{destination} is not {source}: {len(other)} images differ, such as "
            f"{', '.join(other[:10])}"
        )
    return len(images)


def _images(source, *, split, field):
    """The images of a place by name, or as they come where another order is slow."""
    found = files.scan(source, field=field, cache_gb=files.UNPACKED_GB)
    rows = range(len(found))
    if split is not None:
        splits = naming.split_of(found.names) or []
        if split not in splits:
            known = ", ".join(sorted(set(splits) - {None})) or "none"
            raise UserError(
                f"{source} has no folder for the split {split}; it has {known}. Without --split "
                "everything is converted"
            )
        rows = [row for row in rows if splits[row] == split]
    return found.select(rows if found.sequential else sorted(rows, key=found.names.__getitem__))


def _place(path):
    """A path as `files` takes it: names such as tfds:NAME and gs://… stay as they are."""
    if str(path).startswith("tfds:") or "://" in str(path):
        return path
    return pathlib.Path(path).expanduser()


def _check(source, destination):
    """Refuses a destination where this conversion cannot go.

    Whether a conversion that is there is the same one, `record_writer` finds out.
    """
    if not isinstance(destination, pathlib.Path):
        raise UserError(
            f"{destination} is not a folder of this machine; convert into a folder and copy that "
            "there"
        )
    if isinstance(source, pathlib.Path) and destination.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{destination} is inside of {source}; give a folder outside of it")
    if not destination.is_dir() or records.is_set(destination):
        return
    found = sorted(path.name for path in destination.iterdir() if not path.name.startswith("."))
    begun = any(name.endswith(".arrayrecord.json") for name in found)
    other = [
        name for name in found if not (PART.fullmatch(name) or (begun and name == "index.json"))
    ]
    other += [
        name for name in found if name.endswith(".arrayrecord") and f"{name}.json" not in found
    ]
    if other:
        raise UserError(
            f"{destination} holds something else ({other[0]}); give a new or an empty folder"
        )


@contextlib.contextmanager
def _alone(directory):
    """Keeps a second conversion out. The lock of a process ends with it, however it ends."""
    with shard.disk(f"{records.WHAT} {directory}"):
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another conversion is writing {directory}; wait until it is done"
            ) from None
        except OSError:
            pass  # some network disks have no locks
        yield
    finally:
        os.close(handle)
