"""Labels of WebDataset tars: members beside the images, with the same name up to its first dot.

    shard/0007.jpg    an image; shard/0007.left.png would be another of the same sample
    shard/0007.cls    its class, a number or a name as text
    shard/0007.json   or {"cls": ...}, {"label": ...}, {"class": ...}: a number or a name

Where there are both, .cls counts.
"""

import json

import numpy as np

MAX_BYTES = 2**20  # of a member with a label
KEYS = ("cls", "label", "class")  # of a .json, the first that is there


def may_be_label(name, member):
    """Whether a member of a tar, a `tarfile.TarInfo`, is to be read for a label."""
    return (
        _split(name)[1] in ("cls", "json")
        and member.isreg()
        and not member.issparse()
        and member.size <= MAX_BYTES
    )


class Labels:
    """Collects the labels of a tar, which may come before or after their images."""

    def __init__(self):
        self._found = {}

    def add(self, name, data):
        """Reads a member; whether it holds a label. Of members of one kind the last counts."""
        key, ending = _split(name)
        label = _in_text(data) if ending == "cls" else _in_json(data)
        if label is not None and (ending == "cls" or self._found.get(key, ("json",))[0] == "json"):
            self._found[key] = ending, label
        return label is not None

    def of(self, name):
        """The label of an image, a text ("7" for a number), or None."""
        return self._found.get(_split(name)[0], (None, None))[1]


def labeled(listing):
    """Without the images that have no label, where others have one; they are counted as left out.

    Of a `Listing` that labels were read for: one of tars, or of arrays.
    """
    if listing.kind not in ("tar", "npz") or listing.labels is None:
        return listing
    rows = np.flatnonzero(listing.labels >= 0)
    if len(rows) == len(listing):
        return listing
    found = listing.select(rows)
    found.size = listing.size
    found.skipped = listing.skipped | {
        "without a label, where others have one": len(listing) - len(rows)
    }
    return found


def _split(name):
    """(key of the sample, ending in lower case): a name, cut at the first dot of its last part."""
    folder, slash, last = name.rpartition("/")
    stem, _, ending = last.partition(".")
    return folder + slash + stem, ending.lower()


def _in_text(data):
    try:
        return _clean(data.decode())
    except UnicodeDecodeError:
        return None


def _in_json(data):
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    found = next((found[key] for key in KEYS if key in found), None)
    if isinstance(found, str):
        return _clean(found)
    number = isinstance(found, int) and not isinstance(found, bool) and found >= 0
    return str(found) if number else None


def _clean(text):
    """A class as text; None for nothing, several lines, or -1, which stands for no class."""
    text = text.strip()
    if not 0 < len(text) <= 200 or len(text.splitlines()) > 1 or text == "-1":
        return None
    return str(int(text)) if text.isdecimal() else text
