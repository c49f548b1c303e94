"""python -m dlc_jax.main --config=configs/quickstart.py [--workdir=DIR]: runs a recipe's steps.

In order, each resumed or skipped. The workdir may be the URL of a folder in an object store, gs://…
or s3://…. This may be one of several processes, each with devices of its own, that share the
workdir: on a TPU pod, under Kubernetes, SLURM or Open MPI, or with --coordinator, --processes and
--process; see `hosts.cluster`. Process 0 says what happens.

Exit codes: 0 complete, 2 a mistake of the user (one line says which), 75 stopped, saved and
resumable.
"""

import dataclasses
import functools
import os
import sys
import time
from pathlib import Path

from dlc_jax import command, memory, remote, stop


def run(config, workdir: str | Path) -> None:
    """Runs every step of `config.steps`, then writes results.json and report.html.

    Args:
      workdir: a folder, or the URL of one in an object store.

    Raises:
      UserError, Interrupted: see errors.py; what is complete stays complete.
    """
    stop.promise("what is complete is kept, the same command goes on")
    from dlc_jax import recipe
    from dlc_jax import workdir as home
    from dlc_jax.hosts import cluster

    recipe.check(config)  # what can be refused before seconds are spent on jax
    place, workdir = workdir, remote.local(workdir)
    home.check(workdir, alone=not cluster.may_be_several())
    cluster.join()
    import jax

    from dlc_jax import agenda, metrics, parallel, report, train
    from dlc_jax.hosts import likeness, sharing
    from dlc_jax.networks.start import warm_start
    from dlc_jax.stage import Stage

    likeness.check_alike("workdir", {"url": remote.url_of(workdir)})
    likeness.check_alike("version", metrics.versions() | {"commit": home.commit()})
    likeness.check_alike(
        "config", home.lasting(config.to_dict(), (r"data\.(path|data_dir|cache)",))
    )
    say = functools.partial(print, flush=True) if jax.process_index() == 0 else lambda line: None
    mesh = parallel.make_mesh(**config.mesh)
    made = agenda.make(config, workdir, mesh)
    with home.lock(workdir):
        sharing.check_shared(workdir)
        sharing.share(workdir, "locked")
        entries = agenda.read(config, workdir, made)
        operational = agenda.operational(made)
        home.remember(workdir, config.to_dict(), operational, present=recipe.read_back)
        # Before any step is marked as complete: all have read the same.
        sharing.share(workdir, "agenda")
        for entry in entries:
            if entry.skip:
                say(f"{entry.name}: {entry.skip}")
                continue
            step, name, started = entry.step, entry.name, time.monotonic()
            directory = workdir / name
            directory.mkdir(parents=True, exist_ok=True)
            if isinstance(step, Stage):
                step = dataclasses.replace(step, identity={**step.identity, **step.reads()})
                log = {**config.log, "about": config.to_dict()} if "log" in config else {}
                start = functools.partial(warm_start, kind=config[name].stage)
                with memory.during(name, step, config[name], mesh=mesh, workdir=workdir):
                    how = {"seed": config.seed, "name": name, "log": log, "start": start}
                    found = train.train(step, directory, mesh=mesh, **how)
                found = {f"{name}/{key}": value for key, value in found.items()}
            else:
                say(f"{name} ...")
                with memory.during(name, step, config[name], mesh=mesh, workdir=workdir):
                    found = dict(step.run(mesh, directory))
            found[f"seconds/{name}"] = home.seconds(directory, time.monotonic() - started)
            home.merge_results(workdir, found)
            home.mark_done(directory, entry.facts)
            about = {"peak_memory_gb": metrics.peak_memory_gb(), "device": metrics.device()}
            about |= {"commit": home.commit()}
            home.merge_results(workdir, {name: value for name, value in about.items() if value})
            sharing.share(workdir, f"{name}: complete")
            stop.check()
        home.total_seconds(workdir)
        if jax.process_index() == 0:
            report.write(workdir, workdir / "report.html")
        sharing.share(workdir, "report")
        cluster.leave()
    say(f"wrote {place}/results.json and {place}/report.html")


def start(argv: list[str]) -> None:
    """Runs what a command line says; its flags of several processes become JAX's variables."""
    from absl import logging  # when signals are heard

    logging.set_verbosity(logging.ERROR)
    config, workdir = command.parse(argv)
    os.environ.update(command.processes(argv))
    run(config, workdir)


def main(argv: list[str] | None = None) -> int:
    """The exit code; without `argv` the command is this process's own."""
    if argv is None:
        memory.reserve()

    line = sys.argv if argv is None else argv
    return command.outcome(lambda: start(line), alone=argv is None)


if __name__ == "__main__":
    sys.exit(main())
