"""The code store: what an encoder makes of a data set, in ArrayRecord shards beside a manifest.

    DIR/manifest.json                        what the codes are, and each shard's count, bytes and SHA-256; written last
    DIR/codes-00003-of-00010.arrayrecord     a record is one example: its codes, then its other fields by name, packed

Record i belongs to record i of the source it was made from. While a store is being written, each complete shard has a `.json`
of its own beside it; a writer that was killed skips those shards, and ends with the same bytes as one that was not.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import threading

import ml_dtypes  # noqa: F401  makes "bfloat16" a NumPy type
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from dlc_jax.errors import UserError

FORMAT = 1
MEMORY_BYTES = 2**30


def code_dtype(values):
    """The smallest unsigned type for codes in [0, values): "uint8" or "uint16"."""
    if not 1 <= values <= 2**16:
        raise UserError(f"codes of {values} values cannot be stored; use 1 to 65536")
    return "uint8" if values <= 2**8 else "uint16"


def write(
    directory,
    encode,
    *,
    total,
    positions,
    values,
    identity,
    source=None,
    view="center crop",
    drawn="argmax",
    shard_size=16384,
    fields=None,
    process_index=0,
    process_count=1,
    barrier=None,
):
    """Writes a code store, or what is missing of it.

    Args:
      directory: where; made if absent. On several processes, a place that all of them see.
      encode: (start, stop) -> dict of `codes`, integers [stop - start, positions], of `fields`, and optionally of `index`,
        which must then be start .. stop - 1. Called once per missing shard of this process, not in step with the others.
      total: number of examples.
      positions, values: L and V.
      identity: of the encoder, a string or a dict, JSON.
      source: identity of the data, JSON; see `sources.identity`.
      view: which view of the image the codes (and latents) are of.
      drawn: "argmax", or how the codes were sampled, with seed and temperature.
      shard_size: examples per shard.
      fields: other arrays of each example, {name: (dtype, shape)}, such as {"latent": ("bfloat16", (32, 32, 8))}.
      process_index, process_count: shards process_index, process_index + process_count, ... are written here.
      barrier: waits for all processes; needed if there are several.

    Returns:
      The manifest.

    Raises:
      UserError: if the directory holds other codes (differing keys are named), a disk refuses, or `encode` gives what it
        must not.
    """
    if process_count > 1 and barrier is None:
        raise ValueError("several processes need a barrier")
    fields = {name: [np.dtype(dtype).name, list(shape)] for name, (dtype, shape) in sorted((fields or {}).items())}
    if total < 1 or shard_size < 1 or "codes" in fields or "index" in fields:
        raise UserError(f"a code store needs total and shard_size >= 1 and no field codes or index; got {total}, {shard_size}")
    about = dict(positions=positions, values=values, dtype=code_dtype(values), count=total, shard_size=shard_size, fields=fields)
    description = _plain(dict(format=FORMAT, identity=identity, source=source, view=view, drawn=drawn, **about))
    directory = pathlib.Path(directory)
    shards = -(-total // shard_size)
    names = [f"codes-{k:05d}-of-{shards:05d}.arrayrecord" for k in range(shards)]
    with _disk(directory):
        directory.mkdir(parents=True, exist_ok=True)
        known = _complete(directory, description)
    for k in range(process_index, shards, process_count):
        start, stop = k * shard_size, min(total, (k + 1) * shard_size)
        if _intact(directory / names[k], known.get(names[k])):
            continue
        rows = _rows(encode(start, stop), start=start, stop=stop, description=description)
        with _disk(directory):
            entry = _write_shard(directory / names[k], rows)
            _write_json(_sidecar(directory / names[k]), {"description": description, "shard": entry})
    if barrier is not None:
        barrier()
    if process_index == 0:
        with _disk(directory):
            _finish(directory, names, description)
    if barrier is not None:
        barrier()
    return json.loads((directory / "manifest.json").read_text())


class CodeStore:
    """Codes and other fields by index: store[i] is {"codes": int32 [l], ...}. A random-access source for the loader.

    A store with codes alone and below 1 GB is kept in memory from its first use; else records are read one by one.

    Args:
      directory: of the store.
      identity: what the encoder must be; None takes any.

    Attributes:
      manifest: its contents, a dict.

    Raises:
      UserError: if the store is missing, unfinished, damaged (the shard is named) or of another encoder (the keys are named).
    """

    def __init__(self, directory, identity=None):
        self.directory = pathlib.Path(directory)
        try:
            self.manifest = json.loads((self.directory / "manifest.json").read_text())
            if self.manifest["format"] != FORMAT:
                raise UserError(f"code store {directory} has format {self.manifest['format']}, not {FORMAT}; export again")
            self._shards, self._shard_size = self.manifest["shards"], self.manifest["shard_size"]
            self._record = _record_dtype(self.manifest)
        except FileNotFoundError:
            raise UserError(f"no complete code store in {directory} (no manifest.json); run the codes step") from None
        except OSError as error:
            raise UserError(f"cannot read code store {directory}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"damaged code store: {self.directory / 'manifest.json'} is not a manifest; export again") from error
        if identity is not None and _plain(identity) != self.manifest["identity"]:
            which = _difference(self.manifest["identity"], _plain(identity))
            raise UserError(f"code store {directory} was made by another encoder ({which}); export again with this one")
        for shard in self._shards:
            path = self.directory / shard["file"]
            size = path.stat().st_size if path.exists() else None
            if size != shard["bytes"]:
                what = "is missing" if size is None else f"has {size} bytes instead of {shard['bytes']}"
                raise UserError(f"damaged code store: {path} {what}; run the codes step again")
        self._readers, self._lock, self._memory = {}, threading.Lock(), None

    def __len__(self):
        return self.manifest["count"]

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        if not self.manifest["fields"] and self._record.itemsize * len(self) <= MEMORY_BYTES:
            return {"codes": self.codes()[index].astype(np.int32)}
        shard, row = divmod(index, self._shard_size)
        record = np.frombuffer(self._read(shard, [row]), self._record)[0]
        out = {name: record[name] for name in self._record.names}
        out["codes"] = out["codes"].astype(np.int32)
        return out

    def codes(self):
        """All codes, read-only, [n, l] in the stored type (uint8 or uint16), kept in memory."""
        with self._lock:
            if self._memory is None:
                codes = np.empty((len(self), self.manifest["positions"]), self.manifest["dtype"])
                for k, shard in enumerate(self._shards):
                    rows = np.frombuffer(self._read(k, None), self._record)["codes"]
                    codes[k * self._shard_size :][: shard["count"]] = rows
                codes.setflags(write=False)
                self._memory = codes
        return self._memory

    def verify(self):
        """Reads every byte; UserError names the first shard whose SHA-256 is not the manifest's."""
        for shard in self._shards:
            if _sha256(self.directory / shard["file"]) != shard["sha256"]:
                raise UserError(f"damaged code store: {self.directory / shard['file']} has changed; run the codes step again")

    def _read(self, shard, rows):
        """Bytes of some rows of a shard, or of all."""
        path = self.directory / self._shards[shard]["file"]
        try:
            if rows is None:
                reader = ArrayRecordReader(str(path))
                data = reader.read_all()
                reader.close()
            else:
                # setdefault is atomic; a second thread's reader of the same shard is dropped.
                reader = self._readers.get(shard) or self._readers.setdefault(
                    shard, ArrayRecordReader(str(path), "readahead_buffer_size:0")
                )
                data = reader.read(rows)
        except (RuntimeError, OSError, ValueError, IndexError) as error:
            raise UserError(f"damaged code store: {path} cannot be read; run the codes step again") from error
        expected = self._shards[shard]["count"] if rows is None else len(rows)
        if len(data) != expected or any(len(record) != self._record.itemsize for record in data):
            raise UserError(f"damaged code store: {path} does not match the manifest; run the codes step again")
        return b"".join(data)

    def __getstate__(self):  # readers and locks do not travel to worker processes
        return {**self.__dict__, "_readers": {}, "_lock": None}

    def __setstate__(self, state):
        self.__dict__.update(state, _lock=threading.Lock())

    def __repr__(self):
        return f"CodeStore({str(self.directory)!r})"


class WithCodes:
    """Record i of a source together with the codes (and other fields) of record i of a store.

    Args:
      source: the source the store was made from, through the same view.
      store: a CodeStore.
      identity: of the source (`sources.identity`), compared with the manifest's; None compares only the lengths.

    Raises:
      UserError: if the store is of other data.
    """

    def __init__(self, source, store, *, identity=None):
        if identity is not None and _plain(identity) != store.manifest["source"]:
            which = _difference(store.manifest["source"], _plain(identity))
            raise UserError(f"code store {store.directory} was made from other data ({which}); run the codes step on this data")
        if len(source) != len(store):
            raise UserError(f"code store {store.directory} has {len(store)} records, the data {len(source)}; export again")
        self.source, self.store = source, store

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return {**self.source[index], **self.store[index]}


def _record_dtype(description):
    fields = [("codes", description["dtype"], (description["positions"],))]
    fields += [(name, np.dtype(dtype), tuple(shape)) for name, (dtype, shape) in sorted(description["fields"].items())]
    return np.dtype(fields)


def _rows(encoded, *, start, stop, description):
    """Checks what `encode` gave and packs it, one row a record."""
    record, count = _record_dtype(description), stop - start
    where = f"encoding records {start} to {stop - 1}"
    if set(encoded) - {"index"} != set(record.names):
        raise UserError(f"{where} gave {', '.join(sorted(encoded))}; expected {', '.join(record.names)}")
    if "index" in encoded and not np.array_equal(encoded["index"], np.arange(start, stop)):
        raise UserError(f"{where} gave other records, or in another order")
    rows = np.zeros(count, record)
    for name in record.names:
        values = np.asarray(encoded[name])
        if values.shape != rows[name].shape:
            raise UserError(f"{where} gave {name} of shape {list(values.shape)}; expected {list(rows[name].shape)}")
        if name == "codes":
            if values.dtype.kind not in "iu" or values.min() < 0 or values.max() >= description["values"]:
                raise UserError(f"{where} gave codes outside 0 to {description['values'] - 1}, or not integers")
        elif values.dtype != rows[name].dtype:
            raise UserError(f"{where} gave {name} as {values.dtype}; expected {rows[name].dtype}")
        rows[name] = values
    return rows


def _write_shard(path, rows):
    temporary = path.with_name(path.name + ".tmp")
    # Codes hardly compress one record at a time. Groups of one: reading one record reads no other.
    writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
    for row in rows.view(np.uint8).reshape(len(rows), rows.dtype.itemsize):
        writer.write(row.tobytes())
    writer.close()
    reader = ArrayRecordReader(str(temporary))
    if reader.num_records() != len(rows):
        raise UserError(f"cannot write {path}: {reader.num_records()} of {len(rows)} records arrived; is the disk full?")
    reader.close()
    entry = {"file": path.name, "count": len(rows), "bytes": temporary.stat().st_size, "sha256": _sha256(temporary)}
    _sync(temporary)
    temporary.rename(path)
    return entry


def _finish(directory, names, description):
    """Writes the manifest from the shards' own files, then removes those."""
    known = _complete(directory, description)
    absent = [name for name in names if name not in known]
    if absent:
        raise UserError(f"code store {directory} lacks shard {absent[0]}; run the export again in every process")
    _write_json(directory / "manifest.json", {**description, "shards": [known[name] for name in names]})
    for name in names:
        _sidecar(directory / name).unlink(missing_ok=True)


def _complete(directory, description):
    """{file name: entry} of the shards that the manifest and the shards' own files vouch for."""
    known = {}
    for path in [directory / "manifest.json", *sorted(directory.glob("codes-*.arrayrecord.json"))]:
        try:
            found = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            continue  # absent or cut off: its shards are made again
        if path.name == "manifest.json":
            entries = found.pop("shards", [])
        else:
            entries, found = [found.get("shard", {})], found.get("description", {})
        if found != description:
            raise UserError(f"{directory} holds other codes ({_difference(found, description)}); use another directory")
        known.update({entry["file"]: entry for entry in entries})
    return known


def _intact(path, entry):
    return entry is not None and path.exists() and path.stat().st_size == entry["bytes"] and _sha256(path) == entry["sha256"]


def _sidecar(path):
    return path.with_name(path.name + ".json")


def _write_json(path, value):
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    _sync(temporary)
    temporary.rename(path)


def _sync(path):
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain(value):
    """As it comes back from JSON: tuples are lists."""
    return json.loads(json.dumps(value, sort_keys=True))


def _difference(stored, wanted):
    """Names the keys that differ, with both values, in one line."""
    if isinstance(stored, dict) and isinstance(wanted, dict):
        keys = [key for key in sorted({*stored, *wanted}) if stored.get(key) != wanted.get(key)]
        return ", ".join(f"{key}: {_difference(stored.get(key), wanted.get(key))}" for key in keys)
    return f"{json.dumps(stored)} there, {json.dumps(wanted)} here"


@contextlib.contextmanager
def _disk(directory):
    """A disk that refuses is the user's matter: one line."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # ArrayRecord raises RuntimeError when a write fails
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"cannot write code store {directory}: {reason}; what is complete is kept") from error
