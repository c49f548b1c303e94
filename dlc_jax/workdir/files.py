"""JSON on disk, each file whole or as it was before; only process 0 writes."""

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlc_jax.errors import UserError


def writes() -> bool:
    """Whether this is process 0."""
    import jax  # whoever only reads need not wait for it

    return jax.process_index() == 0


@contextlib.contextmanager
def writing(directory: Path):
    """Within it, what the system refuses is a UserError about `directory`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write in {directory}: {error.strerror}; make room or give another --workdir"
        ) from error


def write(path: Path, value: Mapping[str, Any]) -> None:
    """Writes JSON, the whole file or none of it: a temporary one is renamed into place.

    Raises:
      UserError: it cannot be written.
    """
    if not writes():
        return
    temporary = path.with_name(path.name + ".tmp")
    with writing(path.parent):
        with open(temporary, "w") as file:
            json.dump(value, file, indent=1, sort_keys=True, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def read(path: Path) -> dict | None:
    """What `write` wrote, or None if there is no file.

    Raises:
      UserError: it is damaged or cannot be read.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise UserError(f"{path.parent} is not a directory; give another --workdir") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged; move it away, or give another --workdir")
    return value


def plain(value: Any) -> Any:
    """As it comes back from strict JSON: tuples are lists, numpy numbers are numbers.

    Nan and infinities are null.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z")
