"""A prior in few calls: what the teacher teaches, and a run of it in a recipe."""

import dataclasses
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import train
from enumerated import CODES, LENGTH, VALUES, conditionals, joint, lookup
from recipes import load

from dlc_jax import pipeline
from dlc_jax.data.manifest import read_manifest
from dlc_jax.errors import UserError
from dlc_jax.models.masked_transformer import MaskedTransformer
from dlc_jax.stages import STAGES
from dlc_jax.stages.prior import distill

P = joint(floor=0.1)
SMALL = MaskedTransformer(positions=LENGTH, values=VALUES)


def taught(section, noisy, t, said, seed=0):
    def keys(purpose):
        draw = jax.random.fold_in(jax.random.key(seed), purpose)
        return jax.random.split(draw, len(noisy))

    walk = jax.jit(lambda noisy, t: distill.taught(section, said, noisy, t, keys))
    return walk(jnp.asarray(noisy), jnp.asarray(t, jnp.float32))


def test_the_last_word_before_a_position_is_revealed():
    """The mean of what is taught is the teacher's own chance: its steps are consistent."""
    section = distill.Section(model=SMALL, calls=1, teacher_calls=32)
    exact = lookup(conditionals(P))
    noisy = np.tile([VALUES, 1, VALUES], (20_000, 1))
    target = taught(section, noisy, np.ones(len(noisy)), lambda noisy, t: (None, exact(noisy)))
    chances = np.exp(conditionals(P)[VALUES, 1, VALUES])
    np.testing.assert_allclose(np.exp(target)[:, [0, 2]].mean(0), chances[[0, 2]], atol=0.02)
    # Most pairs were revealed one after the other: the second was told the first.
    sure = np.exp(target).std(0)[[0, 2]]
    assert (sure.max(1) > 0.05).all()
    assert np.exp(target)[:, [0, 2]].max() < 1 - 1e-3  # and not what was drawn


def test_a_teacher_is_told_the_times_of_its_steps():
    section = distill.Section(model=SMALL, calls=4, teacher_calls=16)
    seen = []

    def said(noisy, t):
        jax.debug.callback(lambda t: seen.append(np.asarray(t)), t, ordered=True)
        return None, jnp.zeros((*noisy.shape, VALUES))

    taught(section, np.full((2, LENGTH), VALUES), [1.0, 0.1], said)
    jax.effects_barrier()
    steps = np.arange(4)[:, None] / 16
    np.testing.assert_allclose(seen, np.maximum([[1.0, 0.1]] - steps, 0), atol=1e-6)


@pytest.mark.parametrize("divergence", distill.DIVERGENCES)
def test_the_divergence(divergence, monkeypatch):
    """Of a student from a teacher whose chances are the same everywhere, by hand."""
    own, other = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])

    def apply(model, params, noisy, sigma, label):
        return jnp.broadcast_to(jnp.log(params), (*noisy.shape, VALUES))

    monkeypatch.setattr(distill, "apply", apply)
    section = distill.Section(model=SMALL, divergence=divergence)
    section = dataclasses.replace(section, train=dataclasses.replace(section.train, batch=4096))
    batch = {
        "position": jnp.arange(4096, dtype=jnp.int32),
        "codes": jnp.asarray(np.resize(CODES, (4096, LENGTH)), jnp.int32),
    }

    @jax.jit
    def loss(own, other):
        frozen = {"teacher": other}
        return distill.loss(section, own, {}, batch, frozen, 0, jax.random.key(0))[0]

    p, q = (own, other) if divergence == "reverse" else (other, own)
    wanted = (p * np.log(p / q)).sum()
    own, other = (jnp.asarray(each, jnp.float32) for each in (own, other))
    assert loss(own, other) == pytest.approx(wanted, rel=0.05)
    assert abs(loss(own, own)) < 1e-6
    assert np.abs(jax.grad(loss, 0)(own, other)).max() > 0.01
    np.testing.assert_array_equal(jax.grad(loss, 1)(own, other), 0)  # nobody teaches the teacher


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ({"divergence": "both"}, "divergence='both' is unknown; known: reverse, forward"),
        ({"teacher": "distill"}, "distill.teacher='distill' is not another step that is a prior"),
        ({"teacher": "encoder"}, "distill.teacher='encoder' is not another step that is a prior"),
        ({"teacher_calls": 12}, "teacher_calls=12 must be a multiple of calls=8, and more"),
        ({"teacher_calls": 8}, "teacher_calls=8 must be a multiple of calls=8, and more"),
        ({"model.width": 16}, "distill.model.width=16, but that of its teacher prior is"),
        ({"process.objective": "simple"}, "distill.process.objective='simple', but that of its"),
        ({"process.objective": "score"}, "process.objective=score: a student is taught chances"),
        ({"process.name": "uniform"}, "process.name must be masked"),
    ],
)
def test_what_does_not_go_together_is_refused(lines, words):
    config = load(
        "image_folder.py:tiny", {f"distill.{name}": value for name, value in lines.items()}
    )
    with pytest.raises(UserError, match=words):
        STAGES["distill"](config, step="distill", workdir="unused")


def test_a_teacher_of_another_process_is_refused():
    lines = {"distill.stage": "distill", "prior.process.name": "uniform"}
    config = load("image_folder.py:tiny", lines)
    with pytest.raises(UserError, match="distill.process.name='masked', but that of its teacher"):
        STAGES["distill"](config, step="distill", workdir="unused")


@pytest.mark.slow
def test_a_student_starts_as_its_teacher_and_is_sampled(quickstart, tmp_path):
    import shutil

    workdir = tmp_path / "run"
    shutil.copytree(quickstart / "run", workdir)
    size = {
        name: load("quickstart.py:tiny").prior.model[name] for name in ("width", "depth", "heads")
    }
    fields = [f"--config.distill.model.{name}={value}" for name, value in size.items()]
    fields += ["--config.distill.train.steps=4", "--config.distill.train.batch=8"]
    fields += ["--config.steps=('distill',)", "--config.distill.stage=distill"]
    done = subprocess.run(**train(workdir, *fields), timeout=300)
    assert done.returncode == 0, done.stderr
    with pipeline.load(workdir) as loaded:
        student = loaded.networks["distill"]
        teacher = loaded.networks["prior"]
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), student.params, teacher.params)
        assert 0 < max(jax.tree.leaves(moved)) < 0.01
        codes = student.sample(4, seed=0)
    values = read_manifest(workdir / "codes" / "train")["values"]
    assert codes.shape[0] == 4 and (codes < values).all()
