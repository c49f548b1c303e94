"""The prior_scores job on a prior whose own draws stand for real codes."""

import dataclasses

import jax
import numpy as np
import pytest
from recipes import load
from test_networks import save
from test_pipeline import LENGTH, SMALL, VALUES, networks, random_params

from dlc_jax import parallel
from dlc_jax.data import code_writer
from dlc_jax.errors import UserError
from dlc_jax.models.masked_transformer import MaskedTransformer
from dlc_jax.recipe import build
from dlc_jax.report import tables
from dlc_jax.stages import STAGES, prior_scores

COUNT = 300
SCORES = {"prior_scores.count": COUNT, "prior_scores.draws": 8, "prior_scores.batch": 100}


def config(**lines):
    own = {f"prior_scores.{name.replace('__', '.')}": value for name, value in lines.items()}
    return load("quickstart.py:tiny", SMALL | SCORES | own)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A prior, and codes of three splits that it drew itself, exactly."""
    place, network = tmp_path_factory.mktemp("scored"), networks(batch=100)["prior"]
    params = random_params(network)
    save(place / "prior", params)
    network.params = params
    for seed, split in enumerate(("train", "validation", "held_out")):
        codes = network.sample(COUNT, seed=100 + seed)

        def encode(start, stop, codes=codes):
            return {"codes": codes[start:stop]}

        sizes = dict(total=COUNT, positions=LENGTH, values=VALUES)
        code_writer.write(place / "codes" / split, encode, **sizes, identity="drawn", source="none")
    return place


def run(config, workdir, devices=1):
    job = STAGES["prior_scores"](config, step="prior_scores", workdir=workdir)
    return job.run(parallel.make_mesh(devices=jax.devices()[:devices]), workdir / "prior_scores")


def scores(workdir, *, devices=1, **lines):
    found = run(config(**lines), workdir, devices)
    return {name.removeprefix("prior_scores/"): value for name, value in found.items()}


@pytest.fixture(scope="module")
def exact(workdir):
    return scores(workdir)


def test_a_prior_cannot_be_told_from_its_own_draws(exact):
    for name in ("auc", "floor/auc"):
        assert abs(exact[name] - 0.5) < 4 * exact["auc_error"] < 0.2
    splits = ("train", "validation", "held_out")
    bits, errors = (
        np.array([exact[f"bits_per_code/{split}{of}"] for split in splits]) for of in ("", "_error")
    )
    assert np.ptp(bits) < 4 * np.hypot(*errors[:2]) and (errors < bits / 10).all()
    assert (bits < LENGTH * np.log2(VALUES)).all() and 0 < exact["copies"] < 1
    assert (exact["calls"], exact["count"]) == (LENGTH, COUNT)
    assert exact["pairwise"] == pytest.approx(exact["floor/pairwise"], rel=0.2)


@pytest.mark.parametrize("field", ["prior", "codes"])
def test_a_step_of_another_kind_is_refused(field):
    with pytest.raises(UserError, match=f"prior_scores.{field}='encoder' is not a step of that"):
        STAGES["prior_scores"](config(**{field: "encoder"}), step="prior_scores", workdir="unused")


def test_samplers_show_in_the_scores(workdir, exact):
    cold = scores(workdir, code_sampler__temperature=0.2, code_sampler__calls=2)
    assert cold["auc"] > exact["auc"] + 0.2 and cold["unigram"] > 2 * exact["unigram"]
    assert cold["entropy"] < 0.7 * exact["entropy"] and cold["distinct"] < exact["distinct"]
    assert cold["entropy_real"] == exact["entropy_real"] and cold["calls"] == 2
    same = [name for name in exact if name.startswith(("bits", "floor"))]
    assert len(same) == 11 and all(cold[name] == exact[name] for name in same)


@pytest.mark.slow
def test_devices_change_nothing(workdir, exact):
    found = scores(workdir, devices=4)
    assert found.keys() == exact.keys()
    for name, value in found.items():
        assert value == pytest.approx(exact[name], rel=1e-4), name


def test_the_plan_counts_every_call():
    made = STAGES["prior_scores"](
        config(code_sampler__calls=3), step="prior_scores", workdir="nowhere"
    )
    flops = build(MaskedTransformer, config().prior.model).flops()
    assert made.programs["sample_codes"].flops == 100 * 3 * flops


def test_refused(workdir):
    with pytest.raises(UserError, match="count=3 must be at least 4"):
        prior_scores.Section(count=3)
    with pytest.raises(UserError, match="draws=1"):
        dataclasses.replace(prior_scores.Section(), draws=1)
    other = load("quickstart.py:tiny", SMALL | SCORES | {"prior.model.positions": LENGTH + 1})
    with pytest.raises(UserError, match=f"reads codes of {LENGTH + 1} positions"):
        run(other, workdir)
    lines = SMALL | SCORES | {"codes.splits": ("train",)}
    with pytest.raises(UserError, match="has no validation"):
        STAGES["prior_scores"](
            load("quickstart.py:tiny", lines), step="prior_scores", workdir=workdir
        )


def test_the_report_tells_what_the_scores_are():
    shown = "\n".join(tables.tables({"prior_scores/auc": 0.75, "prior_scores/floor/auc": 0.5}))
    assert "<td>floor auc</td>" in shown and "0.75" in shown and "area under the curve" in shown
