"""A generator of latents by its command, with every part, alone and in two processes.

The autoencoder has random weights: what it makes of latents is no picture, but always the same.
"""

import subprocess

import numpy as np
import pytest
from commands import command
from test_codes_job import VAE, save
from test_several import CLOSE, ended, job, losses

from dlc_jax import pipeline
from dlc_jax.models.autoencoder import Autoencoder

MODEL = dict(image=8, patch=2, channels=2, depth=5, width=32, heads=2, qk_norm=True)
PARTS = dict(block="modern", context=4, early=2, head_width=32, head_depth=1)
PARTS |= dict(align=2, align_width=88, route=True)
OBJECTIVE = dict(align=0.5, align_until=6, route=0.75, route_until=6)


def fields(weights):
    """Of the command: codes of two views with latents, and a few steps of each network."""
    lines = {f"autoencoder.model.{name}": value for name, value in VAE.items()}
    lines |= {"autoencoder.path": weights, "codes.autoencoder": "autoencoder", "codes.flip": True}
    lines |= {"steps": ("encoder", "codes", "prior", "generator", "samples"), "data.count": 256}
    lines |= {"codes.splits": ("train", "validation")}
    lines |= {f"generator.model.{name}": value for name, value in (MODEL | PARTS).items()}
    lines |= {f"generator.objective.{name}": value for name, value in OBJECTIVE.items()}
    lines |= {"generator.objective.foreign": 0.0, "generator.objective.drop_positions": 0.0}
    lines |= {"generator.latents": True, "generator.normalize": True}
    lines |= {"generator.process.name": "edm", "generator.optimizer.name": "muon"}
    lines |= {"*.guidance.base": "internal", "*.sampler.steps": 3, "samples.count": 64}
    lines |= {"samples.pairs": 4, "samples.batch": 64, "encoder.train.steps": 4}
    lines |= {"prior.train.steps": 4, "generator.train.steps": 8, "generator.train.log_every": 1}
    return [f"--config.{name}={value}" for name, value in lines.items()]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    place = tmp_path_factory.mktemp("latent") / "vae"
    save(str(place), Autoencoder(**VAE), 16, seed=1)
    return place


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_of_latents_goes_all_the_way_alone_and_in_two_processes(weights, tmp_path):
    alone, together = tmp_path / "alone", tmp_path / "together"
    shared = ("--config.steps=('generator',)", f"--config.codes.path={alone / 'codes'}")
    for n, workdir, words in ((1, alone, ()), (2, together, shared)):
        codes, said = ended(job(workdir, n, *fields(weights), *words), seconds=600)
        assert codes == [0] * n, said
    one, two = losses(alone, "generator"), losses(together, "generator")
    assert len(one) == 8 and one.keys() == two.keys()
    for at, loss in one.items():
        assert two[at] == pytest.approx(loss, rel=10 * CLOSE), at
    for name in ("unconditional", "reconstruction", "composition"):
        assert (alone / "samples" / "pictures" / f"{name}.png").exists()
    assert "latents are no pictures" not in (alone / "report.html").read_text()

    with pipeline.load(alone, batch=4) as p, pipeline.load(alone, batch=8) as q:
        small, large = p.sample(6, seed=3).astype(int), q.sample(6, seed=3).astype(int)
        assert small.shape == (6, 16, 16, 3) and small.std() > 1
        assert np.mean(np.abs(small - large) <= 1) >= 0.99
    line = (
        "dlc_jax.cli",
        "sample",
        "-w",
        alone,
        "-n",
        5,
        "--npz",
        tmp_path / "some.npz",
        "--seed",
        3,
    )
    done = subprocess.run(**command(*line), timeout=300)
    assert done.returncode == 0, done.stderr
    assert np.mean(np.abs(np.load(tmp_path / "some.npz")["arr_0"] - small[:5]) <= 1) >= 0.99
