"""The code store: what an encoder makes of a data set, in ArrayRecord shards beside a manifest.

    DIR/manifest.json
        what the codes are, and each shard's count, bytes and SHA-256; written last
    DIR/codes-00003-of-00010.arrayrecord
        a record is one example: its codes, then its other fields by name, packed

Record i belongs to record i of the source it was made from. `code_writer` writes stores.
"""

import pathlib
import threading

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from dlc_jax import checksum, remote
from dlc_jax.data import shard
from dlc_jax.data.manifest import code_dtype as code_dtype
from dlc_jax.data.manifest import read_manifest, record_dtype
from dlc_jax.errors import UserError

MEMORY_BYTES = 2**30  # codes alone below this are kept in memory
BLOCK_BYTES = 2**26  # read at once


class CodeStore:
    """Codes and other fields by index: store[i] is {"codes": int32 [l], ...}.

    It is a random-access source for the loader. A store with codes alone and below 1 GB is kept in
    memory from its first use; else records are read one by one.

    Args:
      directory: of the store.
      identity: what the encoder must be; None takes any.

    Attributes:
      manifest: its contents, a dict.

    Raises:
      UserError: if the store is missing, unfinished, damaged (the shard is named) or of another
        encoder (the keys are named).
    """

    def __init__(self, directory: str | pathlib.Path, identity=None):
        self.directory = pathlib.Path(directory)
        remote.fetch(self.directory, whole=True)
        self.manifest = read_manifest(directory)
        self._shards, self._shard_size = self.manifest["shards"], self.manifest["shard_size"]
        self._record = record_dtype(self.manifest)
        if identity is not None:
            self.check_encoder(identity)
        for entry in self._shards:
            path = self.directory / entry["file"]
            if wrong := shard.wrong_size(path, entry["bytes"]):
                raise UserError(f"damaged code store: {path} {wrong}; run the codes step again")
        self._readers, self._lock, self._memory = {}, threading.Lock(), None

    def __len__(self) -> int:
        return self.manifest["count"]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        if self._small:
            return {"codes": self.codes()[index].astype(np.int32)}
        k, row = divmod(index, self._shard_size)
        record = np.frombuffer(self._read(k, [row]), self._record)[0]
        out = {name: record[name] for name in self._record.names}
        out["codes"] = out["codes"].astype(np.int32)
        return out

    @property
    def origin(self) -> dict:
        """What made these codes of what: {"encoder": …, "source": …, "computed": …}.

        They are the same codes wherever they lie. Stores from before the dtype was written down
        have no `computed`.
        """
        about = {"encoder": self.manifest["identity"], "source": self.manifest["source"]}
        computed = self.manifest.get("computed")
        return about if computed is None else about | {"computed": computed}

    def checked(self, *, positions: int, values: int, where: str) -> "CodeStore":
        """This store, if its codes are as the step `where` reads them.

        Raises:
          UserError: they are not `positions` of `values` each.
        """
        found = self.manifest["positions"], self.manifest["values"]
        if found != (positions, values):
            raise UserError(
                f"{where} reads codes of {positions} positions with {values} values; those of "
                f"{self.directory} have {found[0]} with {found[1]}: set {where}.model.positions "
                "and .values, or give other codes"
            )
        return self

    def check_encoder(self, identity) -> None:
        """UserError if the encoder of the codes has another identity; differing keys are named."""
        if shard.plain(identity) != self.manifest["identity"]:
            which = shard.difference(self.manifest["identity"], shard.plain(identity))
            raise UserError(
                f"code store {self.directory} was made by another encoder ({which}); without it "
                "(moved away, or codes.path left out) the codes step makes one of this encoder"
            )

    def check_dtype(self, dtype: str, where: str) -> None:
        """UserError if step `where` computes codes in another `dtype`, where both are known."""
        found = self.manifest.get("computed", "")
        if found and dtype and found != dtype:
            raise UserError(
                f"code store {self.directory} was computed in {found}, and {where}.dtype is "
                f"{dtype}: give --config.{where}.dtype={found}, or, for codes in {dtype}, another "
                f"--workdir and no {where}.path"
            )

    def check_embedding(self, width: int, where: str) -> None:
        """UserError if the records have no embedding of `width`, which the step `where` reads."""
        kind, shape = self.manifest["fields"].get("embedding", (None, (0,)))
        if kind is None:
            raise UserError(
                f"code store {self.directory} has no embeddings, which {where} asks for; set "
                "codes.embedding, in another --workdir"
            )
        if list(shape) != [width]:
            raise UserError(
                f"{where} has embeddings of width {width}; those of {self.directory} have width "
                f"{shape[0]}: set generator.model.embedding={shape[0]} and codes.embedding as they "
                "were made, or give other codes"
            )

    def check_source(self, identity) -> None:
        """UserError if the data of the codes has another identity; differing keys are named."""
        if shard.plain(identity) != self.manifest["source"]:
            which = shard.difference(self.manifest["source"], shard.plain(identity))
            raise UserError(
                f"code store {self.directory} was made from other data ({which}); run the codes "
                "step on this data"
            )

    def codes(self, rows=None) -> np.ndarray:
        """Codes [n, l] in the stored type, uint8 or uint16, of some rows in their order, or all.

        All are read-only and kept in memory. Of a store that is not (moments take a hundred times
        the room of the codes) only the rows asked for are read.
        """
        if rows is not None:
            rows = np.asarray(rows, np.int64)
            if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
                raise IndexError(f"records {rows.min()} to {rows.max()} of {len(self)}")
            return self.codes()[rows] if self._small else self._chosen(rows, "codes")
        with self._lock:
            if self._memory is None:
                codes = np.empty((len(self), self.manifest["positions"]), self.manifest["dtype"])
                for k in range(len(self._shards)):
                    for start, rows in self._blocks(k):
                        codes[start : start + len(rows)] = rows["codes"]
                codes.setflags(write=False)
                self._memory = codes
        return self._memory

    def embeddings(self, rows) -> np.ndarray:
        """Embeddings float32 [n, e] of some rows in their order, of a store that has them."""
        return self._chosen(np.asarray(rows, np.int64), "embedding").astype(np.float32)

    @property
    def _small(self):
        return not self.manifest["fields"] and self._record.itemsize * len(self) <= MEMORY_BYTES

    def _chosen(self, rows, field):
        kind = self._record[field]
        chosen = np.empty((len(rows), *kind.shape), kind.base)
        at_once = max(1, BLOCK_BYTES // self._record.itemsize)
        for k in np.unique(rows // self._shard_size):
            (here,) = np.nonzero(rows // self._shard_size == k)
            for places in (here[start : start + at_once] for start in range(0, len(here), at_once)):
                found = self._read(int(k), (rows[places] % self._shard_size).tolist())
                chosen[places] = np.frombuffer(found, self._record)[field]
        return chosen

    def verify(self, progress=None) -> None:
        """Reads every byte.

        Args:
          progress: called as progress(shards done) after each.

        Raises:
          UserError: names the first shard whose SHA-256, or number or size of records, is not the
            manifest's.
        """
        found = 0
        for k, entry in enumerate(self._shards):
            if checksum.of_file(self.directory / entry["file"]) != entry["sha256"]:
                raise UserError(
                    f"damaged code store: {self.directory / entry['file']} has changed; delete it "
                    "and run the codes step again"
                )
            found += sum(len(rows) for _, rows in self._blocks(k))
            if progress is not None:
                progress(k + 1)
        if found != len(self):
            raise UserError(
                f"damaged code store: {self.directory} has {found} codes, its manifest says "
                f"{len(self)}; export again"
            )

    def _blocks(self, k):
        """(index of the first, records) of a shard, some at a time: it may have gigabytes."""
        count, at_once = self._shards[k]["count"], max(1, BLOCK_BYTES // self._record.itemsize)
        for start in range(0, count, at_once):
            rows = None if at_once >= count else list(range(start, min(count, start + at_once)))
            yield k * self._shard_size + start, np.frombuffer(self._read(k, rows), self._record)

    def _read(self, k, rows):
        """Bytes of some rows of a shard, or of all."""
        path = self.directory / self._shards[k]["file"]
        try:
            if rows is None:
                reader = ArrayRecordReader(str(path))
                data = reader.read_all()
                reader.close()
            else:
                # setdefault is atomic; a second thread's reader of the same shard is dropped.
                reader = self._readers.get(k) or self._readers.setdefault(
                    k, ArrayRecordReader(str(path), "readahead_buffer_size:0")
                )
                data = reader.read(rows)
        except (RuntimeError, OSError, ValueError, IndexError) as error:
            raise UserError(
                f"damaged code store: {path} cannot be read; delete it and run the codes step again"
            ) from error
        expected = self._shards[k]["count"] if rows is None else len(rows)
        if len(data) != expected or any(len(record) != self._record.itemsize for record in data):
            raise UserError(
                f"damaged code store: {path} does not match the manifest; delete it and run the "
                "codes step again"
            )
        return b"".join(data)

    def close(self) -> None:
        """Closes the shards, and drops the codes in memory. Reading opens them again."""
        self._readers.clear()
        with self._lock:
            self._memory = None

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
      identity: of the source (`DataSet.identity`), compared with the manifest's; None compares only
        the lengths.

    Raises:
      UserError: if the store is of other data.
    """

    def __init__(self, source, store: CodeStore, *, identity=None):
        if identity is not None:
            store.check_source(identity)
        if len(source) != len(store):
            raise UserError(
                f"code store {store.directory} has {len(store)} records, the data {len(source)}; "
                "export again"
            )
        self.source, self.store = source, store

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return {**self.source[index], **self.store[index]}
