"""Networks of a workdir: when their memory is freed, and a generator that leans away from another.

What they compute: test_pipeline.py.
"""

import dataclasses
import gc
import weakref

import jax
import numpy as np
import pytest
from test_pipeline import FAST, SMALL, images, networks, random_params

from dlc_jax import checkpoint, parallel, pipeline
from dlc_jax import workdir as home
from dlc_jax.diffusion.guidance import Guidance
from dlc_jax.errors import UserError
from dlc_jax.networks import Networks

CODES = np.zeros((3, SMALL["*.model*positions"]), np.int32)
STEPS = ("encoder", "prior", "generator")


def save(directory, params):
    """A trained step's average, as training leaves it."""
    saved = checkpoint.Checkpoints(directory / "checkpoints")
    saved.save(1, {"ema": jax.device_get(params)}, None, {"identity": {}})
    saved.close()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Three trained steps, and `weak`, other weights of the same generator."""
    workdir, found = tmp_path_factory.mktemp("trained"), networks()
    for step in STEPS:
        save(workdir / step, random_params(found[step]))
    weak = jax.tree.map(lambda leaf: 0.5 * leaf, random_params(found["generator"]))
    save(workdir / "weak", weak)
    return workdir


def opened(workdir):
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    return Networks(networks().config, workdir, mesh, batch=4)


def used(workdir):
    """A pipeline whose networks have all been loaded, compiled and run."""
    p = pipeline.Pipeline(opened(workdir), sampler=FAST)
    p.encode(images(3))
    p.decode(p.sample_codes(3), sampler=leaning(workdir / "weak"))
    return p


def leaning(base="", scale=1.5):
    return dataclasses.replace(FAST, guidance=Guidance(scale=scale, base=str(base)))


def live():
    """Arrays on the devices."""
    gc.collect()
    return len(jax.live_arrays())


def test_deleted_networks_are_freed(workdir):
    used(workdir)  # what jax itself keeps of a first time
    before, p = live(), used(workdir)
    parts = [p, p.networks, *(p.networks[step] for step in STEPS)]
    dead = [weakref.ref(part) for part in parts]
    leaves = sum(len(jax.tree.leaves(p.networks[step].params)) for step in STEPS)
    assert live() >= before + leaves
    del parts, p
    assert live() == before and [ref() for ref in dead] == [None] * len(dead)


@pytest.mark.parametrize("close", [lambda p: p.close(), lambda p: p.__exit__(None, None, None)])
def test_closed_networks_are_freed_and_loaded_again_when_asked(close, workdir):
    used(workdir)
    before, p = live(), used(workdir)
    codes, network = p.encode(images(3)), weakref.ref(p.networks["encoder"])
    close(p)
    assert live() == before and network() is None
    np.testing.assert_array_equal(p.encode(images(3)), codes)


def test_a_context_closes(workdir):
    with opened(workdir) as found, pipeline.Pipeline(opened(workdir), sampler=FAST) as p:
        assert found["encoder"] is found["encoder"] and p.decode(CODES).shape == (3, 8, 8, 3)
        dead = [weakref.ref(found["encoder"]), weakref.ref(p.networks["generator"])]
    gc.collect()
    assert [ref() for ref in dead] == [None, None]


def test_a_base_with_the_same_weights_is_no_guidance_and_with_others_it_is(workdir):
    """Source: autoguidance, arXiv 2406.02507."""
    p = pipeline.Pipeline(opened(workdir), sampler=FAST)
    plain = p.decode(CODES, seed=1).astype(int)
    same = p.decode(CODES, seed=1, sampler=leaning(workdir / "generator", 3.0)).astype(int)
    other = p.decode(CODES, seed=1, sampler=leaning(workdir / "weak", 3.0)).astype(int)
    unscaled = p.decode(CODES, seed=1, sampler=leaning(workdir / "weak", 1.0)).astype(int)
    assert np.abs(same - plain).max() <= 1 and np.abs(unscaled - plain).max() <= 1
    assert np.abs(other - plain).max() > 5
    lowered = p.networks["generator"].lower(sampler=leaning("elsewhere"))  # it is not loaded
    assert "func" in lowered.as_text()
    null = p.decode(CODES, seed=1, sampler=leaning(scale=3.0)).astype(int)
    assert np.abs(other - null).max() > 1


def test_a_base_that_is_not_a_trained_generator_is_refused_in_a_line(workdir, tmp_path):
    p = pipeline.Pipeline(opened(workdir), sampler=FAST)
    for base in (tmp_path / "nowhere", workdir / "encoder"):
        with pytest.raises(UserError) as refused:
            p.decode(CODES, sampler=leaning(base))
        line = str(refused.value)
        assert line.startswith(f"sampler.guidance.base={base}: ") and "\n" not in line


def other_run(place, lines, factors):
    """A run of another generator; its checkpoint of step n has its weights times factors[n]."""
    found = networks(lines)
    place.mkdir()
    home.write(place / "config.json", found.config.to_dict())
    saved = checkpoint.Checkpoints(place / "generator" / "checkpoints", keep=2)
    for step, factor in factors.items():
        params = jax.tree.map(lambda leaf, by=factor: by * leaf, random_params(found["generator"]))
        saved.save(step, {"ema": jax.device_get(params)}, None, {"identity": {}})
    saved.close()


def test_a_base_is_a_smaller_generator_of_another_run_at_any_of_its_steps(workdir, tmp_path):
    """Also the folder of its step; and what draws something else is refused."""
    other_run(tmp_path / "W2", {"generator.model.width": 8}, {1: 0.5, 2: 1.0})
    p = pipeline.Pipeline(opened(workdir), sampler=FAST)
    drawn = {
        name: p.decode(CODES, seed=1, sampler=leaning(tmp_path / name, 3.0)).astype(int)
        for name in ("W2", "W2@2", "W2@1", "W2/generator")
    }
    np.testing.assert_array_equal(drawn["W2"], drawn["W2@2"])
    np.testing.assert_array_equal(drawn["W2"], drawn["W2/generator"])
    assert np.abs(drawn["W2"] - drawn["W2@1"]).max() > 1
    for name, lines, words in (
        ("edm", {"generator.process.name": "edm"}, "another process"),
        ("short", {"generator.model.values": 4}, "model.values is 4"),
    ):
        other_run(tmp_path / name, lines, {1: 1.0})
        with pytest.raises(UserError, match=f"base={tmp_path / name}: .*{words}"):
            p.decode(CODES, sampler=leaning(tmp_path / name))
