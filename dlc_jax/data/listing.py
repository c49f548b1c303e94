"""The images of one place as a list: what every kind of place is turned into.

`files.scan(path)` gives the `Listing` of all images there, `files.open_files(path, split=...)` the
one to read from at random. An image is known by its name; see `naming`.
"""

import contextlib
import hashlib
import lzma
import struct
import tarfile
import zipfile
import zlib

import numpy as np

from dlc_jax.data.naming import classify, split_of
from dlc_jax.errors import UserError

DAMAGE = (  # what the readers of the formats raise for files that are cut off or damaged
    OSError,
    ValueError,
    EOFError,
    OverflowError,
    NotImplementedError,
    RuntimeError,
    struct.error,
    zlib.error,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
)


class Listing:
    """Encoded images by index.

    Args:
      kind: "folder", "tar", "zip", "idx", "npz", "parquet", "records" or "tfds".
      names: relative names, each once.
      read: index -> bytes of the image file. Called from several threads. Raises OSError or
        ValueError for an image that is damaged.
      content: what the bytes are, in a few characters: other images, another text, wherever they
        lie.
      labels: class of each image, int [n]; or index -> class, where that takes reading the image;
        or None.
      classes: names of the classes, if there are labels.
      skipped: {reason: count} of what is there and is not in the list.
      sequential: whether reading in any other order than this is slow (compressed archives,
        Parquet).
      size: bytes of all images together, as far as it is known without reading them.

    Attributes:
      classes: list of names; empty without labels.
    """

    def __init__(
        self,
        kind,
        names,
        read,
        *,
        content,
        labels=None,
        classes=(),
        skipped=None,
        sequential=False,
        size=None,
    ):
        self.kind, self.names, self.read = kind, list(names), read
        lazy = labels is None or callable(labels)
        self._labels = labels if lazy else np.asarray(labels, np.int32)
        self.classes, self.content = [] if labels is None else list(classes), content
        self.skipped, self.sequential, self.size = dict(skipped or {}), sequential, size

    def __len__(self):
        return len(self.names)

    @property
    def labels(self):
        """Classes, int32 [n], or None. Reads everything in the case of TFDS."""
        if callable(self._labels):
            self._labels = np.array([self._labels(index) for index in range(len(self))], np.int32)
        return self._labels

    def label(self, index):
        """Class of one image, or None."""
        if callable(self._labels):
            return self._labels(index)
        return None if self._labels is None else int(self._labels[index])

    def select(self, rows):
        """The listing of some rows, in that order; it has the classes of the whole."""
        rows = [int(row) for row in rows]
        labels = self._labels
        if labels is not None:
            labels = _Rows(labels, rows) if callable(labels) else labels[rows]
        return Listing(
            self.kind,
            [self.names[row] for row in rows],
            _Rows(self.read, rows),
            labels=labels,
            classes=self.classes,
            content=self.content,
            skipped=self.skipped,
            sequential=self.sequential,
        )

    def close(self):
        """Closes the files that are open. Reading opens them again."""
        close(self.read)

    def settled(self):
        """What counts of this listing, with classes: those of the names, if there are no others."""
        split = split_of(self.names)
        rows = [row for row in range(len(self)) if split is None or split[row]]
        found = self if len(rows) == len(self) else self.select(rows)
        if found is not self:
            found.size = self.size
            outside = len(self) - len(rows)
            found.skipped["outside of the folders for training and validation"] = outside
        if not found.classes:
            found._labels, found.classes = classify(found.names)
        return found

    def digest(self):
        """Hash of the content and the names: the same for a folder and its archive."""
        return digest([self.content, *self.names])


class _Rows:
    """Calls a function of an index with rows[i] for i; a class, so that it can be pickled."""

    def __init__(self, function, rows):
        self.function, self.rows = function, rows

    def __call__(self, index):
        return self.function(self.rows[index])

    def close(self):
        close(self.function)


def close(read):
    """Ends what a reader of images holds open, if it holds anything."""
    if hasattr(read, "close"):
        read.close()


def digest(texts):
    """A short hash of a sequence of texts, none of which has a NUL."""
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogateescape")).hexdigest()[:32]


def content_of(names, sizes):
    """What `Listing.content` is where the size of each file is known; the order does not matter."""
    return digest(f"{size} {name}" for name, size in sorted(zip(names, sizes)))


@contextlib.contextmanager
def reading(path, errors=DAMAGE):
    """Refuses a damaged file in one line that names it."""
    try:
        yield
    except errors as error:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        reason = getattr(error, "strerror", None) or text
        raise UserError(f"cannot read {path}: {reason}; is it complete?") from error
