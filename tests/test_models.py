"""All networks: layers below the head, narrow parameters, and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import (
    KEY,
    L,
    apply,
    dit_inputs,
    drawn,
    normal,
    small_dit,
    small_encoder,
    small_prior,
    to_bfloat16,
)

from dlc_jax.step import cast


def layers_below(model, *args):
    """{name: layers between it and the head} of all parameters, those of blocks as tuples."""
    params = jax.eval_shape(model.init, KEY, *args)["params"]
    leaves = jax.tree.leaves_with_path(params)
    names = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    found = {name: model.layer(name, leaf.shape) for name, leaf in names.items()}
    return {name: n if isinstance(n, int) else tuple(map(int, n)) for name, n in found.items()}


@pytest.mark.parametrize("name", ["dit", "prior"])
def test_layer_counts_from_the_head(name):
    if name == "dit":
        found, below = layers_below(small_dit(depth=3), *dit_inputs()), "patch_embed/"
    else:
        model = small_prior(depth=3, sigma_conditioning=True)
        found, below = (
            layers_below(model, jnp.zeros((1, L), jnp.int32), jnp.ones((1,))),
            "pos_embed",
        )
    for path, number in found.items():
        block, lowest = path.startswith("blocks/"), path.startswith(below)
        assert number == ((3, 2, 1) if block else 4 if lowest else 0), path
    assert set(found.values()) == {(3, 2, 1), 4, 0}


MODELS = {
    "encoder": (small_encoder(), (normal(0, 2, 8, 8, 3),)),
    "dit": (small_dit(qk_norm=True), dit_inputs()),
    "sedd": (small_prior(sigma_conditioning=True), (dit_inputs()[2], jnp.array([0.5, 3.0]))),
}


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_parameters_compute_close_to_float32(name):
    model, args = MODELS[name]
    variables = drawn(model, *args)
    wide, narrow = (jax.jit(model.apply)(v, *args) for v in (variables, to_bfloat16(variables)))
    for a, b in zip(jax.tree.leaves(wide), jax.tree.leaves(narrow)):
        assert np.abs(a - b.astype(jnp.float32)).max() < 0.06 * (1 + np.abs(a).max())
    # as training casts them: tables stay wide, and what is read of them widens nothing
    trained = {"params": cast(variables["params"], jnp.bfloat16, model.tables)}
    for params in (to_bfloat16(variables), trained):
        compute = jax.make_jaxpr(model.apply)(params, *args)
        products = [eqn for eqn in equations(compute.jaxpr) if eqn.primitive.name == "dot_general"]
        used = {v.aval.dtype.name for eqn in products for v in eqn.invars}
        assert used == {"bfloat16"}
        loops = [eqn for eqn in equations(compute.jaxpr) if eqn.primitive.name == "scan"]
        assert {v.aval.dtype.name for eqn in loops for v in eqn.outvars} == {"bfloat16"}


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_gradient(name):
    model, args = MODELS[name]
    variables = drawn(model, *args)

    def weigh(out):
        return sum((normal(9, *leaf.shape) * leaf).sum() for leaf in jax.tree.leaves(out))

    grads = jax.jit(jax.grad(lambda v: weigh(apply(model, v, *args))))(variables)
    leaves = jax.tree.leaves_with_path(grads)
    silent = {jax.tree_util.keystr(path) for path, g in leaves if not np.abs(g).max() > 0}
    assert silent == ({"['params']['vit']['mask_token']"} if name == "encoder" else set())
