"""The dtype that codes are computed in: what is bfloat16 in an encoder and what is not, and that everyone computes as the store was made."""

import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from test_models import equations
from test_pipeline import RECIPE, drawn

from dlc_jax import pipeline
from dlc_jax.cli import import_
from dlc_jax.models import simplicial
from dlc_jax.models.layers import compute_dtypes

NARROW = jnp.dtype("bfloat16")
MOVED = {"reshape", "transpose", "squeeze", "slice", "split", "broadcast_in_dim", "concatenate", "copy", "pad"}


def narrow(**fields):
    """The jaxpr of an encoder's codes whose products are in bfloat16."""
    sizes = dict(image=8, patch=4, width=16, depth=3, heads=2, positions=3, values=5, prototypes=7, hidden=10, bottleneck=6)
    model = simplicial.Encoder(**sizes, **fields)
    x = jnp.zeros((2, 16, 16, 3))  # twice the side that positions are for
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda leaf, dtype: leaf.update(dtype=dtype), shapes, compute_dtypes(shapes, "bfloat16"))
    return jax.make_jaxpr(lambda params, x: model.apply({"params": params}, x, method="codes"))(params, x)


def dtypes(variables):
    return {v.aval.dtype for v in variables if jnp.issubdtype(v.aval.dtype, jnp.floating)}


@pytest.mark.parametrize(
    "fields",
    [dict(), dict(mlp="swiglu", qk_norm=True, layer_scale=None, remat="none"), dict(pos="rope", registers=0), dict(pos="sincos")],
    ids=str,
)
def test_products_alone_have_bfloat16_factors(fields):
    """Residual stream, norms, softmax, activations and logits are float32. A bias may be added in bfloat16, where a product is rounded."""
    found = list(equations(narrow(**fields).jaxpr))
    inner = {"jaxpr", "call_jaxpr"}
    plain = [eqn for eqn in found if not inner & eqn.params.keys()]
    of = {name: [eqn for eqn in plain if eqn.primitive.name == name] for name in {eqn.primitive.name for eqn in plain}}
    touched = {name for name, eqns in of.items() if any(NARROW in dtypes(eqn.invars) for eqn in eqns)}
    assert touched <= MOVED | {"dot_general", "convert_element_type", "add"}, touched
    rounded = [eqn for eqn in of["add"] if NARROW in dtypes(eqn.invars)]
    assert len(rounded) == 2, rounded  # of qkv and fc1, once for all blocks
    (stream,) = [eqn for eqn in found if eqn.primitive.name == "scan"]
    first = stream.params["num_consts"]
    assert dtypes(stream.invars[first : first + stream.params["num_carry"]]) == {jnp.dtype("float32")}
    products = [eqn for eqn in of["dot_general"] if dtypes(eqn.invars) == {NARROW}]
    wide = [eqn for eqn in products if dtypes(eqn.outvars) == {jnp.dtype("float32")}]
    # patches, queries by keys, out, fc2, logits; not qkv, weights by values, fc1
    assert (len(products), len(wide)) == (8, 5)
    assert [dtypes(eqn.invars) for eqn in of["argmax"]] == [{jnp.dtype("float32")}]


def with_codes(train="bfloat16", **codes):
    encoder = RECIPE["encoder"] | {"train": dict(dtype=train)}
    return RECIPE | {"encoder": encoder, "codes": dict(stage="codes", encoder="encoder", path="", **codes)}


def test_the_encoder_computes_as_its_codes_were_made(tmp_path):
    for config, dtype in ((with_codes(dtype="bfloat16"), "bfloat16"), (with_codes(), ""), (RECIPE, "float32")):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert pipeline.load(tmp_path).dtype == dtype
    for config, kernels, others in (
        (with_codes(dtype="float32"), "float32", "float32"),
        (with_codes(dtype="bfloat16", train="float32"), "bfloat16", "float32"),
        (with_codes(), "bfloat16", "bfloat16"),  # a run of before there was the field
        (with_codes(train="float32"), "float32", "float32"),
    ):
        p = drawn(recipe=config)
        leaves = jax.tree.leaves_with_path(p.abstract("encode"))
        found = {(path[-1].key == "kernel", leaf.dtype.name) for path, leaf in leaves}
        assert found == {(True, kernels), (False, others)}
        cast = p.cast(jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), p._model("encoder")[1]))
        assert [leaf.dtype for leaf in jax.tree.leaves(cast)] == [leaf.dtype for _, leaf in leaves]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_is_float32_on_every_device(dtype):
    """TPUs and GPUs would otherwise round the factors of a product to 8 and to 11 bits."""
    p = drawn(recipe=with_codes(dtype=dtype))
    products = [line for line in p.lower("encode").as_text().splitlines() if "stablehlo.dot_general" in line]
    assert products and all(("precision = [HIGHEST, HIGHEST]" in line) == (dtype == "float32") for line in products)


def test_an_import_into_a_recipe_that_does_not_say_has_float32_codes():
    encoder = dict(stage="encoder", model=dict(positions=0, values=0, patch=4), crops={})
    config = ml_collections.ConfigDict(
        {"encoder": encoder, "codes": dict(stage="codes"), "more": dict(stage="codes", dtype="bfloat16")}
    )
    config.lock()
    import_._fit(config, dict(positions=2, values=3, patch=4))
    assert (config.codes.dtype, config.more.dtype) == ("float32", "bfloat16")
