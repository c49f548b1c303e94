"""A save that fails stops the run, soon, in every process, and the checkpoints before it stay."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import jax.numpy as jnp
import pytest

from dlc_jax.checkpoint import Checkpoints, seal
from dlc_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[1]

TRAINING = """
import dataclasses, os, sys, time
import jax
from throwaway import Numbers, coupled
from dlc_jax import command, parallel
from dlc_jax.checkpoint import clearing, seal
from dlc_jax.train import train

sealed, seal_step = [], seal.seal

def failing(directory, step, meeting=None):
    if step == 4:
        sealed.append(step)
        raise OSError(28, os.strerror(28))
    return seal_step(directory, step, meeting)

class Slow(Numbers):
    def __next__(self):
        for _ in range(200 * bool(self.next >= 32)):  # what follows step 4: until the save failed
            if sealed:
                break
            time.sleep(0.05)
        time.sleep(0.2)
        print("batch", self.next // 8 + 1, flush=True)
        return super().__next__()

def run():
    usual = coupled(steps=40, save_every=4, keep=3)

    def batches(split, rows=None):
        return Slow(8) if split == "train" else usual.batches(split, rows)

    stage = dataclasses.replace(usual, batches=batches)
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    train(stage, sys.argv[1], mesh=mesh, seed=0, name="tried")

if sys.argv[2:]:
    seal.seal = failing
sys.exit(command.outcome(run, alone=True))
"""


def test_a_failed_background_save_stops_the_run_within_two_steps(tmp_path):
    """Not only at the next save, here four steps later."""
    contracts = ROOT / "tests" / "contracts"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(contracts)])}
    command = [sys.executable, "-c", TRAINING, str(tmp_path), "fail"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    line = f"dlc_jax: the checkpoint of step 4 could not be written under {tmp_path}/checkpoints: "
    assert done.returncode == 2 and done.stderr.startswith(line), done.stderr
    assert "No space left on device" in done.stderr and done.stderr.count("\n") == 1
    assert done.stdout.split()[-1] in ("5", "6"), done.stdout
    assert Checkpoints(tmp_path / "checkpoints").latest() == 0  # of before the first step


def test_check_waits_for_nobody(tmp_path, monkeypatch):
    def slow(directory, step, meeting):
        time.sleep(1)
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(seal, "seal", slow)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.check()
    checkpoints.save(1, {"a": jnp.ones(3)}, None, {"identity": {}})
    started = time.monotonic()
    checkpoints.check()
    assert time.monotonic() - started < 0.5
    time.sleep(1.5)
    with pytest.raises(UserError, match="step 1 could not be written"):
        checkpoints.check()
    checkpoints.close()


SEVERAL = """
import json, pathlib, resource, sys, time
import jax, numpy as np
from dlc_jax import checkpoint, parallel
from dlc_jax.checkpoint import clearing, seal
from dlc_jax.hosts import agreement, cluster

cluster.join()
directory, kind, me = pathlib.Path(sys.argv[1]), sys.argv[2], jax.process_index()
mesh = parallel.make_mesh()
place = jax.sharding.NamedSharding(mesh, parallel.BATCH)
values = np.random.default_rng(0).normal(size=(2, 2**16)).astype(np.float32)
w = jax.make_array_from_callback(values.shape, place, lambda index: values[index])
checkpoints = checkpoint.Checkpoints(directory)
checkpoints.save(1, {"params": {"w": w}}, None, {"identity": {}})
checkpoints.wait()

def broken(*arguments, **options):
    raise kinds[kind]

kinds = {"hash": OSError(28, "No space left on device"), "code": ValueError("a mistake")}
kinds["prune"] = OSError(30, "Read-only file system")
if me == 1 and kind == "write":
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
elif me == 1 and kind in ("hash", "code"):
    seal.checksum.of_files = broken
elif me == 0 and kind == "prune":
    clearing.prune = broken
started = time.monotonic()
try:
    checkpoints.save(2, {"params": {"w": w}}, None, {"identity": {}})
    while time.monotonic() - started < 60:
        checkpoints.check()
        time.sleep(0.01)
    said = "nothing"
except Exception as error:
    said = f"{type(error).__name__}: {error}"
seconds = time.monotonic() - started
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
checkpoints.close()
print(json.dumps([said, seconds]), flush=True)
agreement.meet("end")
"""
SEVERAL = SEVERAL.replace(
    "def broken", "original = checkpoint.seal.checksum.of_files\n\ndef broken"
)


@pytest.mark.parametrize("kind", ["write", "hash", "prune", "code"])
def test_what_fails_in_one_process_fails_in_both_with_the_same_line(tmp_path, kind):
    """A background write, the hashing, what process 0 does alone, and a mistake in the code."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    usual = os.environ | {
        "XLA_FLAGS": "",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
    }
    command, pipe = [sys.executable, "-c", SEVERAL, str(tmp_path), kind], subprocess.PIPE
    started = [
        subprocess.Popen(
            command, env=usual | {"JAX_PROCESS_ID": str(p)}, stdout=pipe, stderr=pipe, text=True
        )
        for p in range(2)
    ]
    ended = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], ended
    (one, first), (two, second) = (json.loads(out.splitlines()[-1]) for out, _ in ended)
    assert max(first, second) < 30, (first, second)
    if kind == "code":
        assert "RuntimeError: step 2 could not be saved by process 1: ValueError: a mis" in one
        assert two == "ValueError: a mistake"
    else:
        reason = {"write": "File too large", "hash": "No space left", "prune": "Read-only file"}
        who = 0 if kind == "prune" else 1
        assert one == two and f"by process {who}: {reason[kind]}" in one, (one, two)
        assert one.startswith("UserError: the checkpoint of step 2 could not be written under ")
    assert seal.damage(tmp_path, 1) is None and seal.altered(tmp_path, 1) is None
    assert Checkpoints(tmp_path).latest() == (2 if kind == "prune" else 1)
