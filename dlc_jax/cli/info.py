"""dlc info W: what a workdir holds and how far it is. It only reads, and it reads what it can of one that is unfinished or damaged."""

import importlib.metadata
import json
import re
import textwrap
from pathlib import Path
from typing import Any

from dlc_jax import workdir
from dlc_jax.errors import UserError
from dlc_jax.report.curves import read_metrics
from dlc_jax.report.words import duration, finite, number, words

EXAMPLE = "dlc info runs/quickstart"
VERSIONS = ("dlc_jax", "jax", "flax", "orbax-checkpoint")
_SKIPPED = re.compile(
    r"^(seconds|judge)/|(^|[/_])count$|chance|values|skipped"
)  # results; the judge's own proof is in the report


def arguments(parser) -> None:
    parser.add_argument("workdir", metavar="W", help="folder of a run")


def run(arguments, rest) -> None:
    directory = Path(arguments.workdir)
    if not directory.is_dir():
        raise UserError(
            f"{directory} {'is not a folder' if directory.exists() else 'does not exist'}"
        )
    config, results, problems = {}, {}, []
    for name, into in (("config.json", config), ("results.json", results)):
        found, problem = read(directory / name)
        into.update(found)
        problems += [problem] if problem else []
    steps = names(directory, config)
    if not config and not any((directory / name).is_dir() for name in steps):
        raise UserError(
            f"{directory} holds no run: neither a config.json that can be read nor a step's folder"
        )

    in_use = workdir.holder(directory)
    print(f"{directory}, {size(directory)}, {f'in use by {in_use}' if in_use else 'not in use'}")
    rows, lines = [("step", "state", "size", "time")], []
    for name in steps:
        rows.append(
            (name, *state(directory / name, section(config, name), results.get(f"seconds/{name}")))
        )
        lines += [f"  {name}: {line}" for line in [curve(directory / name)] if line]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        print(
            "  "
            + "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]).rstrip()
        )
    for title, found in (
        ("losses", lines),
        ("results", groups(results, steps)),
        ("versions", versions(directory, steps)),
    ):
        if found:
            print("\n".join([f"{title}:", *found]))
    for problem in problems:
        print(f"damaged: {problem}")
    if (directory / "report.html").is_file():
        print(f"pictures and curves: {directory / 'report.html'}")


def read(path: Path) -> tuple[dict, str]:
    """(what a JSON file says, what is wrong with it); ({}, "") if there is none."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}, ""
    except (OSError, ValueError) as error:
        return {}, f"{path.name} ({getattr(error, 'strerror', None) or 'no JSON'})"
    return (found, "") if isinstance(found, dict) else ({}, f"{path.name} (no JSON object)")


def names(directory: Path, config: dict) -> list[str]:
    """Steps of the recipe in its order, and what else has left a trace: a variant's steps, or those of a lost config."""
    order = [name for name in section(config, "steps", list) if isinstance(name, str)]
    traces = ("done.json", "seconds.json", "metrics.jsonl", "checkpoints")
    here = [
        path
        for path in sorted(directory.iterdir())
        if any((path / trace).exists() for trace in traces)
    ]
    # what is not complete comes last
    here.sort(key=lambda path: section(read(path / "done.json")[0], "finished", str) or "~")
    before = [path.name for path in here if path.name not in order and section(config, path.name)]
    return [*before, *order, *(path.name for path in here if path.name not in order + before)]


def section(tree: dict, name: str, kind: type = dict) -> Any:
    """What stands there, if it is of that kind: a damaged file may hold anything."""
    return found if isinstance(found := tree.get(name), kind) else kind()


def state(directory: Path, settings: dict, seconds: Any) -> tuple[str, str, str]:
    """(how far a step is, its size, its time) in words."""
    if not directory.is_dir():
        return "not started", "", ""
    from dlc_jax.checkpoint import seal

    done, problem = read(directory / "done.json")
    noted, _ = read(directory / "seconds.json")
    saved = [
        step
        for step in checkpoints(directory)
        if seal.path_of(directory / "checkpoints", step).exists()
    ]
    damaged = sum(1 for path in (directory / "checkpoints").glob("*.damaged*") if path.is_dir())
    need, reached = section(section(settings, "train"), "steps", int), section(noted, "step", int)
    if problem:
        said = problem
    elif done and (trained := section(done, "steps", int)) >= need:
        said = f"complete, {trained} steps" if trained else "complete"
    elif need:
        said = f"{reached} of {need} steps, {f'saved at {saved[0]}' if saved else 'none saved'}"
    else:
        said = f"not complete, at step {reached}" if reached else "not complete"
    said += f", {damaged} damaged checkpoint{'s' * (damaged > 1)} set aside" if damaged else ""
    seconds = seconds if finite(seconds) else noted.get("seconds")
    return said, size(directory), duration(seconds) if finite(seconds) else ""


def checkpoints(directory: Path) -> list[int]:
    """Steps with a checkpoint, newest first. Whether each is good costs reading all of it, and is left to those who load it."""
    from dlc_jax.checkpoint import seal

    try:
        return seal.steps(directory / "checkpoints")
    except UserError:
        return []


def curve(directory: Path) -> str:
    """The last training loss, the last and the best validation loss; empty if nothing was trained here."""
    series, parts = read_metrics(directory / "metrics.jsonl"), []
    if rows := series.get("loss"):
        parts.append(f"training {number(rows[-1][1])} at step {rows[-1][0]}")
    if rows := series.get("validation/loss"):
        best = min(rows, key=lambda row: row[1])
        parts.append(f"validation {number(rows[-1][1])}, best {number(best[1])} at step {best[0]}")
    return "; ".join(parts)


def groups(results: dict, steps: list[str]) -> list[str]:
    """Lines for each group of results but losses, times, counts and chance levels; first those of no group: facts of the run."""
    facts = [f"{words(key)} {number(value)}" for key, value in results.items() if "/" not in key]
    found: dict[str, list[str]] = {}
    for key, value in results.items():
        group, _, name = key.rpartition("/")
        loss = group.partition("/")[2] == "validation" and group.partition("/")[0] in steps
        if group and finite(value) and not loss and not _SKIPPED.search(key):
            found.setdefault(group, []).append(f"{words(name)} {number(value)}")
    lines = [f"  {', '.join(facts)}"] * bool(facts) + [
        f"  {words(group)}: {', '.join(values)}" for group, values in found.items()
    ]
    return [textwrap.fill(line, width=120, subsequent_indent="    ") for line in lines]


def versions(directory: Path, steps: list[str]) -> list[str]:
    """With what the newest checkpoint of each step was saved, in a line for each set of versions, and what is installed here."""
    from dlc_jax.checkpoint import arrays

    by: dict[str, list[str]] = {}
    for name in steps:
        for step in checkpoints(directory / name)[:1]:
            try:
                saved = arrays.read_json(directory / name / "checkpoints" / str(step) / "meta")[
                    "versions"
                ]
                said = ", ".join(f"{package} {version}" for package, version in saved.items())
            except Exception:  # whatever a damaged checkpoint makes its readers raise
                said = "a checkpoint that cannot be read"
            by.setdefault(said, []).append(name)
    here = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in VERSIONS)
    return [*(f"  {', '.join(of)}: {said}" for said, of in by.items()), f"  here: {here}"]


def size(path: Path) -> str:
    total = 0.0
    for file in path.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:  # a running step has just moved it
            continue
    unit = "kB"
    for unit, bytes_ in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):  # noqa: B007
        if total >= bytes_:
            break
    return f"{total / bytes_:.1f} {unit}"
