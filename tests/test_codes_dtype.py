"""The dtype that codes are computed in: what is bfloat16 in an encoder and what is not.

And that everyone computes as the store was made.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recipes import load
from test_models import equations
from test_pipeline import SMALL, drawn

from dlc_jax import pipeline
from dlc_jax.models.encoder import Encoder
from dlc_jax.models.layers import compute_dtypes
from dlc_jax.models.simplicial import DinoHead, Simplicial
from dlc_jax.models.vit import ViT

NARROW = jnp.dtype("bfloat16")
MOVED = {"reshape", "transpose", "squeeze", "slice", "split", "unstack", "broadcast_in_dim"}
MOVED |= {"concatenate", "copy", "pad", "name"}


def narrow(**fields):
    """The jaxpr of an encoder's codes whose products are in bfloat16."""
    model = Encoder(
        backbone=ViT(image=8, patch=4, width=16, depth=3, heads=2, **fields),
        simplicial=Simplicial(positions=3, values=5),
        dino=DinoHead(prototypes=7, hidden=10, bottleneck=6),
    )
    x = jnp.zeros((2, 16, 16, 3))  # twice the side that positions are for
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    dtypes = compute_dtypes(shapes, "bfloat16")
    params = jax.tree.map(lambda leaf, dtype: leaf.update(dtype=dtype), shapes, dtypes)

    def codes(params, x):
        return model.apply({"params": params}, x, method="codes")

    return jax.make_jaxpr(codes)(params, x)


def dtypes(variables):
    return {v.aval.dtype for v in variables if jnp.issubdtype(v.aval.dtype, jnp.floating)}


@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(mlp="swiglu", qk_norm=True, layer_scale=None, remat="none"),
        dict(pos="rope", registers=0),
        dict(pos="sincos"),
    ],
    ids=str,
)
def test_products_alone_have_bfloat16_factors(fields):
    """Residual stream, norms, softmax, activations and logits are float32.

    A bias may be added in bfloat16, where a product is rounded.
    """
    found = list(equations(narrow(**fields).jaxpr))
    inner = {"jaxpr", "call_jaxpr"}
    plain = [eqn for eqn in found if not inner & eqn.params.keys()]
    of = {}
    for eqn in plain:
        of.setdefault(eqn.primitive.name, []).append(eqn)
    touched = {
        name for name, eqns in of.items() if any(NARROW in dtypes(eqn.invars) for eqn in eqns)
    }
    assert touched <= MOVED | {"dot_general", "convert_element_type", "add"}, touched
    rounded = [eqn for eqn in of["add"] if NARROW in dtypes(eqn.invars)]
    assert len(rounded) == 2, rounded  # of qkv and fc1, once for all blocks
    (stream,) = [eqn for eqn in found if eqn.primitive.name == "scan"]
    assert dtypes(stream.outvars) == {jnp.dtype("float32")}
    products = [eqn for eqn in of["dot_general"] if dtypes(eqn.invars) == {NARROW}]
    wide = [eqn for eqn in products if dtypes(eqn.outvars) == {jnp.dtype("float32")}]
    # patches, queries by keys, out, fc2, logits; not qkv, weights by values, fc1
    assert (len(products), len(wide)) == (8, 5)
    assert [dtypes(eqn.invars) for eqn in of["argmax"]] == [{jnp.dtype("float32")}]


def of_codes(dtype, train="bfloat16"):
    """The encoder of a run whose codes have this dtype."""
    return drawn({"encoder.train.dtype": train, "codes.dtype": dtype}).networks["encoder"]


def test_the_encoder_computes_as_its_codes_were_made(tmp_path):
    config = load("quickstart.py:tiny", SMALL | {"codes.dtype": "bfloat16"}).to_dict()
    before = {name: value for name, value in config["codes"].items() if name != "dtype"}
    without = {name: section for name, section in config.items() if name != "codes"}
    for saved, dtype in (
        (config, "bfloat16"),
        (config | {"codes": before}, ""),
        (without, "float32"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(saved))
        assert pipeline.load(tmp_path).networks["encoder"].dtype == dtype
    for codes, train, kernels, others in (
        ("float32", "bfloat16", "float32", "float32"),
        ("bfloat16", "float32", "bfloat16", "float32"),
        ("", "bfloat16", "bfloat16", "bfloat16"),  # a run from before there was the field
        ("", "float32", "float32", "float32"),
    ):
        network = of_codes(codes, train)
        leaves = jax.tree.leaves_with_path(network.abstract())
        found = {(path[-1].key == "kernel", leaf.dtype.name) for path, leaf in leaves}
        assert found == {(True, kernels), (False, others)}
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), network.shapes)
        cast = jax.tree.leaves(network.cast(zeros))
        assert [leaf.dtype for leaf in cast] == [leaf.dtype for _, leaf in leaves]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_is_float32_on_every_device(dtype):
    """TPUs and GPUs would otherwise round the factors of a product to 8 and to 11 bits."""
    lines = of_codes(dtype).lower().as_text().splitlines()
    products = [line for line in lines if "stablehlo.dot_general" in line]
    exact = ["precision = [HIGHEST, HIGHEST]" in line for line in products]
    assert products and set(exact) == {dtype == "float32"}


def test_a_recipe_that_does_not_say_has_float32_codes():
    """Published priors and generators were trained on exact codes."""
    assert load("quickstart.py:tiny").codes.dtype == "float32"
