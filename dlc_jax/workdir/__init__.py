"""The directory of a run: who writes in it, its config, what is complete and what came out.

    .lock                  held by the live run; the system releases it however the run ends
    config.json            the config, as it last ran; config_history.jsonl has the changes
    results.json           every result of every step, flat
    <step>/done.json       marks a step that is complete
    <step>/seconds.json    time spent in a step so far, over all runs; see metrics

Only process 0 writes.
"""

import json
import math
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dlc_jax.errors import UserError
from dlc_jax.workdir.exported import DEMO, RUN, config_file, locate, portable
from dlc_jax.workdir.files import now, plain, read, write, writes, writing
from dlc_jax.workdir.owner import check, holder, lock

__all__ = [
    "DEMO",
    "OPERATIONAL",
    "RUN",
    "check",
    "commit",
    "config_file",
    "done",
    "holder",
    "lasting",
    "locate",
    "lock",
    "mark_done",
    "merge_results",
    "plain",
    "portable",
    "read_config",
    "remember",
    "seconds",
    "total_seconds",
    "write",
]

# Dotted names of what may change under a run: how long, how often, on what devices, from where; not
# what is learned.
OPERATIONAL = (
    r"steps",
    r"mesh\..*",
    r"log\..*",
    r"[^.]+\.batch",  # of a job; a stage's is in its `train`, and is learned from
    r"[^.]+\.(grid|monitor|scores)\..*",
    r".*\.train\.(steps|accumulate|log_every|save_every|validate_every|validate_batches)",
    r".*\.train\.(keep|keep_period|keep_best|patience)",
    r"(.*\.)?(path|data_dir|directory|cache|cache_gb|limit|threads|workers|prefetch)",
)
_ABSENT = "absent"


def remember(
    directory: str | Path,
    config: Mapping[str, Any],
    operational: tuple[str, ...] = OPERATIONAL,
    *,
    present: Callable[[dict, Path], Mapping] = lambda config, where: config,
) -> None:
    """Writes down the config of a run, or compares it with the one of the run before.

    A section that is new is accepted, one that is absent now stays remembered: a recipe's variants
    share a workdir.

    Args:
      operational: regular expressions of whole dotted names that may change; their changes are
        recorded.
      present: (a config of any version, its file) -> the same in this version's fields.

    Raises:
      UserError: anything else changed.
    """
    path = Path(directory) / "config.json"
    directory, new = Path(directory), plain(present(dict(config), path))
    saved = read(path)
    if saved is None:
        write(path, new)
        return
    old = plain(present(saved, path))
    # Those in one of the two only.
    sections = {key for key in old.keys() ^ new.keys() if isinstance((old | new)[key], dict)}
    before, after = (
        _flat({key: value for key, value in tree.items() if key not in sections})
        for tree in (old, new)
    )
    pairs = {
        name: (before.get(name, _ABSENT), after.get(name, _ABSENT))
        for name in sorted(before.keys() | after.keys())
    }
    changed = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if wrong := [name for name in changed if not _matches(name, operational)]:
        lines = [f"{name}: {' -> '.join(map(json.dumps, changed[name]))}" for name in wrong[:10]]
        more = f"; and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise UserError(
            f"{directory} is a run of another config ({'; '.join(lines)}{more}); set it back, or "
            "give another --workdir"
        )
    if old | new != saved:
        added = sorted(new.keys() - old.keys())
        if writes() and (changed or added):
            entry = {"time": now(), "changed": changed, "added": added}
            with writing(directory), open(directory / "config_history.jsonl", "a") as file:
                file.write(json.dumps(entry) + "\n")
        write(path, old | new)


def lasting(
    config: Mapping[str, Any], operational: tuple[str, ...] = OPERATIONAL
) -> dict[str, Any]:
    """A config, or some sections of one, by dotted names and without what may change.

    It is what a checkpoint or a store depends on.
    """
    fields = _flat(plain(config))
    return {name: value for name, value in fields.items() if not _matches(name, operational)}


def read_config(directory: str | Path) -> dict:
    """The config of the run in `directory`, or of an exported folder, for those who only read it.

    Raises:
      UserError: it holds no run, or its config.json is damaged.
    """
    directory = Path(directory)
    config = read(config_file(directory))
    if config is None:
        what = "holds no run (no config.json)" if directory.is_dir() else "does not exist"
        raise UserError(
            f"{directory} {what}; make a run with dlc train --config=configs/quickstart.py "
            f"--workdir={directory}"
        )
    return config


def merge_results(directory: str | Path, results: Mapping[str, Any]) -> None:
    """Adds to results.json, all or nothing; what is not a finite number becomes null."""
    path = Path(directory) / "results.json"
    write(path, (read(path) or {}) | plain(results))


def done(directory: str | Path) -> dict | None:
    """What `mark_done` wrote, or None if the step is not complete.

    Raises:
      UserError: it no longer says how long the step was trained, after what, or with which
        settings: to guess could throw training away.
    """
    path = Path(directory) / "done.json"
    facts = read(path)
    if facts is not None:
        after, settings = facts.get("after", {}), facts.get("settings", {})
        sound = isinstance(after, dict) and isinstance(settings, dict)
        if not sound or any(type(n) is not int for n in (facts.get("steps"), *after.values())):
            raise UserError(
                f"{path} is damaged; move it away: the same command then completes the step from "
                "what it left"
            )
    return facts


def mark_done(directory: str | Path, facts: Mapping[str, Any]) -> None:
    """Marks a step as complete; call it last, when all of its results are written."""
    with writing(Path(directory)):
        Path(directory).mkdir(parents=True, exist_ok=True)
    write(Path(directory) / "done.json", plain({"finished": now(), **facts}))


def seconds(directory: str | Path, elapsed: float) -> float:
    """Seconds spent in a step: `elapsed` in this process, and those that killed runs had noted."""
    try:
        noted = read(Path(directory) / "seconds.json") or {}
    except UserError:  # of time alone: nothing to stop for
        noted = {}
    before = noted.get("before")
    return elapsed + (before if _is_finite(before) else 0.0)


def total_seconds(directory: str | Path) -> float:
    """Adds `seconds/total`, the sum of all `seconds/...` in results.json."""
    results = read(Path(directory) / "results.json") or {}
    names = [name for name in results if name.startswith("seconds/") and name != "seconds/total"]
    total = sum(results[name] for name in names if _is_finite(results[name]))
    merge_results(directory, {"seconds/total": total})
    return total


def commit() -> str | None:
    """The commit of this code, and whether the tree was changed since; None without a checkout."""

    def git(*arguments: str) -> str:
        call = ["git", "-C", str(Path(__file__).parent), *arguments]
        done = subprocess.run(call, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        # else the checkout around us may be another project's
        git("ls-files", "--error-unmatch", Path(__file__).name)
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" with local changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _flat(tree: Any, name: str = "") -> dict[str, Any]:
    """Leaves by dotted name; lists are leaves, and so is an empty dict."""
    if not isinstance(tree, dict) or (name and not tree):
        return {name: tree}
    parts = [_flat(value, f"{name}.{key}".strip(".")) for key, value in tree.items()]
    return {field: leaf for part in parts for field, leaf in part.items()}
