"""The whole pipeline by its command, small: it runs, and it is complete.

Killed in any step it ends with the same results.
"""

import json
import shutil
import subprocess
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from commands import train
from PIL import Image

STEPS = ("encoder", "codes", "probe", "prior", "generator", "samples")
# the first of them waits for a whole pipeline: minutes, where other work keeps the cores busy
pytestmark = pytest.mark.timeout(900)


def numbers(workdir):
    """Results but for what is measured by a clock."""
    found = json.loads((workdir / "results.json").read_text())
    clocked = ("seconds/", "peak_memory_gb", "codes/images_per_s")
    return {key: value for key, value in found.items() if not key.startswith(clocked)}


@pytest.fixture
def complete(quickstart, tmp_path):
    """(workdir, output, results) of a complete run, its own to change."""
    workdir = shutil.copytree(quickstart / "run", tmp_path / "complete")
    return workdir, (quickstart / "out").read_text(), numbers(workdir)


@pytest.mark.slow
def test_results_pictures_and_report(quickstart):
    workdir, out = quickstart / "run", (quickstart / "out").read_text()
    assert (quickstart / "err").read_text() == ""
    results = json.loads((workdir / "results.json").read_text())
    factors = ("shape", "color", "background")
    for key in (
        *(
            f"{group}/{name}"
            for group in ("probe", "reconstruction", "reconstruction_held_out")
            for name in (*factors, "size", "count")
        ),
        *(f"unconditional/{name}" for name in ("valid", "held_out", "count")),
        *(f"unconditional/entropy_{factor}" for factor in factors),
        *(f"composition/{factor}_from_parents" for factor in factors),
        *("composition/both_parents", "composition/count", "judge/validation_shape"),
        *("seconds/total", "peak_memory_gb"),
        *(f"seconds/{step}" for step in STEPS),
    ):
        assert isinstance(results[key], int | float), key
    for picture in (workdir / "samples" / "pictures").glob("*.png"):
        assert np.asarray(Image.open(picture)).std() > 5, picture
    for step in (12, 24):
        picture = Image.open(workdir / "generator" / "pictures" / f"step_{step}.png")
        assert np.asarray(picture).std() > 5
    report = (workdir / "report.html").read_text()
    HTMLParser().feed(report)
    pictures = ("Pictures: samples", "Learning to draw: generator", "Code usage: codes")
    for section in (*pictures, "Curves: prior", "Results", "Time"):
        assert f"<h2>{section}</h2>" in report
    for step in ("encoder", "prior", "generator"):
        text = (workdir / step / "metrics.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        assert {line["step"] for line in lines} == {8, 12, 16, 24}  # log_every 8, validate_every 12
        assert {line["step"] for line in lines if "validation/loss" in line} == {12, 24}
    assert report.count("data:image/png;base64,") >= 5 and len(report) < 8_000_000
    assert out.splitlines()[-1] == f"wrote {workdir}/results.json and {workdir}/report.html"


@pytest.mark.slow
def test_the_same_command_again_does_nothing(complete):
    workdir, _, before = complete
    again = subprocess.run(**train(workdir), timeout=120)
    assert again.returncode == 0 and all(f"{step}: complete" in again.stdout for step in STEPS)
    assert numbers(workdir) == before


@pytest.mark.slow
def test_what_was_run_can_be_run_again_and_with_other_samples(complete, tmp_path):
    """In a copy: its own config.json is the recipe.

    A setting of the samples runs that job again and nothing else.
    """
    workdir = shutil.copytree(complete[0], tmp_path / "copy")
    scale, own = "samples.sampler.guidance.scale", f"{workdir}/config.json"
    changed = (f"--config.{scale}=2.0", "--config.encoder.train.log_every=4")
    again = subprocess.run(**train(workdir, *changed, recipe=own), timeout=300)
    assert again.returncode == 0, again.stderr
    lines = [line for line in again.stdout.splitlines() if not line.endswith(": complete")]
    assert lines[0] == "samples ..."
    (line,) = (workdir / "config_history.jsonl").read_text().splitlines()
    changes = {"encoder.train.log_every": [8, 4], scale: [1.0, 2.0]}
    assert json.loads(line)["changed"] == changes
    wide = "--config.encoder.model.backbone.width=64"
    refused = subprocess.run(**train(workdir, wide, recipe=own), timeout=60)
    assert refused.returncode == 2 and "encoder.model.backbone.width: 88 -> 64" in refused.stderr


@pytest.mark.slow
def test_codes_of_one_run_feed_another(complete, tmp_path):
    store, workdir = complete[0] / "codes", tmp_path / "W2"
    steps = "--config.steps=('encoder', 'codes', 'prior')"
    done = subprocess.run(**train(workdir, f"--config.codes={store}", steps), timeout=300)
    assert done.returncode == 0, done.stderr
    assert f"encoder: not needed, codes are those of {store}" in done.stdout
    assert not (workdir / "encoder").exists()
    found, before = numbers(workdir), complete[2]
    for key in ("prior/validation/loss", "codes/entropy"):  # the same codes, the same seed
        assert found[key] == before[key]


@pytest.mark.slow
def test_ablation_adds_its_numbers_beside(complete):
    workdir, _, before = complete
    done = subprocess.run(
        **train(workdir, recipe="configs/quickstart.py:tiny,ablation"), timeout=600
    )
    assert done.returncode == 0, done.stderr
    after = numbers(workdir)
    assert {key: after[key] for key in before} == before
    assert {f"without_codes/unconditional/{key}" for key in ("valid", "count")} <= after.keys()


@pytest.mark.slow
def test_killed_in_every_step_ends_with_the_same_results(complete, tmp_path):
    """kill -9 as soon as a step is under way, for each step in turn; then once more to the end."""
    _, _, uninterrupted = complete
    workdir = tmp_path / "killed"
    killed = []
    for step in STEPS:
        process = subprocess.Popen(**train(workdir))
        for line in process.stdout:
            if line.startswith(f"{step} "):  # its first line: progress of a stage, or a job's name
                time.sleep(0.3)
                process.kill()
                killed.append(step)
                break
        process.communicate()
        assert process.returncode == -9 or (workdir / step / "done.json").exists(), step
    assert killed == list(STEPS)
    done = subprocess.run(**train(workdir), timeout=600)
    assert done.returncode == 0, done.stderr
    assert numbers(workdir) == uninterrupted
