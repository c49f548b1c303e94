"""python -m dlc_jax.main --config=configs/quickstart.py [--workdir=DIR]: runs the steps of a recipe in order, each resumed or skipped.

Exit codes: 0 complete, 2 a mistake of the user (one line says which), 75 stopped, saved and resumable.
"""

import sys
import time
from pathlib import Path

from absl import logging

from dlc_jax import command
from dlc_jax.errors import UserError


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
        before: dict[str, int] = {}  # the steps before this one, and how long they were trained
        for name in config.steps:
            made = STAGES[config[name].stage](config, step=name, workdir=workdir)
            directory, started = workdir / name, time.monotonic()
            need = made.plan.steps if isinstance(made, Stage) else 0
            done = home.done(directory)
            # A job is done again when something before it was trained longer since.
            stale = (
                done is not None
                and not need
                and any(done.get("after", {}).get(key, value) != value for key, value in before.items())
            )
            before[name] = need
            if done is not None and done["steps"] >= need and not stale:
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
            home.mark_done(directory, {"steps": need, "after": before})
            home.merge_results(workdir, {"peak_memory_gb": metrics.peak_memory_gb()})
        home.total_seconds(workdir)
        report.write(workdir, workdir / "report.html")
    print(f"wrote {workdir}/results.json and {workdir}/report.html", flush=True)


def main(argv: list[str] | None = None) -> int:
    logging.set_verbosity(logging.ERROR)
    return command.outcome(lambda: run(*command.parse(sys.argv if argv is None else argv)))


if __name__ == "__main__":
    sys.exit(main())
