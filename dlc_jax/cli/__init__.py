"""The `dlc` command: `dlc VERB …`, one file a verb.

A verb's module has a docstring, whose first line is the verb's help, and

    EXAMPLE           a command line that shows it
    arguments         (argparse parser) -> None, adds what the verb takes
    run               (parsed arguments, rest) -> None or an exit code; `rest` is what argparse did
                      not know: --config and its fields

A verb is imported when it is called: `dlc --help` is quick, and `dlc plan` can set up its compilers
before jax is loaded.
"""

import argparse
import contextlib
import importlib
import io
import keyword
import os
import sys

from dlc_jax import command, remote, workdir
from dlc_jax.errors import UserError

# verb -> (what it does, whether it takes a recipe: --config=FILE --config.NAME=VALUE)
VERBS = {
    "plan": (
        "compile a recipe for a machine that is not here: does it fit, how long is a step?",
        True,
    ),
    "config": ("a recipe's own lines, or with --all every field of it", True),
    "train": ("run the steps of a recipe, each resumed or skipped", True),
    "info": ("what a workdir holds: how far each step is, sizes, metrics, versions", False),
    "profile": ("a few training steps of a run under the profiler: where their time goes", False),
    "checkpoints": ("the checkpoints of a run: which are good, and why they are kept", False),
    "codes": ("the codes of a run: what there is, and whether any byte has changed", False),
    "probe": ("what the codes and features of a run know of its images, and their health", False),
    "sample": ("draw new images from a run", True),
    "evaluate": ("FID and other metrics of images, or of a run at several guidance scales", True),
    "encode": ("write down the codes of images", False),
    "likelihood": ("how likely images are to a run's prior, in bits of their codes", False),
    "compose": ("draw images that have something of each of several images", True),
    "demo": ("a page to play with: pick or drop images, mix their codes, see the children", False),
    "positions": ("what each position of the codes says, as a picture and as named groups", False),
    "import": ("weights of other programs: the published DLC, DINOv2, DiT, autoencoders", True),
    "export": (
        "networks for other programs: PyTorch, diffusers, StableHLO, published names",
        False,
    ),
    "data": ("look at a place of images, or convert it to ArrayRecord shards", False),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")


class _Shown(io.TextIOBase):
    """Writes URLs in place of the paths of their local copies."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text):
        return self._stream.write(remote.shown(text))

    def flush(self):
        self._stream.flush()

    def isatty(self):
        return self._stream.isatty()


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 done, 1 as the verb says, 2 a mistake of the user, 75 stopped and saved.

    Without `argv` the command is this process's own.
    """
    try:
        given = sys.argv[1:] if argv is None else argv
        code = command.outcome(lambda: _run(given), alone=argv is None)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, such as `| head`, has seen enough
        # or Python complains at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _run(argv: list[str]) -> int | None:
    parser = _Parser(prog="dlc", description="Discrete Latent Codes: train, look, sample, compose.")
    parser.add_argument("--version", action="store_true", help="the version of this package")
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help="one of the verbs below")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="…", help="dlc VERB --help tells")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "verbs:\n" + "\n".join(
        f"  {verb:<11} {what}" for verb, (what, _) in VERBS.items()
    )
    if argv == ["--version"]:
        from importlib import metadata  # slow to import, and seldom asked

        print(f"dlc_jax {metadata.version('dlc_jax')}")
        return None
    verb = parser.parse_args(argv).verb
    what, recipe = VERBS[verb]
    # a keyword of Python cannot name a module that is imported
    module = importlib.import_module(f"dlc_jax.cli.{verb}{'_' * keyword.iskeyword(verb)}")
    inner = _Parser(
        prog=f"dlc {verb}",
        description=what[0].upper() + what[1:],
        epilog=f"example:\n  {module.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.arguments(inner)
    arguments, rest = inner.parse_known_args(argv[1:])
    if rest and not recipe:
        raise UserError(f"dlc {verb}: unexpected argument {rest[0]!r}; see dlc {verb} --help")
    if verb != "train" and getattr(arguments, "workdir", None):
        is_url = remote.is_url(arguments.workdir)
        arguments.workdir = str(workdir.locate(arguments.workdir))
        if not is_url:
            return module.run(arguments, rest)
        with contextlib.redirect_stdout(_Shown(sys.stdout)):
            return module.run(arguments, rest)
    return module.run(arguments, rest)
