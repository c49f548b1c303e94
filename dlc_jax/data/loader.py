"""From a random-access source to batches, shuffled, augmented, read ahead and resumable.

Built on Grain's MapDataset, whose shuffle and random generators are functions of (seed, index).
Grain's `ElasticIterator` gives process p of P the records p, p + P, ...; here each process reads
the rows of the global batch that its devices hold instead (`parallel.rows`), so that the rows of
the global array are in the same order for any number of processes and any mesh, and groups of
neighbors stay groups. The state is the same: the index of the next record.
"""

import sys
from collections.abc import Callable, Sequence

import grain
import numpy as np

from dlc_jax.data.resilient import Resilient
from dlc_jax.errors import UserError


def batches(
    source,
    *,
    batch: int,
    seed: int,
    transform: Callable | None = None,
    shuffle: bool = True,
    repeat: bool = True,
    threads: int = 1,
    fields: Sequence[str] | None = None,
    grouped: Callable[[int], dict[str, np.ndarray]] | None = None,
    rows: Sequence[int] | None = None,
) -> "Batches":
    """Iterates over the global batches, or over some rows of them.

    Args:
      source: random access to records, dicts of arrays and numbers; read from several threads if
        `threads` > 1.
      batch: size of the GLOBAL batch.
      seed: of the order and of `transform`. Neither depends on processes, threads or restarts.
      transform: (record, rng) -> record, or None.
      shuffle: another order in every epoch; otherwise the source's order.
      repeat: without end, batches running across epochs. Otherwise one epoch, whose last batch is
        filled up with records from the start of the next one, so that shapes never change; the bool
        field `valid` [b] is False for those.
      threads: that read ahead, a batch each and one more; 0 reads in the caller. One is best for
        what is in memory, more for files.
      fields: the fields to keep, or None for all.
      grouped: draws more fields, for groups of `grouped.group` records at a time: grouped(number)
        -> {field: [group, ...]} of the `number`-th group of the run. A group on several processes
        is drawn by each of them, for its rows.
      rows: of the global batch, ascending, that this process reads; None are all.

    Returns:
      A `Batches` iterator of dicts of NumPy arrays [b_local, ...]. `position`, int32 [b_local], is
      each record's place in the global batch, 0 to batch - 1. 64-bit numbers arrive as 32-bit ones.

    Raises:
      UserError: for an empty source, or a batch below 1.
    """
    if batch < 1:
        raise UserError(f"a global batch of {batch} is empty; choose at least 1")
    if not len(source):
        raise UserError("the data source is empty; check its path and split")
    # Hashed, because Grain adds the epoch to the shuffle's seed: seed 1 would begin with the second
    # epoch of seed 0.
    order_seed, draw_seed = np.random.SeedSequence(seed).generate_state(2).tolist()
    records = grain.MapDataset.range(len(source))
    if shuffle:
        records = records.shuffle(seed=order_seed)
    records = records.repeat()
    reader = _Reader(source, transform, fields)
    # random_map even without a shuffle: it draws by the index within the whole run, so every epoch
    # draws anew.
    records = records.random_map(reader, seed=draw_seed) if transform else records.map(reader)
    return Batches(
        records,
        batch=batch,
        rows=np.arange(batch, dtype=np.int32) if rows is None else np.asarray(rows, np.int32),
        count=None if repeat else len(source),
        threads=threads,
        grouped=grouped,
    )


class Batches:
    """What `batches` returns. `get_state` counts records delivered, not records read ahead.

    Attributes:
      steps: number of batches, or None if they never end.
    """

    def __init__(self, records, *, batch, rows, count, threads, grouped=None):
        self.steps = None if count is None else -(-count // batch)
        self._records, self._batch, self._rows, self._count = records, batch, rows, count
        self._threads = threads
        self._next, self._iterator, self._grouped = 0, None, grouped

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._count is not None and self._next >= self._count:
            self.close()
            raise StopIteration
        # Made here, so that a state set before the first batch costs nothing.
        if self._iterator is None:
            steps = _Steps(
                self._records,
                first=self._next,
                batch=self._batch,
                rows=self._rows,
                count=self._count,
                grouped=self._grouped,
            )
            ahead = grain.ReadOptions(
                num_threads=self._threads, prefetch_buffer_size=self._threads and self._threads + 1
            )
            self._iterator = iter(steps.to_iter_dataset(ahead))
        batch = next(self._iterator)
        batch["position"] = self._rows.copy()
        if self._count is not None:
            batch["valid"] = self._next + self._rows < self._count
        self._next += self._batch
        return batch

    def get_state(self) -> dict[str, int]:
        """{"global_next_index": int} after the last batch delivered, the same in every process."""
        return {"global_next_index": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes on from a state of any number of processes, threads, or size of batch.

        What was read ahead is dropped.
        """
        try:
            following = int(state["global_next_index"])
        except (TypeError, KeyError, ValueError):
            raise UserError(
                f"not the state of a data iterator: {state!r}; restore an older checkpoint"
            ) from None
        self.close()
        self._next = following

    def close(self) -> None:
        """Ends the threads that read ahead, also if called again. The next batch restarts them."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


class _Steps(grain.MapDataset):
    """Element k is this process's share of the k-th global batch from record `first` on."""

    def __init__(self, records, *, first, batch, rows, count, grouped):
        super().__init__(records)
        self._records, self._first, self._batch, self._rows = records, first, batch, rows
        self._grouped = grouped
        left = sys.maxsize - first - batch if count is None else count - first
        self._length = -(-left // batch)

    def __len__(self):
        return self._length

    def __getitem__(self, step):
        first = self._first + step * self._batch
        out = _stack([self._records[first + int(row)] for row in self._rows])
        return out if self._grouped is None else out | self._draw(first)

    def _draw(self, first):
        """The grouped fields of this process's rows of the batch that begins at record `first`."""
        group = self._grouped.group
        numbers, where = np.unique(self._rows // group, return_inverse=True)
        drawn = [self._grouped(first // group + int(number)) for number in numbers]
        here = where * group + self._rows % group
        return {name: np.concatenate([each[name] for each in drawn])[here] for name in drawn[0]}

    def __str__(self):
        return "Steps"


class _Reader:
    """Index -> record, with the transform and the choice of fields.

    A `Resilient` source retries it, whichever of them fails.
    """

    def __init__(self, source, transform, fields):
        self._source, self._transform, self._fields = source, transform, fields

    def __call__(self, index, rng=None):
        if isinstance(self._source, Resilient):
            return self._source.read(int(index), lambda record: self._finish(record, rng))
        return self._finish(self._source[int(index)], rng)

    def _finish(self, record, rng):
        if self._transform is not None:
            record = self._transform(record, rng)
        if self._fields is not None:
            missing = [field for field in self._fields if field not in record]
            if missing:
                raise UserError(
                    f"records have no field {', '.join(missing)}; they have "
                    f"{', '.join(sorted(record))}"
                )
            record = {field: record[field] for field in self._fields}
        return record


def _stack(records):
    out = {}
    for name in records[0]:
        try:
            values = np.asarray([record[name] for record in records])
        except ValueError:
            raise UserError(
                f"field {name} differs in shape between records; resize it, or leave it out with "
                "`fields`"
            ) from None
        if values.dtype.kind in "iuf" and values.dtype.itemsize == 8:
            narrow = values.astype(values.dtype.kind + "4")
            if values.dtype.kind != "f" and (narrow != values).any():
                raise UserError(
                    f"field {name} has values beyond 32 bits; leave it out with `fields`"
                )
            values = narrow
        out[name] = values
    return out
