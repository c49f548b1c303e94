"""Parquet files with an image column, such as Hugging Face's."""

import json
import os
import re
import struct
import threading

import numpy as np
import pyarrow
from pyarrow import parquet

from dlc_jax.data.listing import Listing, digest, reading
from dlc_jax.data.naming import SPLITS, check_name
from dlc_jax.errors import UserError


def open_parquet(paths, *, root, field):
    """The `Listing` of Parquet files, a `sequential` one.

    A whole row group is read for any image in it.

    A file whose name begins with a split's, such as `train-00000-of-00002.parquet`, is of that
    split. Images are named by the column's `path`, or else by their number. Classes are those of an
    integer or text column `label`.

    Args:
      paths: of the files, sorted.
      root: folder that they are in.
      field: the image column, of bytes or of structs with `bytes` and possibly `path`, as Hugging
        Face writes them.

    Raises:
      UserError: for a damaged file, or one without such a column.
    """
    parts = [_Part(path, str(path.relative_to(root)), field) for path in paths]
    # Else all are of one kind, and a share is held out.
    train = any(part.split == "train" for part in parts)
    for part in parts:
        part.name_images(f"{part.split}/" if part.split and train else "")
    names = [name for part in parts for name in part.names]
    if not all(names) or len(set(names)) < len(names):
        numbers = {}  # counted within each split
        for part in parts:
            start = numbers.setdefault(part.folder, 0)
            part.names = [f"{part.folder}{start + k:08d}" for k in range(part.count)]
            numbers[part.folder] += part.count
        names = [name for part in parts for name in part.names]
    labels, classes = _labels(parts)
    size = sum(part.size for part in parts)
    content = digest([field, *(part.seal for part in parts)])
    reader = Reader([part.path for part in parts], [part.count for part in parts], field)
    return Listing(
        "parquet",
        names,
        reader,
        content=content,
        labels=labels,
        classes=classes,
        sequential=True,
        size=size,
    )


class _Part:
    """What one Parquet file says without its images."""

    def __init__(self, path, name, field):
        self.path = str(path)
        with reading(path), parquet.ParquetFile(path) as file, open(path, "rb") as raw:
            schema = file.schema_arrow
            kind = schema.field(field).type if field in schema.names else None
            if kind is None or not (_is_bytes(kind) or _child(kind, "bytes")):
                images = [
                    found.name
                    for found in schema
                    if _is_bytes(found.type) or _child(found.type, "bytes")
                ]
                has = f"it has {', '.join(images)}" if images else "it has none"
                raise UserError(f"{path} has no image column {field}; {has}; say which by `field`")
            self.count = file.metadata.num_rows
            groups = [file.metadata.row_group(k) for k in range(file.metadata.num_row_groups)]
            self.size = sum(
                group.column(k).total_uncompressed_size
                for group in groups
                for k in range(group.num_columns)
            )
            raw.seek(-8, os.SEEK_END)
            length = struct.unpack("<I", raw.read(4))[0]
            raw.seek(-8 - length, os.SEEK_END)
            # Sizes, places and statistics of what is in the file.
            self.seal = digest([raw.read(length).hex()])
            self.paths = [None] * self.count
            if _child(kind, "path"):
                self.paths = (
                    file.read(columns=[f"{field}.path"])
                    .flatten()
                    .column(f"{field}.path")
                    .to_pylist()
                )
            self.label = (
                file.read(columns=["label"]).column("label") if "label" in schema.names else None
            )
            self.label_names = _label_names(schema)
        first = re.match(r"[a-z]+", name.lower().rpartition("/")[2])
        top = name.lower().split("/")[0]
        self.split = SPLITS.get(first[0] if first else "") or SPLITS.get(top)

    def name_images(self, folder):
        """Fills `names`, relative names or None; `folder` is that of the split."""
        self.folder = folder
        self.names = [self._clean(name) for name in self.paths]

    def _clean(self, name):
        name, wrong = check_name(name) if name else (None, "absent")
        if wrong:
            return None
        has_split = SPLITS.get(name.split("/")[0].lower())
        return name if not self.folder or has_split else self.folder + name


def _is_bytes(kind):
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def _child(kind, name):
    return pyarrow.types.is_struct(kind) and kind.get_field_index(name) >= 0


def _label_names(schema):
    try:
        about = json.loads((schema.metadata or {})[b"huggingface"])
        return list(about["info"]["features"]["label"]["names"])
    except (KeyError, TypeError, ValueError):
        return None


def _labels(parts):
    if not parts or any(part.label is None or part.label.null_count for part in parts):
        return None, []
    values = [value for part in parts for value in part.label.to_pylist()]
    if all(isinstance(value, str) for value in values):
        classes = sorted(set(values))
        number = {name: k for k, name in enumerate(classes)}
        return np.array([number[value] for value in values], np.int32), classes
    if not all(isinstance(value, int) and 0 <= value < 2**20 for value in values):
        return None, []
    names = parts[0].label_names or []
    return np.array(values, np.int32), names + [
        str(k) for k in range(len(names), max(values, default=-1) + 1)
    ]


class Reader:
    """Index -> bytes of an image, over several files; the row group read last is kept."""

    def __init__(self, paths, counts, field):
        self.paths, self.field, self.starts = paths, field, np.cumsum([0, *counts])
        self._lock, self._group = threading.Lock(), (0, 0, None)

    def __call__(self, index):
        with self._lock:
            start, end, values = self._group
            if not start <= index < end:
                start, end, values = self._group = self._read(index)
            value = values[index - start].as_py()
        value = value["bytes"] if isinstance(value, dict) else value
        if value is None:
            raise ValueError("no bytes in the image column")
        return value

    def _read(self, index):
        k = int(np.searchsorted(self.starts, index, side="right")) - 1
        with parquet.ParquetFile(self.paths[k]) as file:
            start = int(self.starts[k])
            for group in range(file.num_row_groups):
                end = start + file.metadata.row_group(group).num_rows
                if index < end:
                    return (
                        start,
                        end,
                        file.read_row_group(group, columns=[self.field]).column(self.field),
                    )
                start = end
        raise ValueError(f"{self.paths[k]} has changed")

    def close(self):
        with self._lock:
            self._group = 0, 0, None

    def __getstate__(self):
        return {**self.__dict__, "_lock": None, "_group": (0, 0, None)}

    def __setstate__(self, state):
        self.__dict__.update(state, _lock=threading.Lock())
