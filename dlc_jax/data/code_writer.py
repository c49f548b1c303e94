"""Writes code stores (see `codes`), shard by shard.

While a store is being written, each complete shard has a `.json` of its own beside it. A writer
that was killed skips those shards, and ends with the same bytes as one that was not.
"""

import json
import pathlib
from collections.abc import Callable, Mapping

import numpy as np

from dlc_jax import remote
from dlc_jax.data import latents, shard
from dlc_jax.data.manifest import FORMAT, code_dtype, record_dtype
from dlc_jax.errors import UserError

PREFIX = "codes"


def write(
    directory: str | pathlib.Path,
    encode: Callable,
    *,
    process_index: int = 0,
    process_count: int = 1,
    barrier: Callable[[], None] | None = None,
    **about,
) -> dict:
    """Writes a code store, or what is missing of it.

    A shard that an earlier run completed is kept if its SHA-256 is still right. Every process
    hashes its own, before the first barrier.

    Args:
      directory: where; made if absent. On several processes, a place that all of them see.
      encode: (start, stop) -> dict of `codes`, integers [stop - start, positions], of `fields`, and
        optionally of `index`, which must then be start .. stop - 1; or an iterable of such dicts of
        some records each, in order, of which one at a time is held. Called once per missing shard
        of this process, not in step with the others.
      process_index, process_count: shards process_index, process_index + process_count, ... are
        written here.
      barrier: waits for all processes; needed if there are several.
      **about: what the store is, the arguments of `describe`.

    Returns:
      The manifest.

    Raises:
      UserError: if the directory holds other codes (differing keys are named), a disk refuses, or
        `encode` gives what it must not.
    """
    if process_count > 1 and barrier is None:
        raise ValueError("several processes need a barrier")
    description = describe(**about)
    directory, what = pathlib.Path(directory), f"code store {directory}"
    total, shard_size = description["count"], description["shard_size"]
    names = shard.file_names(PREFIX, count=total, shard_size=shard_size)
    with shard.disk(what):
        directory.mkdir(parents=True, exist_ok=True)
        known = shard.complete(directory, PREFIX, description, what=PREFIX)
    for k in range(process_index, len(names), process_count):
        path, start, stop = directory / names[k], k * shard_size, min(total, (k + 1) * shard_size)
        entry, sums = known.get(names[k], {}), _sums(description)
        if set(sums) <= set(entry) and shard.is_intact(path, entry or None):
            continue
        try:
            with shard.disk(what):
                records = _records(encode, start, stop, description, sums)
                more = {name: found.plain for name, found in sums.items()}
                shard.write_shard(path, records, description=description, **more)
            remote.send(directory)
        except _Encoding as failed:
            raise failed.__cause__ from None
    if barrier is not None:
        barrier()
    if process_index == 0:
        with shard.disk(what):
            shard.finish(directory, names, PREFIX, description, what=PREFIX, about=_statistics)
        remote.send(directory)
    if barrier is not None:
        barrier()
    for name in names if process_index == 0 else ():  # now that nobody fetches them
        remote.remove(directory / f"{name}.json")
    return json.loads((directory / "manifest.json").read_text())


def describe(
    *,
    total: int,
    positions: int,
    values: int,
    identity,
    source=None,
    view="center crop",
    drawn: str = "argmax",
    computed: str = "",
    shard_size: int = 16384,
    fields: Mapping | None = None,
) -> dict:
    """What a store is, the manifest without its shards.

    Args:
      total: number of examples.
      positions, values: L and V.
      identity: of the encoder, a string or a dict, JSON.
      source: identity of the data, JSON; see `sources.DataSet.identity`.
      view: which view of the image the codes (and latents) are of.
      drawn: "argmax", or how the codes were sampled, with seed and temperature.
      computed: dtype in which the encoder computed, "float32" or "bfloat16"; "" leaves it out, as
        stores once did.
      shard_size: examples per shard.
      fields: other arrays of each example, {name: (dtype, shape)}, such as
        {"latent": ("bfloat16", (32, 32, 8))}.

    Raises:
      UserError: sizes or fields that no store has.
    """
    fields = sorted((fields or {}).items())
    fields = {name: [np.dtype(dtype).name, list(shape)] for name, (dtype, shape) in fields}
    if total < 1 or shard_size < 1 or "codes" in fields or "index" in fields:
        raise UserError(
            "a code store needs total and shard_size >= 1 and no field codes or index; got "
            f"{total}, {shard_size}"
        )
    found = {
        "format": FORMAT,
        "identity": identity,
        "source": source,
        "view": view,
        "drawn": drawn,
        "positions": positions,
        "values": values,
        "dtype": code_dtype(values),
        "count": total,
        "shard_size": shard_size,
        "fields": fields,
    }
    return shard.plain(found | ({"computed": computed} if computed else {}))


class _Encoding(Exception):
    """Carries what `encode` raised past those who take every OSError for the disk's."""


def _sums(description) -> dict[str, latents.Sums]:
    """What is summed over the records of a shard, by its name in the shard's entry."""
    return {"latent": latents.Sums()} if latents.MEAN in description["fields"] else {}


def _statistics(entries) -> dict:
    """What a manifest says of its records, from the entries of its shards."""
    summed = [entry["latent"] for entry in entries if "latent" in entry]
    return {"statistics": {"latent": latents.statistics(summed)}} if summed else {}


def _records(encode, start, stop, description, sums):
    """The bytes of records start .. stop - 1, as `encode` gives them."""
    try:
        encoded = encode(start, stop)
        done = start
        for part in [encoded] if isinstance(encoded, dict) else encoded:
            rows = _rows(
                part,
                start=done,
                stop=stop,
                whole=isinstance(encoded, dict),
                description=description,
            )
            done += len(rows)
            for found in sums.values():
                found.add(rows)
            for row in rows.view(np.uint8).reshape(len(rows), rows.dtype.itemsize):
                yield row.tobytes()
        if done != stop:
            raise UserError(
                f"encoding records {start} to {stop - 1} gave {done - start} of {stop - start}"
            )
    except Exception as error:
        raise _Encoding from error


def _rows(encoded, *, start, stop, whole, description):
    """Checks what `encode` gave of records from start on, and packs it, one row a record.

    If `whole`, they are all up to stop.
    """
    record = record_dtype(description)
    if set(encoded) - {"index"} != set(record.names):
        where = f"encoding records {start} to {stop - 1}"
        raise UserError(
            f"{where} gave {', '.join(sorted(encoded))}; expected {', '.join(record.names)}"
        )
    count = stop - start if whole else min(len(encoded["codes"]), stop - start)
    where = f"encoding records {start} to {start + count - 1}"
    if "index" in encoded and not np.array_equal(encoded["index"], np.arange(start, start + count)):
        raise UserError(f"{where} gave other records, or in another order")
    rows = np.zeros(count, record)
    for name in record.names:
        values = np.asarray(encoded[name])
        if values.shape != rows[name].shape:
            raise UserError(
                f"{where} gave {name} of shape {list(values.shape)}; expected "
                f"{list(rows[name].shape)}"
            )
        if name == "codes":
            integers = values.dtype.kind in "iu"
            if not integers or values.min() < 0 or values.max() >= description["values"]:
                raise UserError(
                    f"{where} gave codes outside 0 to {description['values'] - 1}, or not integers"
                )
        elif values.dtype != rows[name].dtype:
            raise UserError(f"{where} gave {name} as {values.dtype}; expected {rows[name].dtype}")
        elif len(odd := np.unique(np.nonzero(~np.isfinite(values))[0])):
            raise UserError(
                f"encoding record {start + odd[0]} gave {name} that is not finite; look at that "
                "image, and at the weights that encode it"
            )
        rows[name] = values
    return rows
