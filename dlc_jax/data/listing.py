"""The images of one place as a list: what each kind of place (folder, archive, Parquet, ...) is
turned into.

`files.scan(path)` gives the `Listing` of all images there, `files.open_files(path, split=...)` the
one to read from at random. An image is known by its name, the path relative to the place, with "/"
between the parts. Splits and classes follow from the names:

    train/cat/1.jpg, validation/cat/2.jpg     a folder per split (train, and val, valid, validation, dev or test), then per class
    cat/1.jpg                                 a folder per class; a share of the names, chosen by their hash, is held out
    1.jpg                                     neither
"""

import contextlib
import functools
import hashlib
import importlib.util
import lzma
import posixpath
import re
import struct
import tarfile
import zipfile
import zlib

import numpy as np

from dlc_jax.errors import UserError

SUFFIXES = frozenset(
    (
        ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .ppm .pgm .pbm .pnm .jp2 .avif .ico "
        ".tga"
    ).split()
)
HEIC = frozenset(".heic .heif .hif".split())  # read with the extra `heic`
GET_HEIC = "pip install 'dlc_jax[heic]' reads them"
NOT_AN_IMAGE = "not an image by its name"
# Folders that servers, systems and programs keep beside people's files, in lower case; and all
# whose names begin with .trash.
SYSTEM = frozenset(
    (
        "@eadir #recycle #snapshot "  # Synology
        ".@__thumb .@upload_cache @recycle @recently-snapshot "  # QNAP
        "__macosx .appledouble .appledb .spotlight-v100 .fseventsd "  # macOS
        "$recycle.bin lost+found .thumbnails .thumbs .picasaoriginals"
    ).split()
) | {"system volume information"}
SYSTEM_FOLDER = "folders of thumbnails, trash or a system"
SPLITS = {  # folders, and what they hold
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}

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
        self._labels = (
            labels if labels is None or callable(labels) else np.asarray(labels, np.int32)
        )
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
        """What of this listing counts, with classes: as the names tell them, if nothing else does."""
        split = split_of(self.names)
        rows = [row for row in range(len(self)) if split is None or split[row]]
        found = self if len(rows) == len(self) else self.select(rows)
        if found is not self:
            found.size = self.size
            found.skipped["outside of the folders for training and validation"] = len(self) - len(
                rows
            )
        if not found.classes:
            found._labels, found.classes = classify(found.names)
        return found

    def digest(self):
        """Hash of the content and the names: the same for a folder and its archive, another for
        other images.
        """
        return digest([self.content, *self.names])


class _Rows:
    """Calls a function of an index with rows[i] for i. A class, so that a listing travels to worker
    processes.
    """

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
    """A file that cannot be read as what it should be is the user's matter: one line that names it."""
    try:
        yield
    except errors as error:
        reason = (
            getattr(error, "strerror", None)
            or (str(error).splitlines() or [type(error).__name__])[0]
        )
        raise UserError(f"cannot read {path}: {reason}; is it complete?") from error


def check_name(name):
    """(name without "." and empty parts, why it cannot be used or None). Used for names that
    somebody else wrote.
    """
    parts = name.split("/")
    if name.startswith("/") or re.match(r"[A-Za-z]:[/\\]|\\\\", name):
        return name, "absolute name"
    if ".." in parts or "\0" in name:
        return name, 'name with ".."'
    parts = [part for part in parts if part not in ("", ".")]
    if system_folder("/".join(parts)):
        return "/".join(parts), SYSTEM_FOLDER
    if not parts or any(part.startswith(".") for part in parts):
        return name, "hidden"
    name = "/".join(parts)
    return name, not_image(name)


def system_folder(name):
    """The folder in a relative name that is a server's or a system's own, such as "a/@eaDir", or
    None.
    """
    folders = name.split("/")[:-1]
    for depth, folder in enumerate(folders, 1):
        if folder.lower() in SYSTEM or folder.lower().startswith(".trash"):
            return "/".join(folders[:depth])
    return None


def not_image(name):
    """Why a file is not read as an image, by the end of its name; None if it is."""
    ending = posixpath.splitext(name)[1].lower()
    if ending in HEIC:
        return None if reads_heic() else f"photographs in HEIC ({GET_HEIC})"
    if ending == ".jxl":
        return "images in JPEG XL (not read: convert them to PNG)"
    return None if ending in SUFFIXES else NOT_AN_IMAGE


@functools.cache
def reads_heic():
    """Whether the extra `heic` is installed. It is not imported for that."""
    return importlib.util.find_spec("pillow_heif") is not None


class Skipped:
    """Counts what is left out, by reason."""

    def __init__(self):
        self._found = {}

    def add(self, reason, example=None):
        """One more; of the examples of a reason, the first by name is told with it."""
        count, first = self._found.get(reason, (0, example))
        self._found[reason] = count + 1, None if example is None else min(first, example)

    def counts(self):
        """{reason: count}."""
        return {
            reason if example is None else f"{reason} (such as {example})": count
            for reason, (count, example) in self._found.items()
        }


def common_folder(names):
    """The folders that all names share, "a/b/" or "". One that is called like a split is not among
    them.
    """
    first = names[0].split("/")[:-1] if names else []
    for name in names:
        parts = name.split("/")[:-1]
        first = [
            a
            for k, a in enumerate(first)
            if parts[: k + 1] == first[: k + 1] and a.lower() not in SPLITS
        ]
    return "".join(part + "/" for part in first)


def split_of(names):
    """The split of each name, "train", "validation", "test" or None (of none), as its first folder
    says; or None: there are no splits.

    Folders called like splits count if there is one for training and another, or nothing else:
      "train" alone may be a class.
    """
    tops = [name.partition("/")[0] if "/" in name else "" for name in names]
    known = {top: SPLITS.get(top.lower()) for top in set(tops)}
    found = {split for top, split in known.items() if top}
    if "train" not in found or (None in found and not found & {"validation", "test"}):
        return None
    return [known[top] for top in tops]


def classify(names):
    """(labels int32 [n], names of the classes) by the first folder after that of the split; (None,
    []) if some image is in none.
    """
    depth = 1 if split_of(names) else 0
    if any(name.count("/") <= depth for name in names):
        return None, []
    folders = [name.split("/", depth + 1)[depth] for name in names]
    classes = sorted(set(folders))
    number = {name: k for k, name in enumerate(classes)}
    return np.array([number[folder] for folder in folders], np.int32), classes


def number_classes(values):
    """(labels int32 [n], names of the classes) of classes that are written as texts, None where
    there is none: label -1.

    If all are whole numbers, these are the labels, and the classes are 0, 1, ... up to the largest;
    else they are numbered by name.
    """
    known = sorted({value for value in values if value is not None})
    if all(value.isdecimal() and int(value) < 2**20 for value in known):
        classes = [str(k) for k in range(max(map(int, known), default=-1) + 1)]
        number = {value: int(value) for value in known}
    else:
        classes, number = known, {value: k for k, value in enumerate(known)}
    return np.array([-1 if value is None else number[value] for value in values], np.int32), classes


def choose_rows(names, split, *, validation):
    """Rows of a split, sorted by name.

    Args:
      names: of all images.
      split: "train", "validation" or "test"; without a folder of the same name, validation and test
        are the other one of the two.
      validation: share held out if there are no folders for splits, or only one for training. It is
        chosen by a hash of the name, so it stays the same when images are added.

    Raises:
      UserError: for another split, or a share that leaves it empty.
    """
    if split not in ("train", "validation", "test"):
        raise UserError(f"unknown split {split!r} of images; use train, validation or test")
    rows = sorted(range(len(names)), key=names.__getitem__)
    known = split_of(names)
    if known and split != "train" and split not in known:
        split = "test" if split == "validation" else "validation"
    if known and (split == "train" or split in known) and set(known) & {"validation", "test"}:
        return [row for row in rows if known[row] == split]
    if not 0 < validation < 1:
        if split == "train" and validation == 0:
            return rows
        raise UserError(
            f"no {split} images: there is no such folder, and validation={validation} is no share "
            "between 0 and 1"
        )
    place = {row: _place(names[row].split("/", 1)[-1] if known else names[row]) for row in rows}
    held = {row for row in rows if place[row] < validation} or set(
        sorted(rows, key=place.__getitem__)[: len(rows) > 1]
    )
    return [row for row in rows if (row in held) != (split == "train")]


def _place(name):
    """A number in [0, 1) that the name alone decides."""
    return (
        int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")
        / 2**64
    )
