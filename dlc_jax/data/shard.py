"""ArrayRecord shards beside a manifest, each written completely or not at all.

So a writer that was killed resumes where it was. While a set is being written, each complete shard
has a `.json` of its own beside it, {"description", "shard"}: of which set it is, and its entry for
the manifest. The manifest, written last, is the description and the entries; then the shards' own
files go. Used by the code store and by the records of images.
"""

import contextlib
import hashlib
import json
import os

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from dlc_jax import checksum
from dlc_jax.errors import UserError


def file_names(prefix, *, count, shard_size):
    """["prefix-00000-of-00010.arrayrecord", ...], as many as `count` records need."""
    shards = -(-count // shard_size)
    return [f"{prefix}-{k:05d}-of-{shards:05d}.arrayrecord" for k in range(shards)]


def write_shard(path, records, *, description, **about):
    """Writes one shard and its own file, and reads it back.

    Args:
      path: of the shard; nothing is there until it is complete.
      records: iterable of bytes, taken one at a time.
      description: of the set, JSON.
      **about: more for the entry; a callable is called once all records are taken.

    Returns:
      The entry {"file", "count", "bytes", "sha256", ...}.

    Raises:
      UserError: what is read back is not what was written.
    """
    temporary, count, written = path.with_name(path.name + ".tmp"), 0, hashlib.sha256()
    try:
        # Codes and image files hardly compress. Groups of one: reading one record reads no other.
        writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        try:
            for record in records:
                writer.write(record)
                written.update(record)
                count += 1
        finally:
            writer.close()
        _sync(temporary)
        if _read_back(temporary) != (count, written.digest()):
            raise UserError(
                f"cannot write {path}: other records arrived than were written; is the disk sound?"
            )
        entry = {
            "file": path.name,
            "count": count,
            "bytes": temporary.stat().st_size,
            "sha256": checksum.of_file(temporary),
        }
        entry |= {key: value() if callable(value) else value for key, value in about.items()}
        # In this order: a shard without a file of its own is never of an unfinished set.
        write_json(_sidecar(path), {"description": description, "shard": entry})
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # a full disk needs the room
        raise
    return entry


def _read_back(path):
    """(number of records, SHA-256 of all of them)."""
    reader, found = ArrayRecordReader(str(path), "readahead_buffer_size:0"), hashlib.sha256()
    for k in range(reader.num_records()):
        found.update(reader.read([k])[0])
    count = reader.num_records()
    reader.close()
    return count, found.digest()


def complete(directory, prefix, description, *, what):
    """{file name: entry} of the shards that the manifest and the shards' own files vouch for.

    Raises:
      UserError: if the directory holds another `what` (its plural, for the message); the keys that
        differ are named.
    """
    known = {}
    for path in [
        directory / "manifest.json",
        *sorted(directory.glob(f"{prefix}-*.arrayrecord.json")),
    ]:
        try:
            found = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            continue  # absent or cut off: its shards are made again
        if not isinstance(found, dict):
            continue
        if path.name == "manifest.json":
            entries = found.pop("shards", [])
            found.pop("statistics", None)  # of the shards
        else:
            entries, found = [found.get("shard", {})], found.get("description", {})
        if found != description:
            raise UserError(
                f"{directory} holds other {what} ({difference(found, description)}); use another "
                "directory"
            )
        known.update({entry["file"]: entry for entry in entries})
    return known


def wrong_size(path, size):
    """What is wrong with the size of a file, in words; None if it is `size`."""
    found = path.stat().st_size if path.exists() else None
    if found == size:
        return None
    return "is missing" if found is None else f"has {found} bytes instead of {size}"


def is_intact(path, entry):
    """Whether a shard has the size and the SHA-256 of its entry, None for an unknown shard.

    For a writer that resumes: it makes a damaged shard again. Who reads compares sizes.
    """
    if entry is None or wrong_size(path, entry["bytes"]):
        return False
    return checksum.of_file(path) == entry["sha256"]


def finish(directory, names, prefix, description, *, what, about=lambda entries: {}):
    """Writes the manifest from the shards' own files, then removes those.

    Args:
      about: (entries) -> more for the manifest.

    Raises:
      UserError: if a shard is missing.
    """
    known = complete(directory, prefix, description, what=what)
    absent = [name for name in names if name not in known]
    if absent:
        raise UserError(
            f"{directory} lacks shard {absent[0]}; run the same command again in every process"
        )
    entries = [known[name] for name in names]
    manifest = {**description, "shards": entries, **about(entries)}
    write_json(directory / "manifest.json", manifest)
    for name in names:
        _sidecar(directory / name).unlink(missing_ok=True)


def write_json(path, value, *, indent=1):
    """Writes a JSON file, whole or not at all. `indent=None` is ten times faster, for long ones."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=indent, sort_keys=True) + "\n")
    _sync(temporary)
    temporary.rename(path)


def plain(value):
    """As it comes back from JSON: tuples are lists."""
    return json.loads(json.dumps(value, sort_keys=True))


def difference(stored, wanted):
    """Names the keys that differ, with both values, in one line."""
    if isinstance(stored, dict) and isinstance(wanted, dict):
        keys = [key for key in sorted({*stored, *wanted}) if stored.get(key) != wanted.get(key)]
        return ", ".join(f"{key}: {difference(stored.get(key), wanted.get(key))}" for key in keys)
    return f"{_short(stored)} there, {_short(wanted)} here"


def _short(value):
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@contextlib.contextmanager
def disk(what):
    """Refuses in one line when a disk does; `what` is being written, such as "code store DIR"."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # ArrayRecord raises RuntimeError when a write fails
        reason = (
            getattr(error, "strerror", None)
            or (str(error).splitlines() or [type(error).__name__])[0]
        )
        raise UserError(f"cannot write {what}: {reason}; what is complete is kept") from error


def _sidecar(path):
    return path.with_name(path.name + ".json")


def _sync(path):
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
