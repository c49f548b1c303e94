"""Reads members of archives at their places, from any thread."""

import bz2
import gzip
import io
import lzma
import os
import struct
import threading
import zipfile
import zlib

import numpy as np

COMPRESSED = {
    ".tar.xz": lzma.open,
    ".txz": lzma.open,
    ".tar.gz": gzip.open,
    ".tgz": gzip.open,
    ".tar.bz2": bz2.open,
    ".tbz2": bz2.open,
}
STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


def opener_of(path):
    """What opens a compressed tar, by the end of its name; None for other files."""
    name = str(path).lower()
    return next((opener for ending, opener in COMPRESSED.items() if name.endswith(ending)), None)


def open_with(path, opener):
    """The bytes of a file, decompressed if there is an opener."""
    # Going back within the buffer costs nothing; before it, all is decompressed again.
    return io.BufferedReader(opener(path), 2**20) if opener else open(path, "rb")


class Reader:
    """Reads at a place of a file, from any thread.

    The file is opened when first needed, also in a worker process.
    """

    def __init__(self, path):
        self.path, self._file, self._lock = str(path), None, threading.Lock()

    def at(self, offset, size):
        if self._file is None:
            with self._lock:
                self._file = self._file or open(self.path, "rb", buffering=0)
        data = os.pread(self._file.fileno(), size, offset)
        while 0 < len(data) < size:  # one call reads 2 GB at most, and less on some network disks
            more = os.pread(self._file.fileno(), size - len(data), offset + len(data))
            if not more:
                break
            data += more
        if len(data) != size:
            raise ValueError(f"{self.path} ends at byte {offset + len(data)}")
        return data

    def close(self):
        with self._lock:
            file, self._file = self._file, None
        if file is not None:
            file.close()

    def __getstate__(self):
        return {**self.__dict__, "_file": None, "_lock": None}

    def __setstate__(self, state):
        self.__dict__.update(state, _lock=threading.Lock())


class TarReader(Reader):
    """Index -> bytes of a member.

    With an opener, of a compressed tar: one reader at a time, fast only forward.
    """

    def __init__(self, path, index, opener=None):
        super().__init__(path)
        self.offsets = np.array(index["offsets"], np.int64)
        self.sizes = np.array(index["sizes"], np.int64)
        self.opener = opener

    def __call__(self, index):
        offset, size = int(self.offsets[index]), int(self.sizes[index])
        if not self.opener:
            return self.at(offset, size)
        with self._lock:
            self._file = self._file or open_with(self.path, self.opener)
            self._file.seek(offset)
            data = self._file.read(size)
        if len(data) != size:
            raise ValueError(f"{self.path} ends inside of an image")
        return data


class ZipReader(Reader):
    """Index -> bytes of a member, its checksum compared."""

    def __init__(self, path, index):
        super().__init__(path)
        self.columns = {
            key: np.array(index[key], np.int64)
            for key in ("offsets", "lengths", "sizes", "methods", "checksums")
        }

    def __call__(self, index):
        row = (int(column[index]) for column in self.columns.values())
        offset, length, size, method, checksum = row
        header = self.at(offset, 30)
        if header[:4] != b"PK\3\4":
            raise ValueError("no zip member where the directory says")
        name, extra = struct.unpack_from("<HH", header, 26)
        data = self.at(offset + 30 + name + extra, length)
        if method == DEFLATED:
            # No more than the directory says, however much there is.
            data = zlib.decompressobj(-15).decompress(data, size + 1)
        if len(data) != size or zlib.crc32(data) != checksum:
            raise ValueError("damaged zip member")
        return data
