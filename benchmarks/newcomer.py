"""How long a newcomer waits, from a clone: to a composed picture, a trained quickstart, a stage.

    python benchmarks/newcomer.py [picture] [trained] [stage]       all three if none is named
    python benchmarks/newcomer.py stage --no-install                with this Python, to try it

Each path begins with a fresh clone of this repository, as it is committed, and with an environment
of its own; only the cache of downloaded packages is shared. Nothing else should run on the machine.
The stage is that of docs/extending.md, copied from the page by a fast reader. Prints a markdown
table, and exits with 1 if a command failed.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "picture": ["dlc compose --demo"],
    "trained": ["python -m dlc_jax.main --config=configs/quickstart.py"],
    "stage": ["python -m pytest -n 0 tests/test_average.py"],
}
BLOCK = re.compile(r'^```(python|diff) title="(.*?)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def write_stage(clone: Path) -> None:
    """The files of the walk "Add a stage"."""
    page = (clone / "docs" / "extending.md").read_text()
    walk = page.partition("## Add a stage\n")[2].partition("\n## ")[0]
    for kind, name, text in BLOCK.findall(walk):
        path = clone / name
        if kind == "python":
            path.write_text(text)
            continue
        lines = [line or " " for line in text.splitlines()]
        before, after = (
            "\n".join(line[1:] for line in lines if line[0] in marks) for marks in (" -", " +")
        )
        path.write_text(path.read_text().replace(before, after))


def steps(name: str, clone: Path, install: bool) -> Iterator[tuple[str, float]]:
    """(what was done, seconds) of a path.

    Raises:
      CalledProcessError: a command failed; what it printed is above.
    """
    usual = {"DLC_VENV": "", "PYTHONPATH": "" if install else str(clone)}
    environment = {key: text for key, text in (os.environ | usual).items() if text}
    if not install:
        environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def timed(what: str, words: list[str], cwd: Path) -> tuple[str, float]:
        start = time.perf_counter()
        subprocess.run(words, cwd=cwd, env=environment, check=True, stdout=sys.stderr)
        return what, time.perf_counter() - start

    yield timed("git clone", ["git", "clone", "--quiet", str(ROOT), str(clone)], clone.parent)
    prefix = ["./launch/local.sh"] if install else []
    if install:
        yield timed("./launch/local.sh true", [*prefix, "true"], clone)
    if name == "stage":
        write_stage(clone)
    for command in COMMANDS[name]:
        words = command.split()
        if not install and words[0] == "dlc":  # an installed one is of another checkout
            words = ["python", "-m", "dlc_jax.cli", *words[1:]]
        yield timed(command, [*prefix, *words], clone)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", metavar="PATH", help=", ".join(COMMANDS))
    parser.add_argument("--no-install", action="store_true", help="use this Python's packages")
    arguments = parser.parse_args()
    if unknown := set(arguments.paths) - COMMANDS.keys():
        parser.error(f"unknown path {', '.join(unknown)}; known: {', '.join(COMMANDS)}")
    print("| path | step | seconds |\n|---|---|---:|", flush=True)
    failed = False
    for name in arguments.paths or COMMANDS:
        with tempfile.TemporaryDirectory(prefix="newcomer_") as folder:
            whole = 0.0
            try:
                for what, seconds in steps(
                    name, Path(folder) / "dlc_jax", not arguments.no_install
                ):
                    whole += seconds
                    print(f"| {name} | `{what}` | {seconds:.1f} |", flush=True)
                print(f"| **{name}** | from the clone to the end | **{whole:.1f}** |", flush=True)
            except subprocess.CalledProcessError as error:
                failed = True
                print(f"| {name} | `{' '.join(error.cmd)}` | failed, {error.returncode} |")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
