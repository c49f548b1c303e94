"""python -m dlc_jax.main --config=configs/quickstart.py [--workdir=DIR]: runs the steps of a recipe in order, each resumed or skipped.

Exit codes: 0 complete, 2 a mistake of the user (one line says which), 75 stopped, saved and resumable.
"""

import sys
import time
from pathlib import Path

from absl import flags, logging
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


def _sentence(error: Exception) -> str:
    """What an error of the flag libraries says, in one line: a reason may stand at the end of a traceback that they print."""
    text = (
        str(error.args[-1] if error.args else error).replace("\\n", "\n").replace("\\'", "'")
    )  # some pass on the repr of another
    lines = [line.strip() for line in text.replace("''", "'").splitlines() if line.strip()]
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}"
    if any(line.startswith("Traceback") for line in lines):
        return lines[-1].partition(": ")[2] or lines[-1]
    return " ".join(lines) or type(error).__name__


def run(config, workdir: Path) -> None:
    """Runs every step of `config.steps`, then writes results.json and report.html.

    Raises:
      UserError, Interrupted: see errors.py; what is complete stays complete.
    """
    from dlc_jax import metrics, parallel, report, train
    from dlc_jax import workdir as home
    from dlc_jax.stage import Stage
    from dlc_jax.stages import STAGES

    unknown = [name for name in config.steps if name not in config or config[name].stage not in STAGES]
    if unknown:
        raise UserError(f"config.steps names {unknown[0]!r}, which is no section with a stage of {', '.join(STAGES)}")
    mesh = parallel.make_mesh(**config.mesh)
    with home.lock(workdir):
        home.remember(workdir, config.to_dict())
        for name in config.steps:
            made = STAGES[config[name].stage](config, step=name, workdir=workdir)
            directory, started = workdir / name, time.monotonic()
            need = made.plan.steps if isinstance(made, Stage) else 0
            done = home.done(directory)
            if done is not None and done.get("steps", 0) >= need:
                print(f"{name}: complete", flush=True)
                continue
            directory.mkdir(parents=True, exist_ok=True)
            if isinstance(made, Stage):
                found = train.train(made, directory, mesh=mesh, seed=config.seed, name=name)
                found = {f"{name}/{key}": value for key, value in found.items()}
            else:
                print(f"{name} ...", flush=True)
                found = dict(made.run(mesh, directory))
            found[f"seconds/{name}"] = home.seconds(directory, time.monotonic() - started)
            home.merge_results(workdir, found)
            home.mark_done(directory, {"steps": need})
            home.merge_results(workdir, {"peak_memory_gb": metrics.peak_memory_gb()})
        home.total_seconds(workdir)
        report.write(workdir, workdir / "report.html")
    print(f"wrote {workdir}/results.json and {workdir}/report.html", flush=True)


def main(argv: list[str] | None = None) -> int:
    logging.set_verbosity(logging.ERROR)
    try:
        run(*parse(sys.argv if argv is None else argv))
    except UserError as error:
        print(f"dlc_jax: {error}", file=sys.stderr)
        return 2
    except Interrupted as stopped:
        print(f"dlc_jax: {stopped}", file=sys.stderr)
        return 75
    return 0


if __name__ == "__main__":
    sys.exit(main())
