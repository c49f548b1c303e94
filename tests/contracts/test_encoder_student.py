"""An encoder that another one teaches: what images themselves say, by what their crops say."""

import dataclasses
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import train
from recipes import load

from dlc_jax import pipeline
from dlc_jax.data.inputs import fit
from dlc_jax.data.sources import DataSet
from dlc_jax.errors import UserError
from dlc_jax.stages import STAGES
from dlc_jax.step import make_init, make_train_step

SMALL = {
    "*.model.backbone.width": 32,
    "*.model.backbone.depth": 1,
    "data.count": 256,
    "student.train.batch": 32,
    "encoder.train.batch": 32,
    "student.objective.koleo_group": 32,
}


def make(**lines):
    config = load("quickstart.py", SMALL | {f"student.{k}": v for k, v in lines.items()})
    return STAGES["encoder"](config, step="student", workdir="unused"), config


def test_the_teacher_is_the_frozen_one_and_the_student_learns_from_images_alone():
    stage, config = make()
    batch = next(stage.batches("train"))
    assert set(batch) == set(stage.batch_spec)
    with DataSet(**config.data) as data:
        images = np.stack([data.source("train")[n]["image"] for n in range(256)])
    whole = {image.tobytes() for image in fit(images, size=16)}
    assert all(image.tobytes() in whole for image in batch["plain"])
    state = jax.jit(make_init(stage))(jax.random.key(0))
    step = jax.jit(make_train_step(stage))

    def after(frozen, ema=None):
        started = state if ema is None else dataclasses.replace(state, ema=ema)
        found, metrics = step(started, batch, {"teacher": frozen}, jax.random.key(1))
        return found.params, float(metrics["loss"]), metrics

    def shaken(by):
        return jax.tree.map(
            lambda leaf: leaf + by * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape),
            state.params,
        )

    _, loss, metrics = after(shaken(0.1))
    assert loss == float(metrics["plain"]) > 0
    terms = metrics.keys() - {"loss", "gradient_norm", "learning_rate"}
    assert terms == {"plain", "skipped", "skipped_in_a_row"}  # what is not computed is no zero
    assert after(shaken(0.1), ema=shaken(0.3))[1] == loss
    assert after(shaken(0.3))[1] != loss


@pytest.mark.parametrize(
    "lines, message",
    [
        ({"teacher": "student"}, "student.teacher='student' is not another step that is an enc"),
        ({"teacher": "prior"}, "student.teacher='prior' is not another step that is an encoder"),
        ({"model.backbone.depth": 2}, "student.model is not that of its teacher encoder; with"),
    ],
)
def test_teachers_that_cannot_teach(lines, message):
    with pytest.raises(UserError, match=message):
        make(**lines)


@pytest.mark.slow
def test_a_student_starts_as_its_teacher_and_encodes(quickstart, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(quickstart / "run", workdir)
    taught = load("quickstart.py").student
    fields = ["--config.student.like=encoder", "--config.student.teacher=encoder"]
    for name in ("dino", "koleo", "consistency", "plain"):
        fields.append(f"--config.student.objective.{name}={taught.objective[name]}")
    fields += ["--config.student.train.steps=4", "--config.steps=('student',)"]
    done = subprocess.run(**train(workdir, *fields), timeout=300)
    assert done.returncode == 0, done.stderr
    with pipeline.load(workdir) as loaded:
        student, teacher = loaded.networks["student"], loaded.networks["encoder"]
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), student.params, teacher.params)
        assert 0 < max(jax.tree.leaves(moved)) < 0.01
        images = np.stack(
            [DataSet(**loaded.config.data).source("train")[n]["image"] for n in range(8)]
        )
        same = (student.encode(images) == teacher.encode(images)).mean()
    assert 0.5 < same
