"""What the names of images say: whether a file is an image, its split and its class.

A name is the path of an image relative to its place, with "/" between the parts:

    train/cat/1.jpg, validation/cat/2.jpg
        a folder per split (train, and val, valid, validation, dev or test), then per class
    cat/1.jpg
        a folder per class; a share of the names, chosen by their hash, is held out
    1.jpg
        neither
"""

import functools
import hashlib
import importlib.util
import posixpath
import re

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


def check_name(name: str) -> tuple[str, str | None]:
    """(name without "." and empty parts, why it cannot be used or None), of a foreign name."""
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


def system_folder(name: str) -> str | None:
    """The folder in a relative name that is a system's own, such as "a/@eaDir", or None."""
    folders = name.split("/")[:-1]
    for depth, folder in enumerate(folders, 1):
        if folder.lower() in SYSTEM or folder.lower().startswith(".trash"):
            return "/".join(folders[:depth])
    return None


def not_image(name: str) -> str | None:
    """Why a file is not read as an image, by the end of its name; None if it is."""
    ending = posixpath.splitext(name)[1].lower()
    if ending in HEIC:
        return None if reads_heic() else f"photographs in HEIC ({GET_HEIC})"
    if ending == ".jxl":
        return "images in JPEG XL (not read: convert them to PNG)"
    return None if ending in SUFFIXES else NOT_AN_IMAGE


@functools.cache
def reads_heic() -> bool:
    """Whether the extra `heic` is installed. It is not imported for that."""
    return importlib.util.find_spec("pillow_heif") is not None


class Skipped:
    """Counts what is left out, by reason."""

    def __init__(self):
        self._found = {}

    def add(self, reason, example=None):
        """One more; a reason is shown with the first of its examples by name."""
        count, first = self._found.get(reason, (0, example))
        self._found[reason] = count + 1, None if example is None else min(first, example)

    def counts(self):
        """{reason: count}."""
        return {
            reason if example is None else f"{reason} (such as {example})": count
            for reason, (count, example) in self._found.items()
        }


def common_folder(names: list[str]) -> str:
    """The folders that all names share, "a/b/" or ""; folders named like splits are not counted."""
    first = names[0].split("/")[:-1] if names else []
    for name in names:
        parts = name.split("/")[:-1]
        first = [
            a
            for k, a in enumerate(first)
            if parts[: k + 1] == first[: k + 1] and a.lower() not in SPLITS
        ]
    return "".join(part + "/" for part in first)


def split_of(names: list[str]) -> list[str | None] | None:
    """The split of each name, as its first folder says; None if there are no splits.

    A split is "train", "validation", "test", or None for a name that is in none of them.

    Folders called like splits count if there is one for training and another, or nothing else:
    "train" alone may be a class.
    """
    tops = [name.partition("/")[0] if "/" in name else "" for name in names]
    known = {top: SPLITS.get(top.lower()) for top in set(tops)}
    found = {split for top, split in known.items() if top}
    if "train" not in found or (None in found and not found & {"validation", "test"}):
        return None
    return [known[top] for top in tops]


def classify(names: list[str]) -> tuple[np.ndarray | None, list[str]]:
    """(labels int32 [n], names of the classes) by the first folder after that of the split.

    (None, []) if some image is in none.
    """
    depth = 1 if split_of(names) else 0
    if any(name.count("/") <= depth for name in names):
        return None, []
    folders = [name.split("/", depth + 1)[depth] for name in names]
    classes = sorted(set(folders))
    number = {name: k for k, name in enumerate(classes)}
    return np.array([number[folder] for folder in folders], np.int32), classes


def number_classes(values: list[str | None]) -> tuple[np.ndarray, list[str]]:
    """(labels int32 [n], names of the classes) of classes that are written as texts.

    The label of None is -1.

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


def choose_rows(names: list[str], split: str, *, validation: float) -> list[int]:
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
