"""Parameter tables of the paper's models, as goldens, and the published counts as numbers.

UPDATE_GOLDEN=1 rewrites the goldens.
"""

import functools
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dlc_jax import command
from dlc_jax.models.dit import DiT
from dlc_jax.models.encoder import Encoder
from dlc_jax.models.masked_transformer import MaskedTransformer
from dlc_jax.models.simplicial import READOUTS
from dlc_jax.recipe import build
from dlc_jax.stages import STAGES

ROOT = Path(__file__).resolve().parents[1]
GOLDENS = Path(__file__).parent / "goldens"
VARIANTS = ("", "32x4096", "128x1024", "512px", "S", "B", "L", "8B")
KEY = jax.random.key(0)


@functools.cache
def recipe(variant=""):
    file = f"{ROOT}/configs/imagenet256.py:{variant}"
    return command.parse(["dlc", f"--config={file}"])[0]


@functools.cache
def published(name):
    """Abstract parameters of the published network: the recipe's, but for what differs there."""
    kind = {"encoder": Encoder, "prior": MaskedTransformer, "generator": DiT}[name]
    model = build(kind, recipe()[name].model)
    codes = jax.ShapeDtypeStruct((1, recipe().prior.model.positions), jnp.int32)
    number = jax.ShapeDtypeStruct((1,), jnp.float32)
    if name == "encoder":  # positions for 518 pixels
        model = model.clone(backbone=model.backbone.clone(image=518))
        arguments = (jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32),)
    elif name == "prior":  # SEDD's network reads sigma and has an output for the mask
        model, arguments = model.clone(sigma_conditioning=True), (codes, number)
    else:  # DiT also predicts a variance for each of the four channels
        model = model.clone(out_channels=8)
        arguments = (jax.ShapeDtypeStruct((1, 32, 32, 4), jnp.float32), number, codes)
    return jax.eval_shape(model.init, KEY, *arguments)["params"]


@functools.cache
def trained(variant, name):
    """Abstract parameters of the recipe's stage."""
    stage = STAGES[name](recipe(variant), step=name, workdir=Path("unused"))
    return jax.eval_shape(stage.init, KEY)[0]


def count(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def check(name, text):
    path = GOLDENS / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.exists() and path.read_text() == text, (
        f"{path.name} has changed; UPDATE_GOLDEN=1 pytest {Path(__file__).name}"
    )


def table(params):
    rows = [
        (
            jax.tree_util.keystr(path, simple=True, separator="/"),
            "x".join(map(str, leaf.shape)),
            f"{math.prod(leaf.shape):,}",
        )
        for path, leaf in jax.tree.leaves_with_path(params)
    ]
    rows += [(name, "all of it", f"{count(part):,}") for name, part in sorted(params.items())] + [
        ("", "total", f"{count(params):,}")
    ]
    return "".join(f"{path:<40} {shape:>16} {number:>15}\n" for path, shape, number in rows)


@pytest.mark.parametrize("name", ["encoder", "prior", "generator"])
def test_table_of_the_published_network(name):
    check(f"parameters_{name}.txt", table(published(name)))


def test_tables_of_the_readouts():
    """Of the simplicial head alone, as the published variants of the encoder have it."""
    model = build(Encoder, recipe().encoder.model)
    pixels = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    tables = []
    for readout in READOUTS:
        variant = model.clone(simplicial=model.simplicial.clone(readout=readout))
        params = jax.eval_shape(variant.init, KEY, pixels)["params"]
        tables.append(f"{readout}\n{table(params['simplicial'])}")
    check("parameters_readouts.txt", "\n".join(tables))


def test_totals_of_the_recipe():
    lines = [
        f"{variant or 'default':<10} {name:<10} {count(trained(variant, name)):>15,}\n"
        for variant in VARIANTS
        for name in ("encoder", "prior", "generator")
    ]
    check("parameters_totals.txt", "".join(lines))


def test_published_encoder():
    params = {name: count(part) for name, part in published("encoder").items()}
    assert {name: round(number / 1e6, 2) for name, number in params.items()} == {
        "vit": 304.37,
        "simplicial": 805.57,
        "head": 23.66,
    }
    assert (
        round((params["vit"] + params["simplicial"]) / 1e6, 2) == 1109.94
    )  # "with head" is the simplicial one


def test_published_prior():
    assert round(count(published("prior")) / 1e6, 1) == 322.5


def test_published_generator():
    constants = 256 * 1152  # its positions are a frozen parameter there, and a constant here
    assert round((count(published("generator")) + constants) / 1e6, 2) == 825.56
    table = count(published("generator")["code_table"])
    assert [
        round(number / 1e6, 2)
        for number in (table, count(published("generator")) + constants - table)
    ] == [151.58, 673.98]


def test_the_recipe_differs_from_the_published_networks_by_what_it_says():
    difference = {
        name: count(published(name)) - count(trained("", name))
        for name in ("encoder", "prior", "generator")
    }
    sigma = (256 * 128 + 128) + (128 * 128 + 128)
    modulation = (128 + 1) * 1024 * (24 * 6 + 2)
    assert difference == {
        "encoder": (37 * 37 - 16 * 16) * 1024,  # rows of positions, for 224 pixels instead of 518
        "prior": sigma
        + modulation
        + (1024 + 1),  # the network is not told the time, and has no output for the mask
        "generator": 0,  # noise and variances, all that is published
    }


@pytest.mark.parametrize("variant", ["32x4096", "128x1024"])
def test_codes_of_another_shape_cost_the_encoder_nothing(variant):
    assert count(trained(variant, "encoder")) == count(trained("", "encoder"))
    positions, values = map(int, variant.split("x"))
    assert count(trained(variant, "generator")["code_table"]) == positions * (values + 1) * 1152


def test_the_largest_generator_has_eight_billion_parameters():
    params = trained("8B", "generator")
    assert [round(count(part) / 1e9, 2) for part in (params, params["blocks"])] == [8.84, 8.33]
