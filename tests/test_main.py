"""The whole pipeline by its command, small: it runs, it is complete, and killed in any step it ends with the same results."""

import json
import os
import pathlib
import subprocess
import sys
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS = ("encoder", "codes", "probe", "prior", "generator", "samples")


def command(workdir, variant="tiny"):
    # One device: eight simulated ones on two cores only make the run slower.
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    arguments = [sys.executable, "-m", "dlc_jax.main", f"--config=configs/quickstart.py:{variant}", f"--workdir={workdir}"]
    return dict(args=arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def numbers(workdir):
    """Results but for what is measured by a clock."""
    found = json.loads((workdir / "results.json").read_text())
    return {key: value for key, value in found.items() if not key.startswith("seconds/") and key != "peak_memory_gb"}


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("complete")
    done = subprocess.run(**command(workdir), timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return workdir, done.stdout, numbers(workdir)  # noted now: the ablation below adds to the folder


@pytest.mark.slow
def test_results_pictures_and_report(complete):
    workdir, out, _ = complete
    results = json.loads((workdir / "results.json").read_text())
    for key in (
        *(f"probe/{factor}" for factor in ("shape", "color", "background", "size", "count")),
        *(f"reconstruction/{factor}" for factor in ("shape", "color", "background", "size", "count")),
        *(f"reconstruction_held_out/{factor}" for factor in ("shape", "color", "background", "size", "count")),
        *(
            f"unconditional/{key}"
            for key in ("valid", "entropy_shape", "entropy_color", "entropy_background", "held_out", "count")
        ),
        *(f"composition/{factor}_from_parents" for factor in ("shape", "color", "background")),
        *("composition/both_parents", "composition/count", "seconds/total", "peak_memory_gb", "judge/validation_shape"),
        *(f"seconds/{step}" for step in STEPS),
    ):
        assert isinstance(results[key], int | float), key
    for picture in (workdir / "samples" / "pictures").glob("*.png"):
        assert np.asarray(Image.open(picture)).std() > 5, picture
    report = (workdir / "report.html").read_text()
    HTMLParser().feed(report)
    assert report.count("data:image/png;base64,") >= 5 and len(report) < 8_000_000
    assert out.splitlines()[-1] == f"wrote {workdir}/results.json and {workdir}/report.html"


@pytest.mark.slow
def test_the_same_command_again_does_nothing(complete):
    workdir, _, before = complete
    again = subprocess.run(**command(workdir), timeout=120)
    assert again.returncode == 0 and all(f"{step}: complete" in again.stdout for step in STEPS)
    assert numbers(workdir) == before


@pytest.mark.slow
def test_ablation_adds_its_numbers_beside(complete):
    workdir, _, before = complete
    done = subprocess.run(**command(workdir, "tiny_ablation"), timeout=600)
    assert done.returncode == 0, done.stderr
    after = numbers(workdir)
    assert {key: after[key] for key in before} == before
    assert {"without_codes/unconditional/valid", "without_codes/unconditional/count"} <= after.keys()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_in_every_step_ends_with_the_same_results(complete, tmp_path):
    """kill -9 as soon as a step is under way, for each step in turn; then once more to the end."""
    _, _, uninterrupted = complete
    workdir = tmp_path / "killed"
    killed = []
    for step in STEPS:
        process = subprocess.Popen(**command(workdir))
        for line in process.stdout:
            if line.startswith(f"{step} "):  # its first sign of life: a progress line of a stage, or a job's name
                time.sleep(0.3)
                process.kill()
                killed.append(step)
                break
        process.communicate()
        assert process.returncode == -9 or (workdir / step / "done.json").exists(), step
    assert killed == list(STEPS)
    done = subprocess.run(**command(workdir), timeout=600)
    assert done.returncode == 0, done.stderr
    assert numbers(workdir) == uninterrupted
