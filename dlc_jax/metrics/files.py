"""Files of metrics: lines trimmed after a kill, small files replaced whole, strict JSON."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np


def trim(path: Path, first: int) -> dict[str, Any]:
    """Drops lines of steps after `first`, torn and damaged ones, and joins those of one step.

    Returns:
      What is written of step `first`.
    """
    if not path.exists():
        return {}
    kept: dict[int, dict] = {}
    text = path.read_text(encoding="utf-8", errors="replace")  # damaged lines drop like torn ones
    for line in text.split("\n"):
        try:
            row = json.loads(line)
            step = row["step"]
        except (ValueError, TypeError, KeyError):  # killed while writing
            continue
        if isinstance(step, int) and step <= first:
            kept[step] = kept.get(step, {}) | row
    trimmed = "".join(json.dumps(row) + "\n" for row in kept.values())
    if trimmed != text:
        replace(path, trimmed)
    return kept.get(first, {})


def noted(directory: Path) -> dict[str, float]:
    """What the runs before noted in seconds.json; zeros without it, and of what it does not say."""
    names = ("seconds", "step", "useful", "restarts")
    try:
        found = json.loads((directory / "seconds.json").read_text())
        return {name: float(found.get(name, 0)) for name in names} | {"is_first": False}
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        return dict.fromkeys(names, 0.0) | {"is_first": True}


def replace(path: Path, text: str) -> None:
    """Writes a file, renamed into place."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def plain(value: Any) -> Any:
    """A number, or a list of numbers, as strict JSON has it: what is not finite is null."""
    value = np.asarray(value).tolist() if hasattr(value, "dtype") else value
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
