"""The command line: --config=FILE.py[:VARIANT] --config.NAME=VALUE --workdir=DIR, and what is wrong with it in one line."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from dlc_jax.errors import Interrupted, UserError

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Recipe, with an optional variant: configs/quickstart.py:ablation.", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "Where everything is written; runs/<recipe> by default.")


def parse(argv: list[str]):
    """(config, workdir) of a command line.

    Raises:
      UserError: no recipe, an unknown one, an unknown or mistyped field.
    """
    try:
        rest = flags.FLAGS(argv)[1:]
        if CONFIG.value is not None:
            CONFIG.value.steps  # noqa: B018, a recipe that did not load says so only when it is touched
    except Exception as error:  # the flag libraries raise every type there is; each is about the command line
        raise UserError(f"command line: {_sentence(error)}") from error
    if CONFIG.value is None:
        raise UserError("no recipe: give --config=configs/quickstart.py, or another file of configs/")
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}: fields are set as --config.NAME=VALUE")
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    return CONFIG.value, Path(WORKDIR.value or Path("runs") / Path(path).stem)


def given(arguments) -> list[str]:
    """An argv for `parse` of the `config` and `workdir` that an argparse parser has read."""
    return ["dlc", *(f"--{name}={getattr(arguments, name)}" for name in ("config", "workdir") if getattr(arguments, name, None))]


def outcome(run: Callable[[], int | None]) -> int:
    """Runs a command to its exit code: 0 (or its own) complete, 2 a mistake of the user, 75 stopped, saved and resumable."""
    try:
        return run() or 0
    except UserError as error:
        print(f"dlc_jax: {error}", file=sys.stderr)
        return 2
    except Interrupted as stopped:
        print(f"dlc_jax: {stopped}", file=sys.stderr)
        return 75


def _sentence(error: Exception) -> str:
    """What an error of the flag libraries says, in one line: they print paths that were tried, tracebacks and reprs around it."""
    text = str(error.args[-1] if error.args else error)
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, KeyError | AttributeError):
        field, meant = re.search(r"[^\W_][\w.]*", text), re.search(r'Did you mean "(\w+)"', text)
        return f"unknown field {field[0]!r}" + (f"; did you mean {meant[1]!r}?" if meant else "")
    if isinstance(error, OSError):
        return f"{lines[-1].rpartition('] ')[2]}; recipes are in configs/"
    if any(line.startswith("Traceback") for line in lines):
        return lines[-1].partition(": ")[2] or lines[-1]
    return " ".join(lines)
