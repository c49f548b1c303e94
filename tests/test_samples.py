"""The samples job by its parts; a new way to sample is an entry of `METHODS` and nothing else.

The whole job: test_main.py.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest
from recipes import load
from test_networks import save
from test_pipeline import drawn, images, networks, random_params

from dlc_jax import parallel
from dlc_jax.composition.operators import Chosen, Coin, Infill, Refine
from dlc_jax.diffusion import sample
from dlc_jax.diffusion.linear import Linear
from dlc_jax.diffusion.sample import Method, Sampler
from dlc_jax.errors import UserError
from dlc_jax.models.dit import DiT
from dlc_jax.models.masked_transformer import MaskedTransformer
from dlc_jax.networks import Networks
from dlc_jax.networks.generator import sized
from dlc_jax.recipe import build
from dlc_jax.stages import STAGES, samples

SMALL = {f"*.model*.{name}": value for name, value in (("width", 16), ("depth", 1), ("heads", 2))}


def along(process, x, t, s, found):
    (alpha, sigma), (alpha_s, sigma_s) = process.path(t), process.path(s)
    return x + (alpha_s - alpha) * found.data + (sigma_s - sigma) * found.noise


def midpoint(process, predict_fn, x, t, s, keys):
    """A step along the prediction of its middle."""
    every = np.ones(len(x), np.float32)
    half = along(process, x, t, (t + s) / 2, predict_fn(x, t * every))
    return along(process, x, t, s, predict_fn(half, (t + s) / 2 * every))


def forgetful(process, predict_fn, x, t, s, keys):
    """The Euler step of x, then x again in the midst of noise of its own."""
    moved = along(process, x, t, s, predict_fn(x, t * np.ones(len(x), np.float32)))
    noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys)
    return 1e-3 * moved + 0.3 * noise


@pytest.fixture(autouse=True)
def methods(monkeypatch):
    monkeypatch.setitem(sample.METHODS, "midpoint", Method(midpoint, lambda steps: 2 * steps))
    monkeypatch.setitem(sample.METHODS, "forgetful", Method(forgetful, lambda steps: steps))


def test_a_new_method_decodes_and_depends_on_its_keys_alone():
    small, large = drawn(batch=4), drawn(batch=16)
    codes = small.encode(images(7))
    of = {name: Sampler(method=name, steps=3) for name in ("euler", "midpoint", "forgetful")}
    found = {name: small.decode(codes, sampler=sampler) for name, sampler in of.items()}
    assert (found["midpoint"] != found["euler"]).any()
    for name, sampler in of.items():  # on batches of 4, and on one of 16
        again = large.decode(codes, sampler=sampler).astype(int)
        assert np.abs(found[name] - again).max() <= 1, name
    noise = found["forgetful"].astype(int)
    for other in (small.decode(codes, seed=1, sampler=of["forgetful"]), np.roll(noise, 1, 0)):
        assert np.abs(noise - other).mean() > 20  # another seed, another number: other noise
    same = small.decode(np.zeros_like(codes), sampler=of["forgetful"])
    assert np.abs(noise - same).max() <= 1  # of all else nearly nothing is left
    assert (small.sample(4, sampler=of["forgetful"]) != small.sample(4)).any()


@pytest.mark.parametrize("method", ["midpoint", "forgetful"])
def test_a_new_method_is_all_that_the_samples_job_needs(method, tmp_path):
    """Of a generator without codes, whose numbers and picture are all there is to make."""
    lines = {"samples_without_codes.sampler.method": method, "samples_without_codes.count": 5}
    config = load("quickstart.py:tiny,ablation", SMALL | lines)
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    network = Networks(config, tmp_path, mesh)["without_codes"]
    save(tmp_path / "without_codes", random_params(network))
    step = "samples_without_codes"
    job = STAGES["samples"](config, step=step, workdir=tmp_path)
    passes = {"midpoint": 2, "forgetful": 1}[method] * config[step].sampler.steps
    assert job.programs["decode"].flops == config[step].batch * passes * network.model.flops()
    assert set(job.programs) == {"decode"}
    found = job.run(mesh, tmp_path / step)
    assert found["without_codes/unconditional/count"] == 5
    pictures = tmp_path / step / "pictures"
    assert (pictures / "unconditional.png").is_file()
    captions = json.loads((pictures / "captions.json").read_text())
    assert captions == {"unconditional.png": "Images that never existed: drawn without codes."}


def test_an_operator_that_cannot_compose_is_refused_before_anything_is_drawn(tmp_path):
    def made(**lines):
        lines = {f"samples.operator.{name}": value for name, value in lines.items()}
        return STAGES["samples"](
            load("quickstart.py:tiny", lines), step="samples", workdir=tmp_path
        )

    whole = {"name": "infill", "whole": True, "groups": ()}
    for fine in ({}, {"name": "soft"}, whole, {"name": "refine"}):
        made(**fine)
    with pytest.raises(UserError, match="operator.groups=form.ground,tint leaves the prior noth"):
        made(name="infill")  # with the groups that the recipe names for another
    with pytest.raises(UserError, match="each of 3 parents"):
        made(name="infill", share=0.5, groups=())
    with pytest.raises(UserError, match="'fork'; known: form, ground, tint"):
        made(name="chosen", groups=("fork",))


def test_three_are_composed_unless_the_operator_names_what_two_give():
    named = {"groups": ("form+ground", "tint")}
    assert Coin().gives_all(3) and Infill().gives_all(3) and Refine().gives_all(3)
    for operator in (Chosen(**named), Infill(**named), Refine(start=Chosen(**named))):
        assert operator.gives_all(2) and not operator.gives_all(3)
    assert Chosen(groups=("form", "ground", "tint")).gives_all(3)


def test_the_plan_counts_every_evaluation():
    """Of the null condition too; a prior is called once for each position unless it says less."""
    config = networks().config
    section = build(samples.Section, config.samples)
    generator = sized(build(DiT, config.generator.model), Linear()).flops()
    prior = build(MaskedTransformer, config.prior.model).flops()

    def flops(calls=3, **sampler):
        sampler = dataclasses.replace(section.sampler, **sampler)
        code_sampler = dataclasses.replace(section.code_sampler, calls=calls)
        own = dataclasses.replace(section, batch=10, sampler=sampler, code_sampler=code_sampler)
        found = samples.plan(config, own, None)
        return [found[name].flops for name in ("decode", "sample_codes")]

    assert section.sampler.calls == 2 and section.sampler.guidance.scale == 1.0
    assert flops() == [10 * 2 * generator, 10 * 3 * prior]
    guided = dataclasses.replace(section.sampler.guidance, scale=1.5)
    assert flops(calls=0, guidance=guided) == [10 * 2 * 2 * generator, 10 * 6 * prior]
    assert flops(method="heun", steps=5, guidance=guided)[0] == 10 * 9 * 2 * generator
    bare = dataclasses.replace(section, codes="", batch=10)
    for guidance, passes in ((guided, 1), (dataclasses.replace(guided, base="W/weak"), 2)):
        own = dataclasses.replace(
            bare, sampler=dataclasses.replace(bare.sampler, guidance=guidance)
        )
        assert samples.plan(config, own, None)["decode"].flops == 10 * 2 * passes * generator
