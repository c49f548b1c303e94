"""Pairs of IDX files, MNIST's format: gray images and their labels."""

import gzip
import io
import os
import re
import struct
import threading

import numpy as np
from PIL import Image

from dlc_jax import checksum
from dlc_jax.data.listing import Listing, digest, reading
from dlc_jax.data.naming import SPLITS

NAME = re.compile(r"(?:(.*)[-_.])?images[-.]idx3[-.]ubyte(\.gz)?$", re.IGNORECASE)
PREFIXES = {**SPLITS, "t10k": "test"}
MAX_BYTES = 2**32  # a pair is held in memory


def pairs(path):
    """Image files of IDX pairs: the file itself, or those in a folder; [] for anything else."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if NAME.match(file.name))
    return [path] if NAME.match(path.name) else []


def open_idx(paths):
    """The `Listing` of IDX pairs.

    Images are read as PNG, named by their number in "train/" and "test/" as the files' names say.

    Args:
      paths: image files, such as `train-images-idx3-ubyte.gz` and `t10k-images-idx3-ubyte`; labels
        are expected beside them.

    Raises:
      UserError: for a file that is not IDX or is cut off, or a pair that does not agree.
    """
    splits = [PREFIXES.get((NAME.match(path.name)[1] or "").lower()) for path in paths]
    names, labels, parts, seals = [], [], [], []
    for path, split in zip(paths, splits):
        part = _Images(path)
        folder = f"{split}/" if split and "train" in splits else ""
        names += [f"{folder}{k:08d}.png" for k in range(part.count)]
        beside = path.with_name(
            re.sub("idx3", "idx1", re.sub("images", "labels", path.name, flags=re.I), flags=re.I)
        )
        labels.append(_labels(beside, part.count) if beside.exists() else None)
        parts.append(part)
        seals.append(part.seal)
    known = (
        None if any(found is None for found in labels) else np.concatenate(labels).astype(np.int32)
    )
    classes = [] if known is None else [str(k) for k in range(int(known.max(initial=-1)) + 1)]
    size = sum(part.count * part.height * part.width for part in parts)
    return Listing(
        "idx", names, Reader(parts), content=digest(seals), labels=known, classes=classes, size=size
    )


class Reader:
    """Index -> bytes of a PNG file, over several IDX files one after the other."""

    def __init__(self, parts):
        self.parts, self.starts = parts, np.cumsum([0] + [part.count for part in parts])

    def __call__(self, index):
        k = int(np.searchsorted(self.starts, index, side="right")) - 1
        file = io.BytesIO()
        Image.fromarray(self.parts[k].pixels()[index - self.starts[k]]).save(
            file, "PNG", compress_level=1
        )
        return file.getvalue()


class _Images:
    """An IDX file of images; only its header is read until pixels are asked for."""

    def __init__(self, path):
        self.path, self._pixels, self._lock = path, None, threading.Lock()
        with reading(path), _open(path) as file:
            magic, self.count, self.height, self.width = struct.unpack(">IIII", file.read(16))
            pixels = self.height * self.width
            if magic != 0x803 or not pixels or self.count * pixels > MAX_BYTES:
                raise ValueError("not an IDX file of gray images")
        with reading(path), open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            # Ends with a checksum and the length of what it holds.
            if path.name.lower().endswith(".gz"):
                file.seek(max(0, size - 8))
                self.seal = f"{size} {file.read(8).hex()}"
            else:
                self.seal = f"{size} {checksum.of_file(path)}"

    def pixels(self):
        """uint8 [n, y, x]."""
        with self._lock:
            if self._pixels is None:
                shape = (self.count, self.height, self.width)
                with reading(self.path), _open(self.path) as file:
                    file.read(16)
                    data = file.read(self.count * self.height * self.width)
                    if len(data) != self.count * self.height * self.width:
                        raise EOFError("it is cut off")
                    self._pixels = np.frombuffer(data, np.uint8).reshape(shape)
        return self._pixels

    def __getstate__(self):
        return {**self.__dict__, "_pixels": None, "_lock": None}

    def __setstate__(self, state):
        self.__dict__.update(state, _lock=threading.Lock())


def _labels(path, count):
    with reading(path), _open(path) as file:
        magic, found = struct.unpack(">II", file.read(8))
        if magic != 0x801:
            raise ValueError("not an IDX file of labels")
        labels = np.frombuffer(file.read(count), np.uint8)
        if found != count or len(labels) != count:
            raise ValueError(f"{found} labels for {count} images")
        return labels


def _open(path):
    return gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb")
