"""Layers that networks share: identities, where they start, and what is stored."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import (
    KEY,
    apply,
    count,
    drawn,
    normal,
)

from dlc_jax.errors import UserError
from dlc_jax.models import (
    dit,
    layers,
    time_embedding,
)


def test_dense_is_the_product_of_the_last_dimension():
    x = normal(0, 2, 3, 8)
    dense = layers.Dense((3, 2, 4))
    variables = drawn(dense, x)
    kernel, bias = variables["params"]["kernel"], variables["params"]["bias"]
    assert kernel.shape == (8, 3, 2, 4)
    np.testing.assert_allclose(
        apply(dense, variables, x),
        jnp.einsum("bnd,dshk->bnshk", x, kernel) + bias,
        rtol=1e-5,
        atol=1e-5,
    )


def test_dense_of_several_dimensions_starts_like_the_flat_one():
    x = normal(0, 2, 8)
    packed, flat = (
        layers.Dense(features).init(KEY, x)["params"]["kernel"] for features in ((3, 2, 4), 24)
    )
    np.testing.assert_array_equal(packed.reshape(8, 24), flat)


def test_fan_in_uniform_bound():
    kernel = layers.Dense(4000, kernel_init=layers.FAN_IN).init(KEY, jnp.zeros((1, 25)))["params"][
        "kernel"
    ]
    assert 0.199 < np.abs(kernel).max() <= 0.2
    np.testing.assert_allclose(kernel.std(), 0.2 / 3**0.5, rtol=0.01)


def test_layer_norm():
    x = 3 + 10 * normal(0, 4, 64)
    norm = layers.LayerNorm()
    variables = drawn(norm, x)
    y = np.asarray(x, np.float64)
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
    y = y * variables["params"]["scale"] + variables["params"]["bias"]
    np.testing.assert_allclose(apply(norm, variables, x), y, atol=1e-5)
    assert layers.LayerNorm(use_scale=False, use_bias=False).init(KEY, x) == {}
    narrow = apply(norm, variables, x.astype(jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(narrow.astype(np.float32), y, atol=0.05)


def test_mlp_gelu():
    x = normal(0, 2, 4)
    exact, tanh = layers.Mlp(8), layers.Mlp(8, gelu="tanh")
    variables = drawn(exact, x)
    fc1, fc2 = variables["params"]["fc1"], variables["params"]["fc2"]
    h = x @ fc1["kernel"] + fc1["bias"]
    expected = {
        exact: h * (1 + jax.lax.erf(h / 2**0.5)) / 2,
        tanh: h * (1 + jnp.tanh((2 / jnp.pi) ** 0.5 * (h + 0.044715 * h**3))) / 2,
    }
    for mlp, h in expected.items():
        np.testing.assert_allclose(
            apply(mlp, variables, x), h @ fc2["kernel"] + fc2["bias"], atol=1e-6
        )
    assert np.abs(apply(exact, variables, x) - apply(tanh, variables, x)).max() > 1e-6


def test_sincos_1d():
    x = np.array([0.0, 1.5, 900.0])
    frequency = 10000.0 ** -(np.arange(128) / 128)
    expected = np.concatenate(
        [np.cos(np.outer(x, frequency)), np.sin(np.outer(x, frequency))], axis=1
    )
    np.testing.assert_allclose(
        time_embedding.sincos_1d(jnp.asarray(x, jnp.float32), 256), expected, atol=2e-4
    )


def test_patches():
    images = jnp.arange(2 * 4 * 4 * 3, dtype=jnp.float32).reshape(2, 4, 4, 3)
    patches = layers.patchify(images, 2)
    np.testing.assert_array_equal(
        patches[1, 2], images[1, 2:4, 0:2].reshape(-1)
    )  # third in reading order: row 1, column 0
    np.testing.assert_array_equal(layers.unpatchify(patches, 2), images)
    for shape in ((1, 6, 4, 3), (1, 5, 5, 3)):
        with pytest.raises(UserError, match=f"{shape[1]}x{shape[2]}.*2"):
            layers.patchify(jnp.zeros(shape), 2)


def test_attention_reports_heads_that_do_not_divide():
    with pytest.raises(UserError, match="10.*3"):
        layers.Attention(3).init(KEY, jnp.zeros((1, 2, 10)))


class Tower(nn.Module):
    """The smallest model with scanned blocks."""

    remat: str = "none"
    unroll: int = 1

    @nn.compact
    def __call__(self, x, c):
        block = dit.Block(2, 4.0, True, None, name="blocks")
        return layers.scan_blocks(block, x, c, depth=3, remat=self.remat, unroll=self.unroll)


def tower():
    x, c = normal(0, 2, 3, 8), normal(1, 2, 8)
    return x, c, drawn(Tower(), x, c)


def test_scan_is_the_loop_over_layers():
    x, c, variables = tower()
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(variables))
    expected = x
    for layer in range(3):
        params = jax.tree.map(lambda leaf, layer=layer: leaf[layer], variables["params"]["blocks"])
        expected = apply(dit.Block(2, 4.0, True, None), {"params": params}, expected, c)
    np.testing.assert_allclose(apply(Tower(), variables, x, c), expected, atol=1e-5)
    np.testing.assert_allclose(apply(Tower(unroll=0), variables, x, c), expected, atol=1e-5)


def test_layers_start_different():
    x, c, _ = tower()
    kernel = jax.jit(Tower().init)(KEY, x, c)["params"]["blocks"]["mlp"]["fc1"]["kernel"]
    assert np.abs(kernel[0] - kernel[1]).max() > 0.1


def test_remat_changes_what_is_stored_and_not_the_gradient():
    x, c, variables = tower()
    grads, stored = {}, {}
    for remat in layers.REMAT:
        model = Tower(remat=remat)

        def loss(v, model=model):
            return (apply(model, v, x, c) ** 2).sum()

        grads[remat] = jax.jit(jax.grad(loss))(variables)
        stored[remat] = count(jax.eval_shape(lambda v, loss=loss: jax.vjp(loss, v)[1], variables))
    for remat in ("dots", "full"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
            grads["none"],
            grads[remat],
        )
    assert stored["full"] < stored["dots"] < stored["none"]
    with pytest.raises(UserError, match="'some'"):
        Tower(remat="some").init(KEY, x, c)


def test_swiglu():
    x = normal(0, 2, 3, 8)
    mlp = layers.SwiGlu(24)
    variables = drawn(mlp, x)
    p = variables["params"]
    assert p["fc1"]["kernel"].shape == (8, 2, 24) and p["fc1"]["bias"].shape == (2, 24)
    gate, up = (x @ p["fc1"]["kernel"][:, part] + p["fc1"]["bias"][part] for part in (0, 1))
    expected = (gate / (1 + jnp.exp(-gate)) * up) @ p["fc2"]["kernel"] + p["fc2"]["bias"]
    np.testing.assert_allclose(apply(mlp, variables, x), expected, atol=1e-5)
    assert layers.mlp_hidden(1536, 4.0, mlp="swiglu") == 4096
    assert layers.mlp_hidden(96, 4.0, mlp="swiglu") == 256
    assert layers.mlp_hidden(100, 4.0, mlp="swiglu") == 272  # 266 rounded up
    assert layers.mlp_hidden(100, 2.3) == 229
