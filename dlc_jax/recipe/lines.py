"""A recipe's lines, {dotted name: value}, where what comes later counts.

"*.train.steps": 24         every field of a name that matches
"encoder.crops": None       takes back the lines of a section; "*" those of all
"other.like": "generator"   gives a step the lines of another, but for its own
"""

import itertools
from collections.abc import Mapping
from typing import Any


def later(lines: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Lines with more after them: what is set again moves to the end."""
    return {name: value for name, value in lines.items() if name not in more} | dict(more)


def resolved(given: Mapping[str, Any]) -> dict[str, Any]:
    """Lines without `like`, and without those that were taken back."""
    lines: dict[str, Any] = {}
    for name, value in given.items():
        below = {key for key in lines if key.startswith(f"{name}.") or name == "*"}
        if value is None and below:
            lines = {key: each for key, each in lines.items() if key not in below}
        else:
            lines = later(lines, {name: value})
    for name in [name for name in lines if name.endswith(".like")]:
        lines = _alike(lines, name.removesuffix(".like"), str(lines[name]))
    return lines


def _alike(lines: dict[str, Any], step: str, other: str) -> dict[str, Any]:
    """Lines where `step` has those of `other`, each beside its original: what is later counts."""
    found = {}
    for name, value in lines.items():
        if name == f"{step}.like":
            found[f"{step}.stage"] = lines.get(f"{other}.stage", other)
            continue
        found[name] = value
        target = f"{step}.{name.removeprefix(f'{other}.')}"
        if name.startswith(f"{other}.") and not _is_own(lines, target):
            found[target] = value
    found.setdefault(f"{other}.stage", other)
    return found


def _is_own(lines: Mapping[str, Any], name: str) -> bool:
    """Whether lines set a field, or take back a section that it is in."""
    sections = itertools.accumulate(name.split("."), "{}.{}".format)
    return name in lines or any(lines.get(section, "") is None for section in sections)


def nested(lines: Mapping[str, Any]) -> dict:
    """A tree of dicts from dotted names; a value that is given for a section has the name ""."""
    tree: dict = {}
    for name, value in lines.items():
        *path, last = str(name).split(".")
        inner = tree
        for part in path:
            if not isinstance(inner.setdefault(part, {}), dict):
                inner[part] = {"": inner[part]}
            inner = inner[part]
        if isinstance(inner.get(last), dict):
            inner, last = inner[last], ""
        inner[last] = value
    return tree


def flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """{dotted name: value} of a tree; an empty section is a value."""
    found = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{above}{name}.")
        else:
            found[f"{above}{name}"] = value
    return found
