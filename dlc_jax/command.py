"""The command line: --config=FILE.py[:VARIANT] --config.NAME=VALUE --workdir=DIR, and what is wrong with it in one line.

--config=W/config.json     is a recipe too: what the run in W was made with; without --workdir it goes on in W
--config.codes=W/codes     is short for --config.codes.path=W/codes: the codes of another run instead of own ones
"""

import errno
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from dlc_jax import stop
from dlc_jax.errors import Interrupted, UserError

# What the system says of a disk that does not take more; with other numbers an OSError is a mistake in the code.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


def parse(argv: list[str]):
    """(config, workdir) of a command line.

    Raises:
      UserError: no recipe, an unknown one, an unknown field, a value of another type.
    """
    from ml_collections import config_flags

    argv, written = _written_down(argv)
    argv, hidden = _hidden_fields(argv)
    values, recipe, workdir = _flags(argv)
    try:
        rest = values(argv)[1:]
        if recipe.value is not None:
            recipe.value.steps  # noqa: B018, a recipe that did not load says so only when it is touched
            _check_tuples(argv, config_flags.get_override_values(values["config"]))
    except Exception as error:  # the flag libraries raise every type there is; each is about the command line
        raise UserError(f"command line: {_sentence(error)}") from error
    if recipe.value is None:
        raise UserError("no recipe: give --config=configs/quickstart.py, or another file of configs/")
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}: fields are set as --config.NAME=VALUE")
    for name, value in hidden.items():
        _set(recipe.value, name, value)
    seed = recipe.value.get("seed", 0)
    if not isinstance(seed, int) or not 0 <= seed < 2**31:  # NumPy takes none below, jax none above
        raise UserError(f"command line: seed={seed} is no whole number from 0 to {2**31 - 1}")
    path = written or Path(config_flags.get_config_filename(values["config"]))
    usual = path.parent if path.name == "config.json" else Path("runs") / path.stem
    return recipe.value, Path(workdir.value or usual)


def given(arguments) -> list[str]:
    """An argv for `parse` of the `config` and `workdir` that an argparse parser has read."""
    return ["dlc", *(f"--{name}={getattr(arguments, name)}" for name in ("config", "workdir") if getattr(arguments, name, None))]


def outcome(run: Callable[[], int | None], *, alone: bool = False) -> int:
    """Runs a command to its exit code: 0 (or its own) complete, 2 a mistake of the user, 75 stopped, saved and resumable.

    One of several processes that fails ends here and now: the usual end would wait for the others, and they for this one.

    Args:
      alone: this process is this command and nothing else, so that signals end it; see stop.py.
    """
    if alone:
        stop.listen()
    try:
        code, line = _outcome(run)
        stop.done()
        if line:
            print(f"dlc_jax: {line}", file=sys.stderr)
    except BaseException:
        if not _several():
            raise
        traceback.print_exc()
        code = 1
    if code and _several():
        if not sys.modules["jax"].process_index():
            time.sleep(2)  # its end is the end of all: a mistake that all make, all may say
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _several() -> bool:
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def _outcome(run: Callable[[], int | None]) -> tuple[int, str]:
    """(exit code, what is to be said)."""
    try:
        return run() or 0, ""
    except UserError as error:
        return 2, str(error)
    except Interrupted as stopped:
        return stop.CODE, str(stopped)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        return 2, f"{error.filename or 'a file'}: {error.strerror}; make room, then run the same command"


def _written_down(argv: list[str]) -> tuple[list[str], Path | None]:
    """(argv, path) with --config=PATH.json put as a recipe of recipe.py, which reads it; the path is None if there is none."""
    joined, found = argv[:1], None
    for argument in argv[1:]:
        if joined[-1] in ("--config", "-config"):  # --config PATH is --config=PATH
            argument = f"--config={argument}"
            joined.pop()
        argument = re.sub(r"^-{1,2}config(\.codes)?=", r"--config\1=", argument)
        if argument.startswith("--config=") and argument.endswith(".json"):
            found = Path(argument.partition("=")[2])
            argument = f"--config={Path(__file__).with_name('recipe.py')}:{found}"
        elif argument.startswith("--config=") and not argument.partition("=")[2].partition(":")[0].endswith(".py"):
            raise UserError(f"{argument[9:]!r} is no recipe: one is a .py file of configs/, or the config.json of a run")
        elif argument.startswith("--config.codes=") and not argument.startswith("--config.codes={"):
            argument = argument.replace("codes=", "codes.path=", 1)
        joined.append(argument)
    return joined, found


def _hidden_fields(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """(argv without them, {name: value}) of the fields called `values`: the flag library finds a method of that name first."""
    found = {}
    for argument in argv:
        if match := re.fullmatch(r"-{1,2}config\.((?:\w+\.)+values)=(.*)", argument):
            found[match[1]] = match[2]
    return [argument for argument in argv if not re.match(r"-{1,2}config\.(?:\w+\.)+values=", argument)], found


def _set(config, name: str, value: str) -> None:
    """Sets an integer field by its dotted name."""
    *path, last = name.split(".")
    for part in path:
        if part not in config:
            raise UserError(f"command line: unknown field {name!r}")
        config = config[part]
    if last not in config:
        raise UserError(f"command line: unknown field {name!r}")
    try:
        config[last] = int(value)
    except ValueError:
        raise UserError(f"command line: {name}={value!r} is not a whole number") from None


def _flags(argv: list[str]):
    """(flags, that of the recipe, that of the workdir) of one command line: a second one in the same process starts afresh."""
    from absl import flags  # after whoever calls listens to signals
    from ml_collections import config_flags

    values = flags.FlagValues()
    recipe = config_flags.DEFINE_config_file("config", None, "Recipe.", flag_values=values, lock_config=True, sys_argv=argv)
    return values, recipe, flags.DEFINE_string("workdir", None, "Where everything is written.", flag_values=values)


def _check_tuples(argv: list[str], given: dict) -> None:
    """Refuses tuples of other types than the recipe's, or as many numbers as it does not have: the flag takes any."""
    tuples = {name: value for name, value in given.items() if isinstance(value, tuple)}
    if not tuples:
        return
    alone = [argv[0], *(argument for argument in argv if argument.startswith("--config="))]
    values, recipe, _ = _flags(alone)
    values(alone)
    for name, value in tuples.items():
        usual = recipe.value
        for field in name.split("."):
            usual = usual[field]
        if not _like(value, usual):
            raise ValueError(f"{name}={value} is not of the kind of {usual}, which the recipe has")


def _like(value, usual) -> bool:
    """Whether a value could stand for the usual one: numbers as many, words or rows any number; of an empty tuple nothing is known."""
    if not isinstance(usual, tuple):
        return isinstance(value, (int, float) if isinstance(usual, int | float) else str)
    if not usual:
        return True
    if not isinstance(value, tuple):
        return False
    if all(isinstance(entry, (str, tuple)) for entry in usual):
        return all(_like(entry, usual[0]) for entry in value)
    return len(value) == len(usual) and all(_like(entry, other) for entry, other in zip(value, usual))


def _sentence(error: Exception) -> str:
    """What an error of the flag libraries says, in one line: they print paths that were tried, tracebacks and reprs around it."""
    text = str(error.args[-1] if error.args else error)
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, KeyError | AttributeError):
        field, meant = re.search(r"[^\W_][\w.]*", text), re.search(r'Did you mean "(\w+)"', text)
        return f"unknown field {field[0]!r}" + (f"; did you mean {meant[1]!r}?" if meant else "")
    if given := re.match(r"flag --config\.(\S+?)=(.*): Failed to parse .* as a ConfigDict", text, re.DOTALL):
        return f"{given[1]} is a section, not {given[2]!r}: set its fields, --config.{given[1]}.NAME=VALUE"
    if isinstance(error, OSError):
        return f"{lines[-1].rpartition('] ')[2]}; recipes are in configs/"
    if any(line.startswith("Traceback") for line in lines):
        return lines[-1].partition(": ")[2] or lines[-1]
    return " ".join(lines)
