"""Whole commands on a workdir in an object store: killed, in two processes, and looked at."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from buckets import bucket
from commands import ROOT
from test_several import ended, job, losses, until

from dlc_jax.data.codes import CodeStore
from dlc_jax.remote.store import Store
from dlc_jax.workdir import DEMO

KINDS = ("form", "ground", "tint")  # of the demo's crops, whose names are no news


def dlc(*words):
    line = [sys.executable, "-m", "dlc_jax.cli", *words]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=200)


def kinds(workdir):
    """Kinds of files of the two steps, with N for every number and hash in their names."""
    paths = [path for step in ("encoder", "codes") for path in (workdir / step).rglob("*")]
    names = [
        path.relative_to(workdir).as_posix().split("/state/")[0]
        for path in paths
        if path.is_file() and "tensorboard" not in path.parts
    ]
    return {re.sub(r"\d+|[0-9a-f]{32}", "N", name) for name in names}


def downloaded(url, folder):
    store = Store(url)
    store.get(list(store.versions()), folder)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_in_a_store_give_what_one_gives_in_a_folder(
    quickstart, tmp_path, monkeypatch
):
    """With one killed on the way; the store holds all that the folder holds."""
    monkeypatch.setenv("DLC_SCRATCH", str(tmp_path / "scratch"))
    recipe, folder = "tiny,encoder,codes", quickstart / "run"
    with bucket("gs") as (url, _):
        url += "/runs/W"
        processes = job(url, 2, recipe=recipe)
        until(processes[0], "encoder 8")
        processes[1].kill()
        codes, said = ended(processes)
        assert codes == [75, -9] and "dlc_jax: process 1 of 2 was killed" in said
        left = Store(url).versions()
        assert any(name.endswith(".sha256.json") for name in left)
        codes, said = ended(job(url, 2, recipe=recipe))
        assert codes == [0, 0], said
        there = downloaded(url, tmp_path / "there")
        listed = dlc("checkpoints", url, "--verify")
        shown, verified = dlc("info", url), dlc("codes", "verify", url)
    assert losses(there, "encoder") == pytest.approx(losses(folder, "encoder"), rel=1e-5)
    for split in ("train", "validation"):
        stores = [CodeStore(place / "codes" / split).codes() for place in (folder, there)]
        assert (stores[0] != stores[1]).mean() < 2e-3, split
    assert kinds(there) == kinds(folder)
    assert listed.returncode == 0 and re.search(r"\b24\b.*good", listed.stdout), listed
    assert shown.returncode == 0 and url in shown.stdout, shown
    assert verified.returncode == 0, verified
    assert not [path for path in (tmp_path / "scratch").iterdir() if _is_alive(path)]


def _is_alive(path):
    return os.path.exists(f"/proc/{path.name.split('-')[1]}")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_stopped_in_a_store_it_goes_on_and_a_second_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("DLC_SCRATCH", str(tmp_path / "scratch"))
    longer = "--config.encoder.train.steps=120"  # so that the signal comes before the end
    with bucket("s3") as (url, _):
        url += "/W"
        (first,) = job(url, 1, longer, recipe="tiny,encoder")
        while Store(url).read(".lock") is None:
            time.sleep(0.1)
        (second,) = job(url, 1, longer, recipe="tiny,encoder")
        codes, said = ended([second])
        assert codes == [2] and f"dlc_jax: {url} is in use by process {first.pid} on" in said
        until(first, "encoder 8")
        first.send_signal(signal.SIGTERM)
        codes, said = ended([first])
        assert codes == [75] and "dlc_jax: encoder: stopped at step" in said
        shutil.rmtree(tmp_path / "scratch")
        (third,) = job(url, 1, longer, recipe="tiny,encoder")
        assert ended([third])[0] == [0]
        assert Store(url).read("encoder/done.json") and Store(url).read("report.html")


@pytest.mark.slow
def test_names_of_positions_are_written_into_the_store(tmp_path, monkeypatch):
    """Of a run there, whoever opens it next has them."""
    monkeypatch.setenv("DLC_SCRATCH", str(tmp_path / "scratch"))
    with bucket("s3") as (url, _):
        url += "/runs/W"
        files = [path for path in DEMO.rglob("*") if path.is_file()]
        there = {path.relative_to(DEMO).as_posix(): path.read_bytes() for path in files}
        Store(url).write(there)
        out = ("--out", tmp_path / "positions.png")
        found = dlc("positions", url, "--count", "64", "--pairs", "1", "--clusters", "2", *out)
        assert found.returncode == 0 and f"into {url}/positions.json" in found.stdout, found
        assert Store(url).versions().keys() == there.keys() | {"positions.json"}
        groups = json.loads(Store(url).read("positions.json"))["groups"]
        name = next(name for name in groups if name not in KINDS)
        mixed = dlc(
            "compose", "-w", url, "--count", "1", "--keep", name, "--out", tmp_path / "a.png"
        )
    assert len(groups) == 2 and mixed.returncode == 0, mixed
