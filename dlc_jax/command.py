"""The command line: --config=FILE.py[:VARIANT] --config.NAME=VALUE --workdir=DIR, and what is wrong
with it in one line.

--config=W/config.json     is a recipe too: what made the run in W; it continues there without
                           another --workdir
--config.codes=W/codes     is short for --config.codes.path=W/codes: the codes of another run
--coordinator=HOST:PORT --processes=N --process=I
                           this process is one of several, see `hosts.cluster`
"""

import errno
import json
import os
import runpy
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from dlc_jax import memory, remote, stop
from dlc_jax.errors import Interrupted, UserError
from dlc_jax.hosts.cluster import FLAGS, NAMES

PATIENCE = 5  # seconds that an error of one of several processes waits for an explanation
OWN = Path(__file__).with_name("configs")  # the recipes of configs/, which an install has too
# What the system says of a full or read-only disk; other OSErrors are mistakes in the code.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


def parse(argv: list[str]):
    """(config, workdir) of a command line; the config is expanded and locked.

    The workdir is a Path, or the URL of a folder of an object store.

    Raises:
      UserError: no recipe, an unknown one, an unknown field, a value of another type.
    """
    from dlc_jax import recipe

    path, lines, workdir = read_line(argv)
    try:
        config = recipe.expand(lines)
    except UserError as error:
        raise UserError(f"command line: {error}") from error
    if not 0 <= config.seed < 2**31:  # NumPy takes none below, jax none above
        raise UserError(f"command line: seed={config.seed} is not in 0 to {2**31 - 1}")
    usual = path.parent if path.name == "config.json" else Path("runs") / path.stem
    return config, workdir if remote.is_url(workdir) else Path(workdir or usual)


def read_line(argv: list[str]) -> tuple[Path, dict, str | None]:
    """(path of the recipe, its lines with the command line's after them, workdir if given)."""
    from dlc_jax import recipe

    file, workdir, changes = _arguments(argv)
    if file is None:
        raise UserError(
            "no recipe: give --config=configs/quickstart.py, or another file of configs/"
        )
    path, lines = read(file)
    flags = {name: recipe.Text(value) for name, value in changes.items()}
    return path, recipe.later(lines, flags), workdir


def read(file: str) -> tuple[Path, dict]:
    """(path, the recipe's own lines) of FILE.py, FILE.py:VARIANT or a run's config.json.

    A recipe is a file with `RECIPE`, {field: value}, and perhaps `VARIANTS`, {word: more lines, or
    a function of the lines so far that gives more}. `like` names a recipe beside it whose lines
    come first. A variant is words with commas between; the name of a step is one, and runs it
    alone. One of configs/ is found in the package where no such file is: `configs/quickstart.py`
    and, in a recipe's `like`, `quickstart.py` work from any folder.

    Raises:
      UserError: it is not a recipe, or has no such variant.
    """
    from dlc_jax import recipe
    from dlc_jax.recipe import former

    name, is_variant, words = file.partition(".py:")
    path = Path(f"{name}.py" if is_variant else file)
    if path.suffix not in (".py", ".json"):
        raise UserError(
            f"{file!r} is not a recipe; expected a .py file, as in configs/, or a run's config.json"
        )
    if path.parent == Path("configs"):
        path = _or_own(path)
    if not path.is_file():
        raise UserError(f"command line: {path} does not exist; recipes are in configs/")
    if path.suffix == ".json":
        try:
            saved = json.loads(path.read_text())
            if isinstance(saved.get("steps"), list):
                return path, recipe.flat(former.config(saved))
        except (ValueError, AttributeError, KeyError, TypeError, OSError):
            pass
        raise UserError(f"command line: {path} is not a recipe: a run writes one as config.json")
    try:
        module = runpy.run_path(str(path))
        if "RECIPE" not in module:
            raise UserError(f"{path} has no RECIPE, the dict of what it changes: docs/recipes.md")
        lines, variants = dict(module["RECIPE"]), dict(module.get("VARIANTS", {}))
        if base := lines.pop("like", None):
            lines = recipe.later(read(str(_or_own(path.with_name(base))))[1], lines)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a recipe is the user's own code
        said = (str(error).splitlines() or ["it does not load"])[0]
        raise UserError(f"command line: {path}: {type(error).__name__}: {said}") from error
    steps = [*lines.get("steps", ()), *recipe.kinds()]
    chosen = []
    for word in filter(None, words.split(",")):
        if word in variants:
            change = variants[word]
            lines = recipe.later(lines, change(lines) if callable(change) else change)
        elif word in steps:
            chosen.append(word)
        else:
            known = ", ".join(dict.fromkeys([*variants, *steps]))
            raise UserError(f"command line: unknown variant {word!r}; {path} has {known}")
    return path, lines | ({"steps": tuple(chosen)} if chosen else {})


def _or_own(path: Path) -> Path:
    """The package's recipe of that name, with its variant, where `path` is no file."""
    file = path.name.partition(":")[0]
    is_own = (OWN / file).is_file() and not (path.parent / file).is_file()
    return OWN / path.name if is_own else path


def _arguments(argv: list[str]) -> tuple[str | None, str | None, dict[str, str]]:
    """(recipe, workdir, {field: text}) of a command line; `--name VALUE` is `--name=VALUE`."""
    file, workdir, changes = None, None, {}
    for name, value in _pairs(argv):
        if name == "--config":
            file = value
        elif name == "--workdir":
            workdir = value
        elif name not in FLAGS:
            changes[name.removeprefix("--config.")] = value
    return file, workdir, changes


def processes(argv: list[str]) -> dict[str, str]:
    """{variable of JAX: text} of the flags that make this process one of several."""
    return {NAMES[FLAGS.index(name)]: value for name, value in _pairs(argv) if name in FLAGS}


def _pairs(argv: list[str]) -> Iterator[tuple[str, str]]:
    """(--name, value) of every argument."""
    rest = list(argv[1:])
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        name = f"--{name.lstrip('-')}" if name.startswith("-") else name
        known = name in ("--config", "--workdir", *FLAGS) or name.startswith("--config.")
        if not known:
            raise UserError(
                f"command line: unexpected argument {argument!r}; fields are set as "
                "--config.NAME=VALUE, the folder as --workdir=DIR"
            )
        if not equals:
            if not rest:
                raise UserError(f"command line: {name} needs a value, {name}=VALUE")
            value = rest.pop(0)
        yield name, value


def given(arguments) -> list[str]:
    """An argv for `parse` of the `config` and `workdir` that an argparse parser has read."""
    return [
        "dlc",
        *(
            f"--{name}={getattr(arguments, name)}"
            for name in ("config", "workdir")
            if getattr(arguments, name, None)
        ),
    ]


def outcome(run: Callable[[], int | None], *, alone: bool = False) -> int:
    """Runs a command to its exit code.

    0 (or its own): complete; 2: a mistake of the user; 75: stopped, saved and resumable. One of
    several processes that fails ends here and now: the usual end would wait for the others, and
    they for this one.

    Args:
      alone: this process is this command and nothing else, so that signals end it; see stop.py.
    """
    if alone:
        stop.listen()
    text = ""
    try:
        code, line = _outcome(run)
    except BaseException:
        if not _several():
            raise
        # A collective fails where another process has ended, and while this one is being ended:
        # whoever does so knows more, and says it meanwhile.
        time.sleep(PATIENCE)
        code, line = 1, "an error of the program, see what it printed"
        text = traceback.format_exc()
    stop.done()
    text, line = remote.shown(text), remote.shown(line)
    if line:
        print(text or f"dlc_jax: {line}", file=sys.stderr)
    if code and _several():
        stop.tell(code, line)
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
    except remote.Unreachable as error:  # it may pass, so a supervisor tries again
        return stop.CODE, str(error)
    except UserError as error:
        return 2, str(error)
    except Interrupted as stopped:
        return stop.CODE, str(stopped)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        return (
            2,
            f"{error.filename or 'a file'}: {error.strerror}; make room, then run the same command",
        )
    except (MemoryError, RuntimeError) as error:  # jax's own errors are RuntimeErrors
        if line := memory.line(error):
            return 2, line
        raise
