"""dlc checkpoints W [STEP...] [--verify]: the checkpoints of a run: which are good, and kept why.

It only reads, and without --verify no bytes of arrays: sizes alone are compared.
"""

import textwrap
import time
from pathlib import Path

from dlc_jax import remote
from dlc_jax.cli import info
from dlc_jax.errors import UserError
from dlc_jax.report.words import number

EXAMPLE = "dlc checkpoints runs/quickstart --verify"
GOOD, UNSEALED = "good", "complete, without a seal"


def arguments(parser) -> None:
    parser.add_argument("workdir", metavar="W", help="folder of a run")
    parser.add_argument("steps", nargs="*", metavar="STEP", help="steps of the recipe; else all")
    parser.add_argument("--verify", action="store_true", help="reads every byte")


def run(arguments, rest) -> None:
    """Prints them.

    Raises:
      UserError: a sealed one has changed, or a step has none that is good.
    """
    directory, problems = Path(arguments.workdir), []
    if not directory.is_dir():
        raise UserError(f"{directory} does not exist; give the folder of a run")
    config, _ = info.read(directory / "config.json")
    trained = info.names(directory, config)
    trained = [name for name in trained if (directory / name / "checkpoints").is_dir()]
    if unknown := [name for name in arguments.steps if name not in trained]:
        raise UserError(f"{unknown[0]} has no checkpoints in {directory}; {_choice(trained)}")
    if not trained:
        raise UserError(f"{directory} has no checkpoints; {_choice(trained)}")
    for name in arguments.steps or trained:
        settings = info.section(info.section(config, name), "train")
        problems += show(directory / name / "checkpoints", settings, verify=arguments.verify)
    if problems:
        more = f"; and {len(problems) - 1} more above" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{more}; a run passes over it, or put a copy back")


def _choice(trained: list[str]) -> str:
    return f"those with some are {', '.join(trained)}" if trained else "train a step first"


def show(directory: Path, settings: dict, *, verify: bool) -> list[str]:
    """Prints the checkpoints in a directory; returns what is wrong with it, a line each."""
    from dlc_jax.checkpoint import arrays, seal
    from dlc_jax.checkpoint.retention import Retention

    remote.fetch(directory, whole=True)
    fields = {"keep": int, "keep_period": int, "keep_best": str}  # a damaged file may hold anything
    fields = {name: info.section(settings, name, kind) for name, kind in fields.items()}
    retention = Retention(**{name: value for name, value in fields.items() if value})
    steps = seal.steps(directory)
    sealed = [step for step in steps if seal.path_of(directory, step).exists()]
    measured = {step: arrays.metrics_of(directory / str(step)) for step in steps}
    kept = retention.reasons(sealed, measured.__getitem__)
    states = {step: state(directory, step, verify=verify) for step in steps}
    if not sealed:  # a run takes the newest complete one, and seals it
        states |= {step: [UNSEALED] for step in steps if not seal.incomplete(directory / str(step))}
    good = [step for step in steps if states[step][0] in (GOOD, UNSEALED)]
    newest = f"the newest good one is of step {good[0]}" if good else "none is good"
    print(f"{directory}, {info.size(directory)}: {newest if steps else 'nothing is saved yet'}")
    for step in steps:
        path = directory / str(step)
        why = f"kept as {', '.join(kept[step])}" if step in kept else ""
        facts = (f"{step}", info.size(path), saved(path), states[step][0], why)
        print("  " + "  ".join(fact for fact in facts if fact))
        lines = states[step][1:]
        if measured[step]:
            pairs = measured[step].items()
            lines.append(", ".join(f"{key} {number(value)}" for key, value in pairs))
        for line in lines:
            print(textwrap.fill(line, 100, initial_indent="    ", subsequent_indent="    "))
    for path in sorted(path for path in directory.glob("*.damaged*") if path.is_dir()):
        print(f"  {path.name}  {info.size(path)}  set aside, damaged")
    changed = [step for step in sealed if states[step] != [GOOD]]
    problems = [f"{directory / str(step)}: {states[step][0]}" for step in changed]
    if steps and not good and not changed:
        problems.append(f"{directory}: none of {len(steps)} checkpoints is good")
    return problems


def state(directory: Path, step: int, *, verify: bool) -> list[str]:
    """[GOOD], or why a run skips this step and the files that differ, a line each."""
    from dlc_jax.checkpoint import seal

    if reason := seal.damage(directory, step):
        return [f"skipped: {reason}"]
    try:
        wrong = seal.changed(directory, step) if verify else []
    except OSError as error:
        return [f"skipped: {error.filename or directory / str(step)}: {error.strerror}"]
    if not wrong:
        return [GOOD]
    differ = "1 file differs" if len(wrong) == 1 else f"{len(wrong)} files differ"
    return [f"skipped: {differ} from what was written", *wrong]


def saved(path: Path) -> str:
    """When the step was written, in local time; "" if it has just been deleted, or of a copy."""
    if remote.is_copy(path):
        return ""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(path.stat().st_mtime))
    except OSError:
        return ""
