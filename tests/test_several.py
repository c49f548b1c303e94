"""The whole recipe in two processes, killed and stopped; and 2, then 4, then 1 process."""

import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys

import numpy as np
import pytest
from commands import ROOT

from dlc_jax import parallel
from dlc_jax.data.codes import CodeStore

HERE = pathlib.Path(__file__).parent
start = runpy.run_path(str(ROOT / "launch" / "local_multiprocess.py"))["start"]
CLOSE = 1e-5  # relative
UNEQUAL = ("seconds/", "codes/images_per_s", "peak_memory_gb", "device", "commit")


def job(workdir, n, *words, recipe="tiny"):
    line = [sys.executable, "-m", "dlc_jax.main", f"--config=configs/quickstart.py:{recipe}"]
    usual = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "DLC_HEARTBEAT": "20"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    environment = os.environ | usual | {"XLA_FLAGS": ""}
    return start(n, 1, [*line, f"--workdir={workdir}", *words], environment, **pipe)


def ended(processes, seconds=250):
    """The processes' exit codes, and what the first of them wrote to stderr."""
    said = [process.communicate(timeout=seconds)[1] for process in processes]
    return [process.returncode for process in processes], said[0]


def until(process, word):
    for line in process.stdout:
        if line.startswith(word):
            return
    raise AssertionError(process.stderr.read())


def losses(workdir, step):
    rows = (workdir / step / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["loss"] for row in map(json.loads, rows) if "loss" in row}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_give_the_results_of_one_also_when_killed_and_stopped(quickstart, tmp_path):
    """One is killed while the encoder trains, one is told to stop while the prior does."""
    workdir = tmp_path / "W"
    processes = job(workdir, 2)
    until(processes[0], "encoder 16")
    processes[1].kill()
    codes, said = ended(processes)
    assert codes == [75, -9] and "dlc_jax: process 1 of 2 was killed" in said
    processes = job(workdir, 2)
    until(processes[0], "prior 8")
    processes[1].send_signal(signal.SIGTERM)
    codes, said = ended(processes)
    assert codes == [75, 75] and "dlc_jax: prior: stopped at step" in said
    assert ended(job(workdir, 2))[0] == [0, 0]

    one, two = quickstart / "run", workdir
    for step in ("encoder", "prior", "generator"):
        alone, together = losses(one, step), losses(two, step)
        assert alone.keys() == together.keys()
        for at, loss in alone.items():
            assert together[at] == pytest.approx(loss, rel=CLOSE), (step, at)
    for split in ("train", "validation"):
        stores = [CodeStore(place / "codes" / split).codes() for place in (one, two)]
        assert np.mean(stores[0] != stores[1]) < 2e-3, split  # ties of a network of 24 steps
    results = [json.loads((place / "results.json").read_text()) for place in (one, two)]
    assert results[0].keys() == results[1].keys()
    assert (two / "report.html").exists()
    pictures = [sorted(path.name for path in place.rglob("*.png")) for place in (one, two)]
    assert pictures[0] == pictures[1]


ELASTIC = """
import dataclasses, json, os, pathlib, signal, sys, time
import numpy as np
from throwaway import joint
from dlc_jax import command, parallel
from dlc_jax.data import loader
from dlc_jax.hosts import cluster
from dlc_jax.train import train

class Source:
    def __len__(self):
        return 40
    def __getitem__(self, index):
        return {"x": np.random.default_rng(index).normal(size=8).astype("float32"), "id": index}

class Noted:
    def __init__(self, batches, note):
        self.batches, self.note, self.close = batches, note, batches.close
        self.get_state, self.set_state = batches.get_state, batches.set_state
    def __next__(self):
        batch = next(self.batches)
        self.note(self.get_state()["global_next_index"] // 8, batch["position"], batch.pop("id"))
        return batch

def run():
    cluster.join()
    import jax
    folder, asked, me = pathlib.Path(sys.argv[1]), int(sys.argv[2]), jax.process_index()

    def note(step, position, ids):
        with open(folder / f"ids_{me}", "a") as file:
            print(json.dumps([step, position.tolist(), ids.tolist()]), file=file)
        time.sleep(0.2)  # for the signal to be heard before the run is over
        if step == asked and me == jax.process_count() - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def batches(split, rows=None):
        read = loader.batches(Source(), batch=8, seed=0, rows=rows)
        return Noted(read, note if split == "train" else lambda *_: None)

    stage = dataclasses.replace(joint(steps=16, log_every=1, save_every=100), batches=batches)
    log = {"tensorboard": False}
    train(stage, folder / "W", mesh=parallel.make_mesh(), seed=0, name="tried", log=log)
    cluster.leave()

sys.exit(command.outcome(run, alone=True))
"""


def records(folder):
    """{step: the ids of its records in the order of the global batch}; the last note counts."""
    found = {}
    for path in folder.glob("ids_*"):
        for step, position, ids in map(json.loads, path.read_text().splitlines()):
            found.setdefault(step, {}).update(zip(position, ids, strict=True))
    return {step: [ids[row] for row in sorted(ids)] for step, ids in found.items()}


@pytest.mark.slow
def test_two_then_four_then_one_process_go_on_with_the_same_records(tmp_path):
    path = os.pathsep.join([str(ROOT), str(HERE / "contracts"), str(HERE)])
    environment = os.environ | {"PYTHONPATH": path, "DLC_HEARTBEAT": "20"}

    def run(name, n, asked):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        line = [sys.executable, "-c", ELASTIC, str(folder), str(asked)]
        codes, said = ended(start(n, 1, line, environment, stderr=subprocess.PIPE, text=True), 100)
        return codes, said

    assert run("whole", 1, 0)[0] == [0]
    assert run("parts", 2, 3)[0] == [75, 75]
    assert run("parts", 4, 9)[0] == [75] * 4
    assert run("parts", 1, 0)[0] == [0]
    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    assert records(parts) == records(whole) and len(records(whole)) == 16
    alone, together = losses(whole, "W"), losses(parts, "W")
    assert alone.keys() == together.keys() == set(range(1, 17))
    np.testing.assert_allclose(list(together.values()), list(alone.values()), rtol=CLOSE)


@pytest.mark.parametrize(
    ("topology", "sizes"),
    [("v5e:8x16", (8, 16, 1)), ("v5e:8x16", (2, 16, 4)), ("v5p:4x4x8", (4, 32, 1))],
)
def test_every_row_is_read_where_its_devices_are(topology, sizes):
    """On a torus the hosts interleave on the mesh: v5e 8x16 cuts 32 hosts into 64 blocks."""
    pytest.importorskip("libtpu", reason="compiles for TPUs with the extra tpu")
    from dlc_jax.plan import machine

    devices = machine.find(topology).devices
    data, fsdp, tensor = sizes
    mesh = parallel.make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=devices)
    batch = 2 * data * fsdp
    hosts = sorted({device.process_index for device in devices})
    read = {host: parallel.rows(mesh, batch, process=host) for host in hosts}
    held = {host: set() for host in hosts}
    for index, device in np.ndenumerate(mesh.devices):
        share = index[0] * fsdp + index[1]
        held[device.process_index] |= {2 * share, 2 * share + 1}
    assert {host: set(rows.tolist()) for host, rows in read.items()} == held
    assert all((np.diff(rows) > 0).all() for rows in read.values())
    if sizes == (8, 16, 1):  # so a block of neighbors would have been others' rows
        assert any((np.diff(rows) > 1).any() for rows in read.values())
