"""dlc info W: what a workdir or an exported folder holds, and how far it is.

It only reads, and it reads what it can of a workdir that is unfinished or damaged.
"""

import importlib.metadata
import json
import re
import textwrap
from pathlib import Path
from typing import Any

from dlc_jax import remote, workdir
from dlc_jax.errors import UserError
from dlc_jax.report.curves import read_metrics
from dlc_jax.report.words import duration, finite, number, words

EXAMPLE = "dlc info runs/quickstart"
VERSIONS = ("dlc_jax", "jax", "flax", "orbax-checkpoint")
# results that are not shown; the judge's own proof is in the report
_SKIPPED = re.compile(r"^(seconds|judge)/|(^|[/_])count$|chance|values|skipped")


def arguments(parser) -> None:
    said = "folder of a run, or one that dlc export torch wrote"
    parser.add_argument("workdir", metavar="W", help=said)


def run(arguments, rest) -> None:
    directory = Path(arguments.workdir)
    if not directory.is_dir():
        problem = "is not a folder" if directory.exists() else "does not exist"
        raise UserError(f"{directory} {problem}; give the folder of a run")
    config, config_problem = read(directory / "config.json")
    results, results_problem = read(directory / "results.json")
    parts = exported(directory, config)
    steps = [] if parts else names(directory, config)
    if not (config or parts) and not any((directory / name).is_dir() for name in steps):
        raise UserError(f"{directory} holds no run: no readable config.json and no step's folder")

    in_use = workdir.holder(directory)
    print(f"{directory}, {size(directory)}, {f'in use by {in_use}' if in_use else 'not in use'}")
    rows = [("part" if parts else "step", "state", "size", "time" if steps else "")]
    rows += [(name, said, size(directory / name), "") for name, said in parts.items()]
    for name in steps:
        seconds = results.get(f"seconds/{name}")
        rows.append((name, *state(directory / name, section(config, name), seconds)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    losses = [f"  {name}: {line}" for name in steps if (line := curve(directory / name))]
    lists = {
        "losses": losses,
        "results": groups(results, steps),
        "versions": versions(directory, steps),
    }
    for title, lines in lists.items():
        if lines:
            print("\n".join([f"{title}:", *lines]))
    for problem in filter(None, (config_problem, results_problem)):
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
        return {}, f"{path.name} ({getattr(error, 'strerror', None) or 'not JSON'})"
    return (found, "") if isinstance(found, dict) else ({}, f"{path.name} (not a JSON object)")


def names(directory: Path, config: dict) -> list[str]:
    """Steps of the recipe in its order, and others that left a trace.

    Others are a variant's steps, which come before, or those of a lost config, which come after.
    """
    order = [name for name in section(config, "steps", list) if isinstance(name, str)]
    traces = ("done.json", "seconds.json", "metrics.jsonl", "checkpoints")
    paths = sorted(directory.iterdir())
    paths = [path for path in paths if any((path / trace).exists() for trace in traces)]
    # what is not complete comes last
    paths.sort(key=lambda path: section(read(path / "done.json")[0], "finished", str) or "~")
    others = [path.name for path in paths if path.name not in order]
    before = [name for name in others if section(config, name)]
    return [*before, *order, *(name for name in others if name not in before)]


def exported(directory: Path, config: dict) -> dict[str, str]:
    """{part: what it is, in words} of a folder of dlc export torch; {} of any other.

    Args:
      config: its config.json.
    """
    named = "DLCPipeline" in section(config, "architectures", list)
    if not named and not (directory / workdir.RUN).is_file():
        return {}
    from dlc_jax.interop import hub_folder

    found = {}
    for name in hub_folder.PARTS:
        if not (directory / name).is_dir():
            continue
        try:
            own, _ = read(directory / name / "config.json")
            count, dtype = hub_folder.measured(directory / name, own)
            said = [f"{count:,} parameters of {dtype}"]
        except UserError as error:
            said = [str(error)]
        trained = section(section(config, "trained"), name)
        if step := section(trained, "step", str):
            steps = section(trained, "steps", int)
            said.append(f"{steps} steps of {step}" if steps else f"imported as {step}")
        found[name] = ", ".join(said)
    return found


def section(tree: dict, name: str, kind: type = dict) -> Any:
    """What `tree` has under the name, or an empty one: a damaged file may hold anything."""
    return found if isinstance(found := tree.get(name), kind) else kind()


def state(directory: Path, settings: dict, seconds: Any) -> tuple[str, str, str]:
    """(how far a step is, its size, its time) in words."""
    if not directory.is_dir():
        return "not started", "", ""
    from dlc_jax.checkpoint import seal

    done, problem = read(directory / "done.json")
    noted, _ = read(directory / "seconds.json")
    saves = directory / "checkpoints"
    saved = [step for step in checkpoints(directory) if seal.path_of(saves, step).exists()]
    damaged = sum(1 for path in saves.glob("*.damaged*") if path.is_dir())
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
    """Steps with a checkpoint, newest first; only reading all of one tells whether it is good."""
    from dlc_jax.checkpoint import seal

    try:
        return seal.steps(directory / "checkpoints")
    except UserError:
        return []


def curve(directory: Path) -> str:
    """The last training loss, the last and the best validation loss; "" if nothing was trained."""
    series, parts = read_metrics(directory / "metrics.jsonl"), []
    if rows := series.get("loss"):
        parts.append(f"training {number(rows[-1][1])} at step {rows[-1][0]}")
    if rows := series.get("validation/loss"):
        best = min(rows, key=lambda row: row[1])
        parts.append(f"validation {number(rows[-1][1])}, best {number(best[1])} at step {best[0]}")
    return "; ".join(parts)


def groups(results: dict, steps: list[str]) -> list[str]:
    """A line for each group of results, after one for results of no group: facts of the run.

    Losses, times, counts and chance levels are left out.
    """
    facts = [f"{words(key)} {number(value)}" for key, value in results.items() if "/" not in key]
    found: dict[str, list[str]] = {}
    for key, value in results.items():
        group, _, name = key.rpartition("/")
        loss = group.partition("/")[2] == "validation" and group.partition("/")[0] in steps
        if group and finite(value) and not loss and not _SKIPPED.search(key):
            found.setdefault(group, []).append(f"{words(name)} {number(value)}")
    lines = [f"  {', '.join(facts)}"] if facts else []
    lines += [f"  {words(group)}: {', '.join(values)}" for group, values in found.items()]
    return [textwrap.fill(line, width=100, subsequent_indent="    ") for line in lines]


def versions(directory: Path, steps: list[str]) -> list[str]:
    """The versions that saved the newest checkpoint of each step, and those installed here.

    Steps of the same versions share a line.
    """
    from dlc_jax.checkpoint import arrays

    by: dict[str, list[str]] = {}
    for name in steps:
        for step in checkpoints(directory / name)[:1]:
            try:
                meta = arrays.read_json(directory / name / "checkpoints" / str(step) / "meta")
                packages = meta["versions"].items()
                said = ", ".join(f"{package} {version}" for package, version in packages)
            except Exception:  # whatever a damaged checkpoint makes its readers raise
                said = "a checkpoint that cannot be read"
            by.setdefault(said, []).append(name)
    here = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in VERSIONS)
    return [*(f"  {', '.join(of)}: {said}" for said, of in by.items()), f"  here: {here}"]


def size(path: Path) -> str:
    total = float(remote.size(path) or 0)
    for file in path.rglob("*") if not remote.is_copy(path) else ():
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:  # a running step has just moved it
            continue
    units = {"GB": 1e9, "MB": 1e6, "kB": 1e3}
    unit = next((unit for unit, size in units.items() if total >= size), "kB")
    return f"{total / units[unit]:.1f} {unit}"
