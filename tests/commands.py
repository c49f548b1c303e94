"""Commands as a person runs them: in a process of their own, on one device."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def command(*arguments, cwd=ROOT, **environment):
    """What `subprocess.run` takes for `python -m ARGUMENTS`. One device: eight simulated ones on two cores are only slower."""
    usual = {
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": str(ROOT),
    }
    pipe = subprocess.PIPE
    words = [sys.executable, "-m", *map(str, arguments)]
    return dict(
        args=words,
        cwd=cwd,
        env=os.environ | usual | environment,
        stdout=pipe,
        stderr=pipe,
        text=True,
    )


def train(workdir, *fields, recipe="configs/quickstart.py:tiny"):
    """What `subprocess.run` takes for a run of a recipe."""
    return command("dlc_jax.main", f"--config={recipe}", f"--workdir={workdir}", *fields)
