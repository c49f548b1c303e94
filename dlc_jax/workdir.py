"""The directory of a run: who writes in it, which config it is of, what is complete and what came out.

    .lock                  held by the live run; the system lets go of it however the run ends
    config.json            the config, as it last ran; config_history.jsonl has the changes
    results.json           every result of every step, flat
    <step>/done.json       marks a step that is complete
    <step>/seconds.json    time spent in a step so far, over all runs; see metrics.py

Only process 0 writes.
"""

import contextlib
import fcntl
import json
import math
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dlc_jax.errors import UserError

# Dotted names of what may change under a run: how long, how often, on what devices, from where; not what is learned.
OPERATIONAL = (
    r"steps",
    r"mesh\..*",
    r"log\..*",
    r"[^.]+\.batch",  # of a job; a stage's is in its `train`, and is learned from
    r"[^.]+\.(grid|monitor)\..*",
    r".*\.train\.(steps|accumulate|log_every|save_every|validate_every|validate_batches|keep|patience)",
    r"(.*\.)?(path|data_dir|directory|cache|cache_gb|limit|threads|workers|prefetch)",
)
_ABSENT = "absent"


def check(directory: str | Path) -> None:
    """Refuses at once what `lock` would refuse after all has been made ready; it takes nothing.

    Raises:
      UserError: another live run holds it; a part of its path is a file.
    """
    directory = Path(directory).absolute()
    there = next(path for path in (directory, *directory.parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{there} is not a directory; give another --workdir")
    # One of several processes may find that the first of them holds it.
    if "JAX_PROCESS_ID" not in os.environ and (by := holder(directory)):
        raise UserError(_in_use(directory, by))


@contextlib.contextmanager
def lock(directory: str | Path) -> Iterator[Path]:
    """Makes `directory` and holds it for this run.

    Raises:
      UserError: another live run holds it; it cannot be made or written.
    """
    directory = Path(directory).absolute()
    if not _writes():
        yield directory
        return
    with contextlib.ExitStack() as stack:
        with _writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(directory / ".lock", "ab", buffering=0))
            try:
                # Held by the open file: the system releases it when the process is gone, kill -9 included.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(_in_use(directory, _holder(directory))) from None
            os.truncate(file.fileno(), 0)
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": _now()}).encode())
        try:
            yield directory
        finally:
            with contextlib.suppress(OSError):
                os.truncate(file.fileno(), 0)  # nobody's now; after a kill the text stays, but the system has let go of the lock


def remember(
    directory: str | Path,
    config: Mapping[str, Any],
    operational: tuple[str, ...] = OPERATIONAL,
    *,
    present: Callable[[dict], Mapping] = dict,
) -> None:
    """Writes down the config of a run, or compares it with the one of the run before.

    A section that is new is accepted, one that is absent now stays remembered: a recipe's variants
    share a workdir.

    Args:
      operational: regular expressions of whole dotted names that may change; their changes are
        recorded.
      present: a config of any version -> the same in this version's fields.

    Raises:
      UserError: anything else changed.
    """
    directory, new = Path(directory), plain(present(dict(config)))
    path = directory / "config.json"
    saved = _read(path)
    if saved is None:
        write(path, new)
        return
    old = plain(present(saved))
    sections = {key for key in old.keys() ^ new.keys() if isinstance((old | new)[key], dict)}  # in one of the two only
    before, after = (_flat({key: value for key, value in tree.items() if key not in sections}) for tree in (old, new))
    changed = {
        name: (before.get(name, _ABSENT), after.get(name, _ABSENT))
        for name in sorted(before.keys() | after.keys())
        if before.get(name, _ABSENT) != after.get(name, _ABSENT)
    }
    wrong = [name for name in changed if not any(re.fullmatch(pattern, name) for pattern in operational)]
    if wrong:
        lines = [f"{name}: {json.dumps(changed[name][0])} -> {json.dumps(changed[name][1])}" for name in wrong[:10]]
        more = f"; and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        what = "; ".join(lines) + more
        raise UserError(f"{directory} is a run of another config ({what}); set it back, or give another --workdir")
    if old | new != saved:
        added = sorted(new.keys() - old.keys())
        if _writes() and (changed or added):
            with _writing(directory), open(directory / "config_history.jsonl", "a") as file:
                file.write(json.dumps({"time": _now(), "changed": changed, "added": added}) + "\n")
        write(path, old | new)


def lasting(config: Mapping[str, Any], operational: tuple[str, ...] = OPERATIONAL) -> dict[str, Any]:
    """A config, or some sections of one, by dotted names and without what may change: what a checkpoint or a store depends on."""
    kept = _flat(plain(config))
    return {name: value for name, value in kept.items() if not any(re.fullmatch(pattern, name) for pattern in operational)}


def read_config(directory: str | Path) -> dict:
    """The config that the run of `directory` has, for those who only read it.

    Raises:
      UserError: it holds no run, or its config.json is damaged.
    """
    directory = Path(directory)
    found = _read(directory / "config.json")
    if found is None:
        what = "holds no run (no config.json)" if directory.is_dir() else "does not exist"
        raise UserError(f"{directory} {what}; make a run with dlc train --config=configs/quickstart.py --workdir={directory}")
    return found


def merge_results(directory: str | Path, results: Mapping[str, Any]) -> None:
    """Adds to results.json, at once or not at all; what is not a finite number becomes null."""
    path = Path(directory) / "results.json"
    write(path, (_read(path) or {}) | plain(results))


def done(directory: str | Path) -> dict | None:
    """What `mark_done` wrote, or None if the step is not complete.

    Raises:
      UserError: it says no more how long the step was trained, after what, or with which settings: to guess could throw training away.
    """
    path = Path(directory) / "done.json"
    found = _read(path)
    if found is not None:
        after, settings = found.get("after", {}), found.get("settings", {})
        sound = isinstance(after, dict) and isinstance(settings, dict)
        if not sound or not all(type(steps) is int for steps in (found.get("steps"), *after.values())):
            raise UserError(f"{path} is damaged; move it away: the same command then completes the step from what it left")
    return found


def mark_done(directory: str | Path, facts: Mapping[str, Any]) -> None:
    """Marks a step as complete; call it last, when all of its results are written."""
    with _writing(Path(directory)):
        Path(directory).mkdir(parents=True, exist_ok=True)
    write(Path(directory) / "done.json", plain({"finished": _now(), **facts}))


def seconds(directory: str | Path, elapsed: float) -> float:
    """Seconds spent in a step: `elapsed` in this process, and what killed runs before it had noted in seconds.json."""
    try:
        noted = _read(Path(directory) / "seconds.json") or {}
    except UserError:  # of time alone: nothing to stop for
        noted = {}
    before = noted.get("before")
    return elapsed + (before if _finite(before) else 0.0)


def total_seconds(directory: str | Path) -> float:
    """Adds `seconds/total`, the sum of all `seconds/...` in results.json."""
    found = _read(Path(directory) / "results.json") or {}
    times = [value for key, value in found.items() if key.startswith("seconds/") and key != "seconds/total"]
    total = sum(value for value in times if _finite(value))
    merge_results(directory, {"seconds/total": total})
    return total


def commit() -> str | None:
    """The commit of this code, and whether the tree was changed since; None where it is not run from a checkout."""

    def git(*arguments: str) -> str:
        call = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(call, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # else the checkout around us may be another project's
        return git("rev-parse", "HEAD") + (" with local changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def holder(directory: str | Path) -> str | None:
    """Who holds the lock of `directory`, in words; None if nobody does. It takes the lock for no longer than asking."""
    directory = Path(directory)
    try:
        with open(directory / ".lock", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _holder(directory)
    except OSError:  # there is none, or it cannot be opened
        return None
    return None


def _writes() -> bool:
    """Whether this is process 0."""
    import jax  # whoever only reads need not wait for it

    return jax.process_index() == 0


def _in_use(directory: Path, by: str) -> str:
    return f"{directory} is in use by {by}; wait for it, stop it, or give another --workdir"


def _holder(directory: Path) -> str:
    try:
        facts = json.loads((directory / ".lock").read_text())
        return f"process {facts['pid']} on {facts['host']} since {facts['started']}"
    except (OSError, ValueError, KeyError):  # it has the lock but has not written its name yet
        return "another run"


@contextlib.contextmanager
def _writing(directory: Path):
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write in {directory}: {error.strerror}; make room or give another --workdir") from error


def write(path: Path, value: Mapping[str, Any]) -> None:
    """Writes JSON, the whole file or none of it: a temporary one is renamed into place."""
    if not _writes():
        return
    temporary = path.with_name(path.name + ".tmp")
    with _writing(path.parent):
        with open(temporary, "w") as file:
            json.dump(value, file, indent=1, sort_keys=True, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def _read(path: Path) -> dict | None:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except NotADirectoryError as error:
        raise UserError(f"{path.parent} is not a directory; give another --workdir") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError:
        raise UserError(f"{path} is damaged; move it away, or give another --workdir") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged; move it away, or give another --workdir")
    return value


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _flat(tree: Any, name: str = "") -> dict[str, Any]:
    """Leaves by dotted name; lists are leaves, and so is an empty dict."""
    if not isinstance(tree, dict) or (name and not tree):
        return {name: tree}
    return {field: leaf for key, value in tree.items() for field, leaf in _flat(value, f"{name}.{key}".strip(".")).items()}


def plain(value: Any) -> Any:
    """As it comes back from strict JSON: tuples are lists, numpy numbers are numbers, nan and infinities are null."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %z")
