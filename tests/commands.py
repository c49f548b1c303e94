"""Commands as a person runs them: in a process of their own, on one device."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def command(*arguments, cwd=ROOT, **environment):
    """What `subprocess.run` takes for `python -m ARGUMENTS`, on one device.

    Eight simulated devices on two cores are only slower.
    """
    usual = {
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": str(ROOT),
    }
    return dict(
        args=[sys.executable, "-m", *map(str, arguments)],
        cwd=cwd,
        env=os.environ | usual | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train(workdir, *fields, recipe="configs/quickstart.py:tiny"):
    """What `subprocess.run` takes for a run of a recipe."""
    return command("dlc_jax.main", f"--config={recipe}", f"--workdir={workdir}", *fields)
