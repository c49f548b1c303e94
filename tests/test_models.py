"""Layers and networks: identities, parameter counts, and what each must not depend on."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlc_jax.errors import UserError
from dlc_jax.models import (
    dit,
    layers,
    masked_transformer,
    positions,
    simplicial,
    time_embedding,
    vit,
)
from dlc_jax.models.encoder import Encoder
from dlc_jax.models.masked_transformer import MaskedTransformer
from dlc_jax.typing import Condition

# for `init`: its draws compile faster; under vmap they are not each key's own
KEY = jax.random.key(0, impl="rbg")
SMALL = {"width": 16, "depth": 2, "heads": 2}
L, V = 4, 5


def count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def integers(seed, high, *shape):
    return jnp.asarray(np.random.default_rng(seed).integers(high, size=shape), jnp.int32)


def drawn(model, *args, scale=0.2, seed=1, **options):
    """Variables with nothing at zero, at one or alike, in less time than `init` compiles in."""
    random = np.random.default_rng(seed)
    shapes = jax.eval_shape(functools.partial(model.init, KEY, **options), *args)
    center = {"scale": 1, "q_scale": 1, "k_scale": 1, "gain": 1, "gamma1": 1, "gamma2": 1}
    return jax.tree.map_with_path(
        lambda path, leaf: jnp.asarray(
            center.get(path[-1].key, 0) + scale * random.normal(size=leaf.shape), leaf.dtype
        ),
        shapes,
    )


@functools.partial(jax.jit, static_argnames=("model", "method", "every", "read", "width"))
def apply(model, variables, *args, method=None, **options):
    """Compiled once for each model and kind of call."""
    return model.apply(variables, *args, method=method, **options)


# The same in NumPy and float64, from a layer's parameters.


def dense(p, x):
    return x @ np.asarray(p["kernel"], np.float64) + p["bias"]


def silu(x):
    return x / (1 + np.exp(-x))


def normalized(x, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def embedded(p, number):
    angle = np.outer(number, 1e4 ** (-np.arange(128) / 128))
    return dense(p["fc2"], silu(dense(p["fc1"], np.concatenate([np.cos(angle), np.sin(angle)], 1))))


def blocks(block, p, h, *args):
    for layer in range(2):
        params = jax.tree.map(lambda leaf, layer=layer: leaf[layer], p["blocks"])
        h = apply(block, {"params": params}, jnp.asarray(h, jnp.float32), *args)
    return np.asarray(h, np.float64)


def to_bfloat16(params):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)


# layers


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


# vision transformer


def small_vit(**fields):
    return vit.ViT(
        **{"image": 8, "patch": 2, "registers": 2, "layer_scale": 1.0, **SMALL, **fields}
    )


def test_vit_is_the_blocks_on_class_registers_patches():
    images = normal(0, 2, 8, 8, 3)
    model = small_vit()
    variables = drawn(model, images)
    p = variables["params"]
    patches = jnp.stack(
        [
            images[:, y : y + 2, x : x + 2].reshape(2, -1)
            for y in range(0, 8, 2)
            for x in range(0, 8, 2)
        ],
        axis=1,
    )
    patches = patches @ p["patch_embed"]["kernel"] + p["patch_embed"]["bias"] + p["pos_embed"][1:]
    cls = jnp.broadcast_to(p["cls_token"] + p["pos_embed"][0], (2, 1, 16))
    x = jnp.concatenate([cls, jnp.broadcast_to(p["register_tokens"], (2, 2, 16)), patches], axis=1)
    for layer in range(2):
        block = {"params": jax.tree.map(lambda leaf, layer=layer: leaf[layer], p["blocks"])}
        x = apply(vit.Block(2, 4.0, 1.0, False, None), block, x)
    out = apply(model, variables, images)
    joined = jnp.concatenate([out["cls"][:, None], out["registers"], out["patches"]], axis=1)
    np.testing.assert_allclose(joined, x, atol=1e-4)
    np.testing.assert_array_equal(
        out["vector"], apply(model, variables, out["cls"], method="normalize")
    )


def test_vit_block_scales_its_residuals():
    x = normal(0, 1, 3, 16)
    block = vit.Block(2, 4.0, 1e-5, False, None)
    variables = jax.jit(block.init)(KEY, x)
    np.testing.assert_array_equal(variables["params"]["gamma1"], np.full(16, 1e-5, np.float32))
    assert 0 < np.abs(apply(block, variables, x) - x).max() < 1e-4
    plain = vit.Block(2, 4.0, None, False, None)
    ones = {"params": {**variables["params"], "gamma1": jnp.ones(16), "gamma2": jnp.ones(16)}}
    unscaled = {"params": {k: v for k, v in variables["params"].items() if "gamma" not in k}}
    np.testing.assert_allclose(apply(plain, unscaled, x), apply(block, ones, x), atol=1e-6)


@pytest.mark.parametrize("pos", ["learned", "sincos", "rope"])
def test_vit_takes_other_sizes(pos):
    model = small_vit(pos=pos)
    variables = drawn(model, jnp.zeros((1, 8, 8, 3)))
    assert apply(model, variables, normal(0, 2, 4, 4, 3))["patches"].shape == (2, 4, 16)
    assert apply(model, variables, normal(0, 2, 12, 12, 3))["patches"].shape == (2, 36, 16)
    with pytest.raises(UserError, match="9x9.*2"):
        apply(model, variables, normal(0, 2, 9, 9, 3))
    with pytest.raises(UserError, match="9 pixels.*2"):
        small_vit(image=9).init(KEY, jnp.zeros((1, 8, 8, 3)))


@pytest.mark.parametrize("antialias", [True, False])
def test_learned_positions_are_resized(antialias):
    model = small_vit(image=14, pos_resize="antialias" if antialias else "plain")
    variables = drawn(model, jnp.zeros((1, 14, 14, 3)))
    table = variables["params"]["pos_embed"]
    for side in (3, 10):
        cls, patches = nn.apply(lambda model, side=side: model._positions(side), model)(variables)
        np.testing.assert_array_equal(cls, table[:1])
        np.testing.assert_array_equal(
            patches, positions.resize(table[1:], side, antialias=antialias)
        )


def test_vit_turns_queries_and_keys_of_patches():
    """All blocks read the same angles, and no position is added."""
    images = normal(0, 2, 8, 8, 3)
    model = small_vit(pos="rope")
    variables = drawn(model, images)
    p = variables["params"]
    assert "pos_embed" not in p
    patches = layers.patchify(images, 2) @ p["patch_embed"]["kernel"] + p["patch_embed"]["bias"]
    tokens = [
        jnp.broadcast_to(p[name], (2, *p[name].shape[1:]))
        for name in ("cls_token", "register_tokens")
    ]
    x = jnp.concatenate([*tokens, patches], axis=1)
    angles = positions.axial_rotary(4, 8, before=3)
    for layer in range(2):
        block = {"params": jax.tree.map(lambda leaf, layer=layer: leaf[layer], p["blocks"])}
        x = apply(vit.Block(2, 4.0, 1.0, False, None), block, x, angles)
    out = apply(model, variables, images, every=True)
    np.testing.assert_allclose(out["blocks"][-1], x, atol=1e-4)
    assert (
        np.abs(out["patches"] - apply(small_vit(pos="sincos"), variables, images)["patches"]).max()
        > 1e-2
    )


def test_vit_gives_every_block():
    images = normal(0, 2, 8, 8, 3)
    model = small_vit()
    variables = drawn(model, images)
    out, every = apply(model, variables, images), apply(model, variables, images, every=True)
    assert every["blocks"].shape == (2, 2, 1 + 2 + 16, 16)
    joined = jnp.concatenate([out["cls"][:, None], out["registers"], out["patches"]], axis=1)
    np.testing.assert_allclose(every["blocks"][-1], joined, atol=1e-5)
    half = jax.tree.map(lambda leaf: leaf[:1], variables["params"]["blocks"])
    first = apply(small_vit(depth=1), {"params": variables["params"] | {"blocks": half}}, images)
    np.testing.assert_allclose(every["blocks"][0, :, 3:], first["patches"], atol=1e-5)
    assert set(every) - set(out) == {"blocks"}


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


def test_vit_sizes_and_unknown_words():
    for size, million in {
        "S": 22.1,
        "B": 86.6,
        "L": 304.4,
        "g": 1136.5,
    }.items():  # DINOv2's own, for 518 pixels
        model = vit.ViT(518, 14, registers=0, **vit.SIZES[size])
        params = jax.eval_shape(model.init, KEY, jnp.zeros((1, 14, 14, 3)))["params"]
        assert round(count(params) / 1e6, 1) == million
    assert params["blocks"]["mlp"]["fc1"]["kernel"].shape == (40, 1536, 2, 4096)
    for field, known in vit.CHOICES.items():
        with pytest.raises(UserError, match=f"{field}='some' is not one of {', '.join(known)}"):
            small_vit(**{field: "some"}).init(KEY, jnp.zeros((1, 8, 8, 3)))


def test_vit_masked_patches_are_not_read():
    images = normal(0, 2, 8, 8, 3)
    model = small_vit()
    variables = drawn(model, images)
    masked = jnp.zeros((2, 16), bool).at[:, 5:7].set(True)  # row 1, columns 1 and 2
    other = images.at[:, 2:4, 2:6].add(1.0)
    seen, unseen = (apply(model, variables, x, masked=masked) for x in (images, other))
    np.testing.assert_array_equal(seen["cls"], unseen["cls"])
    assert np.abs(seen["cls"] - apply(model, variables, images)["cls"]).max() > 1e-4
    # where they are is still told: two tokens that are all alike would stay so through every block
    assert np.abs(seen["patches"][:, 5] - seen["patches"][:, 6]).max() > 1e-2


def test_standardize_takes_the_mean_and_the_deviation_of_each_channel():
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3), dtype=np.uint8)
    expected = (images / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    found = jax.jit(vit.standardize)(images)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


# simplicial head and encoder


def small_encoder(readout="plain", **fields):
    fields = {"image": 8, "patch": 4, "registers": 2, "layer_scale": None, **SMALL, **fields}
    head = simplicial.Simplicial(L, V, readout=readout)
    return Encoder(vit.ViT(**fields), head, simplicial.DinoHead(6, hidden=8, bottleneck=4))


def test_simplicial_normalizes_positions_jointly():
    tokens = normal(0, 3, 12)
    head = simplicial.Simplicial(L, V)
    variables = head.init(KEY, tokens, width=16)
    logits = np.asarray(apply(head, variables, tokens, width=16)["logits"])
    raw = np.asarray(tokens @ variables["params"]["embed"]["kernel"], np.float64)
    raw = (raw - raw.mean(-1, keepdims=True)) / np.sqrt(raw.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(logits, raw.reshape(3, L, V), atol=1e-5)
    assert np.abs(logits.mean(-1)).max() > 0.05  # one norm for each position would make this 0


@pytest.mark.parametrize("read", [None, (1, 3)])
@pytest.mark.parametrize("readout", simplicial.READOUTS)
def test_readouts(readout, read):
    tokens = normal(0, 3, 12)
    head = simplicial.Simplicial(L, V, readout=readout)
    variables = drawn(head, tokens, width=16)
    p = variables["params"]
    out = apply(head, variables, tokens, width=16, read=read)
    low, high = read or (0, L)
    kernel = p["out"]["kernel"]
    expected = np.zeros((3, 16))
    for place in range(low, high):
        if readout == "plain":
            assert kernel.shape == (L * V, 16)
            expected += out["simplices"][:, place] @ kernel[place * V : (place + 1) * V]
        else:
            assert kernel.shape == (V, 16)
            expected += out["simplices"][:, place] @ kernel / (high - low)
        if readout == "pos-shared":
            assert p["bias"].shape == (L, 16)
            expected += p["bias"][place] / (high - low)
    assert ("bias" in p) == (readout == "pos-shared")
    np.testing.assert_allclose(out["vector"], expected, atol=1e-5)
    short = tokens.astype(jnp.bfloat16)
    narrow = apply(head, to_bfloat16(variables), short, width=16, read=read)
    assert narrow["vector"].dtype == jnp.bfloat16 and narrow["logits"].dtype == jnp.float32
    logits = np.asarray(narrow["logits"])
    assert (logits != logits.astype(jnp.bfloat16)).any()  # rounding would add ties


def test_readouts_start_as_the_reference():
    head = simplicial.Simplicial(64, 100, readout="pos-shared")
    params = head.init(KEY, jnp.zeros((1, 400)), width=64)["params"]
    assert 0.099 < np.abs(params["out"]["kernel"]).max() <= 0.1
    np.testing.assert_allclose(params["bias"].std(), 0.02, rtol=0.05)


def test_heads_that_cannot_be_are_refused():
    for fields, message in (
        ({"readout": "mean"}, "readout='mean' is not one of plain, shared, pos-shared"),
        ({"values": 2**16 + 1}, "values=65537 is more than 65536"),
    ):
        head = simplicial.Simplicial(**{"positions": 1, "values": 3, **fields})
        with pytest.raises(UserError, match=message) as error:
            head.init(KEY, jnp.zeros((1, 2)), width=2)
        assert "\n" not in str(error.value)


def test_simplicial_init_bounds():
    head = simplicial.Simplicial(32, 32)
    params = head.init(KEY, jnp.zeros((1, 400)), width=64)["params"]
    for kernel, bound in (
        (params["embed"]["kernel"], 400**-0.5),
        (params["out"]["kernel"], 1024**-0.5),
    ):
        assert 0.99 * bound < np.abs(kernel).max() <= bound


def test_dino_head_init():
    """As DINOv2's: dense layers N(0, 0.02), directions uniform as torch's layers are, gains 1."""
    head = simplicial.DinoHead(512, hidden=256, bottleneck=64)
    params = head.init(KEY, jnp.zeros((1, 32)))["params"]
    for name in ("fc1", "fc2", "fc3"):
        assert np.std(params[name]["kernel"]) == pytest.approx(0.02, rel=0.05)
        assert not params[name]["bias"].any()
    bound = 64**-0.5
    assert 0.99 * bound < np.abs(params["direction"]).max() <= bound
    assert np.std(params["direction"]) == pytest.approx(bound / 3**0.5, rel=0.02)
    assert (params["gain"] == 1).all()


@pytest.mark.parametrize("relaxation", simplicial.RELAXATIONS)
def test_relaxations_give_points_of_the_simplex(relaxation):
    keys = jax.random.split(jax.random.key(0), 3)
    simplices = simplicial.relax(normal(0, 3, L, V), relaxation, keys=keys, temperature=0.7)
    np.testing.assert_allclose(simplices.sum(-1), 1, atol=1e-6)
    assert (simplices >= 0).all()
    hard = np.asarray((simplices == 0) | (simplices == 1)).all()
    assert hard == (relaxation == "straight_through")


def test_softmax_at_low_temperature_is_argmax():
    logits = normal(0, 3, L, V)
    np.testing.assert_array_equal(
        simplicial.relax(logits, "softmax", temperature=1e-5), jax.nn.one_hot(logits.argmax(-1), V)
    )


def test_straight_through_has_the_gradient_of_gumbel():
    logits, weight = normal(0, 3, L, V), normal(1, 3, L, V)
    keys = jax.random.split(jax.random.key(0), 3)

    def weighed(x, name):
        return (weight * simplicial.relax(x, name, keys=keys, temperature=0.7)).sum()

    grads = [jax.grad(weighed)(logits, name) for name in ("straight_through", "gumbel")]
    np.testing.assert_allclose(*grads, atol=1e-6)
    assert np.abs(grads[0]).max() > 1e-3


def test_straight_through_draws_from_the_softmax():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    keys = jax.random.split(jax.random.key(0), 4000)
    draws = simplicial.relax(
        jnp.broadcast_to(logits, (4000, 2, 4)), "straight_through", keys=keys, temperature=0.3
    )
    np.testing.assert_allclose(draws.mean((0, 1)), jnp.exp(logits), atol=0.03)
    np.testing.assert_allclose(
        (draws[:, 0] * draws[:, 1]).sum(-1).mean(), (jnp.exp(logits) ** 2).sum(), atol=0.04
    )


def test_noise_has_the_high_range(monkeypatch):
    """The common draw ends at 16: of 4096 values the unlikely ones would come too seldom."""
    asked, draw = [], jax.random.gumbel

    def gumbel(*args, mode=None, **kwargs):
        asked.append(mode)
        return draw(*args, mode=mode, **kwargs)

    monkeypatch.setattr(jax.random, "gumbel", gumbel)
    for relaxation in ("gumbel", "straight_through"):
        simplicial.relax(
            normal(0, 3, L, V), relaxation, keys=jax.random.split(jax.random.key(0), 3)
        )
    assert asked == ["high", "high"]


def test_noise_belongs_to_the_example():
    logits, keys = normal(0, 3, L, V), jax.random.split(jax.random.key(0), 3)
    whole = simplicial.relax(logits, "gumbel", keys=keys)
    np.testing.assert_allclose(
        whole[1:2], simplicial.relax(logits[1:2], "gumbel", keys=keys[1:2]), atol=1e-6
    )
    same = simplicial.relax(jnp.broadcast_to(logits[:1], logits.shape), "gumbel", keys=keys)
    assert np.abs(same[0] - same[1]).max() > 0.05


def test_temperature_divides_logits_and_noise_alike():
    logits, keys = normal(0, 3, L, V), jax.random.split(jax.random.key(0), 3)
    relax = jax.jit(lambda t: simplicial.relax(logits, "gumbel", keys=keys, temperature=t))
    warm, cold = (np.asarray(relax(temperature), np.float64) for temperature in (1.0, 0.5))
    np.testing.assert_allclose(cold, warm**2 / (warm**2).sum(-1, keepdims=True), atol=1e-5)


def test_dino_head_scores_are_cosines_times_gains():
    x = normal(0, 3, 16)
    head = simplicial.DinoHead(6, hidden=8, bottleneck=4)
    variables = drawn(head, x)
    p = variables["params"]
    h = x
    for name in ("fc1", "fc2"):
        h = jax.nn.gelu(h @ p[name]["kernel"] + p[name]["bias"], approximate=False)
    h = h @ p["fc3"]["kernel"] + p["fc3"]["bias"]
    cosine = (h / jnp.linalg.norm(h, axis=-1, keepdims=True)) @ (
        p["direction"] / jnp.linalg.norm(p["direction"], axis=0)
    )
    np.testing.assert_allclose(apply(head, variables, x), cosine * p["gain"], atol=1e-5)


def test_encoder_outputs():
    images = normal(0, 3, 8, 8, 3)
    model = small_encoder()
    variables = drawn(model, images)
    out = apply(model, variables, images)
    shapes = {name: value.shape for name, value in out.items()}
    assert shapes == {
        "cls": (3, 16),
        "registers": (3, 2, 16),
        "patches": (3, 4, 16),
        "logits": (3, L, V),
        "simplices": (3, L, V),
        "vector": (3, 16),
        "prototypes": (3, 6),
    }
    codes = apply(model, variables, images, method="codes")
    assert codes.dtype == jnp.int32
    np.testing.assert_array_equal(codes, out["logits"].argmax(-1))
    # the class token is the final norm of the simplices' image, and it is what the DINO head reads
    p = variables["params"]
    raw = out["simplices"].reshape(3, -1) @ p["simplicial"]["out"]["kernel"]
    np.testing.assert_allclose(
        out["vector"], apply(layers.LayerNorm(), {"params": p["vit"]["norm"]}, raw), atol=1e-4
    )
    np.testing.assert_allclose(
        out["prototypes"], apply(model, variables, out["vector"], method="score"), atol=1e-5
    )


def test_encoder_reads_registers_and_class_token_only():
    """The head's input is [class, registers...]; patches reach it through attention alone."""
    images = normal(0, 3, 8, 8, 3)
    model = small_encoder()
    variables = drawn(model, images)
    out = apply(model, variables, images)
    flat = jnp.concatenate([out["cls"], out["registers"][:, 0], out["registers"][:, 1]], axis=-1)
    params = {"params": variables["params"]["simplicial"]}
    head = apply(simplicial.Simplicial(L, V), params, flat, width=16)
    np.testing.assert_allclose(out["logits"], head["logits"], atol=1e-5)


@pytest.mark.parametrize("readout", simplicial.READOUTS)
def test_encoder_without_registers_reads_the_class_token(readout):
    images = normal(0, 3, 8, 8, 3)
    model = small_encoder(registers=0, readout=readout, mlp="swiglu", pos_resize="plain")
    variables = drawn(model, images)
    out = apply(model, variables, images)
    assert out["registers"].shape == (3, 0, 16)
    params = {"params": variables["params"]["simplicial"]}
    head = apply(simplicial.Simplicial(L, V, readout=readout), params, out["cls"], width=16)
    np.testing.assert_allclose(out["logits"], head["logits"], atol=1e-5)
    np.testing.assert_allclose(
        out["vector"], apply(model, variables, head["vector"], method="normalize"), atol=1e-4
    )


# diffusion transformer


def small_dit(**fields):
    return dit.DiT(
        **{"image": 8, "channels": 3, "patch": 4, "positions": L, "values": V, **SMALL, **fields}
    )


def dit_inputs():
    codes = integers(3, V, 2, L)
    return normal(0, 2, 8, 8, 3), jnp.array([0.2, 0.9]), codes


def test_code_table():
    codes = integers(3, V + 1, 3, L)
    table = dit.CodeTable(L, V, 16)
    variables = drawn(table, codes)
    rows = variables["params"]["table"]
    expected = jnp.einsum("blv,lvd->bd", jax.nn.one_hot(codes, V + 1), rows) / L
    np.testing.assert_allclose(apply(table, variables, codes), expected, atol=1e-6)
    # null
    null = apply(table, variables, method="null")
    np.testing.assert_allclose(
        apply(table, variables, jnp.full((3, L), V)), np.broadcast_to(null, (3, 16)), atol=1e-6
    )
    # soft
    hard = integers(3, V, 3, L)
    np.testing.assert_allclose(
        apply(table, variables, jax.nn.one_hot(hard, V)), apply(table, variables, hard), atol=1e-6
    )
    # what has no row
    assert np.isnan(apply(table, variables, jnp.full((1, L), V + 1))).all()
    with pytest.raises(UserError, match=f"{L} positions x {V} values"):
        apply(table, variables, jnp.zeros((1, L + 1), jnp.int32))


def test_code_table_init():
    rows = dit.CodeTable(16, 63, 64).init(KEY, jnp.zeros((1, 16), jnp.int32))["params"]["table"]
    np.testing.assert_array_equal(rows[:, 63], np.broadcast_to(rows[0, 63], (16, 64)))
    assert np.abs(rows[0, :63] - rows[1, :63]).max() > 0.1
    np.testing.assert_allclose(rows.std(), 64**-0.5, rtol=0.02)


def test_dit_starts_at_zero_and_its_blocks_at_the_identity():
    x, t, codes = dit_inputs()
    model = small_dit()
    variables = jax.jit(model.init)(KEY, x, t, codes)
    np.testing.assert_array_equal(apply(model, variables, x, t, codes), np.zeros(x.shape))
    tokens, condition = normal(0, 2, 3, 16), normal(1, 2, 16)
    first = {"params": jax.tree.map(lambda leaf: leaf[0], variables["params"]["blocks"])}
    np.testing.assert_array_equal(
        apply(dit.Block(2, 4.0, False, None), first, tokens, condition), tokens
    )


def test_dit_block_order_is_shift_scale_gate():
    x, c = normal(0, 2, 3, 16), normal(1, 2, 16)
    block = dit.Block(2, 4.0, False, None)
    p = drawn(block, x, c)["params"]
    parts = jnp.split(c @ p["modulation"]["kernel"] + p["modulation"]["bias"], 6, axis=-1)
    shift1, scale1, gate1, shift2, scale2, gate2 = (part[:, None] for part in parts)
    norm = layers.LayerNorm(use_scale=False, use_bias=False).bind({})
    y = x + gate1 * apply(
        layers.Attention(2), {"params": p["attention"]}, norm(x) * (1 + scale1) + shift1
    )
    y = y + gate2 * apply(
        layers.Mlp(64, gelu="tanh"), {"params": p["mlp"]}, norm(y) * (1 + scale2) + shift2
    )
    np.testing.assert_allclose(apply(block, {"params": p}, x, c), y, atol=1e-4)


def test_dit_is_its_blocks_between_patches_and_a_modulated_end():
    x, t, codes = dit_inputs()
    model = small_dit(image=16)  # x is smaller: positions are stretched over it
    variables = drawn(model, x, t, codes)
    p = jax.tree.map(np.asarray, variables["params"])
    table = p["code_table"]["table"][np.arange(L), np.asarray(codes)].mean(1)
    c = silu(embedded(p["time_embed"], 1000 * np.asarray(t, np.float64)) + table)
    patches = np.asarray(x).reshape(2, 2, 4, 2, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 4, 48)
    h = dense(p["patch_embed"], patches) + positions.sincos_2d(2, 2, 16, extent=4)
    h = blocks(dit.Block(2, 4.0, False, None), p, h, jnp.asarray(c, jnp.float32))
    shift, scale = np.split(dense(p["final_modulation"], c), 2, axis=-1)
    out = dense(p["final"], normalized(h, 1e-6) * (1 + scale[:, None]) + shift[:, None])
    out = out.reshape(2, 2, 2, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 8, 8, 3)
    np.testing.assert_allclose(apply(model, variables, x, t, codes), out, rtol=1e-3, atol=1e-3)


def test_dit_conditions():
    x, t, codes = dit_inputs()
    model = small_dit(out_channels=5)
    variables = drawn(model, x, t, codes)

    def run(codes):
        return apply(model, variables, x, t, codes)

    conditional, null = run(codes), run(None)
    assert conditional.shape == (2, 8, 8, 5)
    np.testing.assert_allclose(null, run(jnp.full_like(codes, V)), atol=1e-5)
    np.testing.assert_allclose(conditional, run(jax.nn.one_hot(codes, V)), atol=1e-5)
    assert np.abs(conditional - null).max() > 1e-3
    mixed = run(codes.at[0].set(V))  # dropped for one example only
    np.testing.assert_allclose(mixed, jnp.stack([null[0], conditional[1]]), atol=1e-5)
    with pytest.raises(NotImplementedError, match="tokens"):
        apply(model, variables, x, t, Condition(tokens=jnp.zeros((2, L, 16))), method="denoise")


def test_dit_without_codes():
    x, t, codes = dit_inputs()
    model = small_dit(positions=0, values=0)
    variables = drawn(model, x, t)
    assert "code_table" not in variables["params"]
    out = apply(model, variables, x, t)
    # any other embedding of codes can feed the same network
    other = apply(model, variables, x, t, Condition(vector=normal(5, 2, 16)), method="denoise")
    assert np.abs(out - other).max() > 1e-3
    with pytest.raises(UserError, match="codes=None"):
        apply(model, variables, x, t, codes)
    with pytest.raises(UserError, match="values=0"):
        small_dit(values=0).init(KEY, x, t)


def test_dit_reads_time_and_position():
    x, t, codes = dit_inputs()
    model = small_dit()
    variables = drawn(model, x, t, codes)
    out = apply(model, variables, x, t, codes)
    assert np.abs(out - apply(model, variables, x, t + 0.05, codes)).max() > 1e-3
    rolled = jnp.roll(apply(model, variables, jnp.roll(x, 4, axis=2), t, codes), -4, axis=2)
    assert np.abs(out - rolled).max() > 1e-3


# masked transformer


def small_prior(**fields):
    return MaskedTransformer(**{"positions": L, "values": V, **SMALL, **fields})


def test_masked_transformer():
    codes = integers(3, V + 1, 3, L)
    model = small_prior()
    variables = drawn(model, codes)
    out = apply(model, variables, codes)
    assert out.shape == (3, L, V)
    # full attention: every position reads every other
    for position in range(L):
        changed = apply(
            model, variables, codes.at[:, position].set((codes[:, position] + 1) % (V + 1))
        )
        assert (np.abs(out - changed).max((0, 2)) > 1e-5).all()
    assert np.isnan(apply(model, variables, codes.at[0, 0].set(V + 1))[0]).all()
    with pytest.raises(UserError, match=f"{L + 1} positions.*{L}"):
        apply(model, variables, jnp.zeros((1, L + 1), jnp.int32))


def test_masked_transformer_is_one_function_of_the_codes():
    """No time goes in, and logits do not depend on the place or company in a batch."""
    codes = integers(3, V + 1, 4, L)
    model = small_prior()
    variables = drawn(model, codes)
    out = apply(model, variables, codes)
    order = jnp.array([2, 0, 3, 1])
    np.testing.assert_allclose(apply(model, variables, codes[order]), out[order], atol=1e-5)
    with pytest.raises(UserError, match="sigma is given"):
        apply(model, variables, codes, jnp.ones(4))


def test_masked_transformer_knows_positions_by_embedding_and_by_rotation():
    codes = integers(3, V, 2, L)
    model = small_prior()
    p = drawn(model, codes)["params"]
    p["pos_embed"] = jnp.zeros_like(p["pos_embed"])
    swap = jnp.array([1, 0, *range(2, L)])
    out, swapped = apply(model, {"params": p}, codes), apply(model, {"params": p}, codes[:, swap])
    assert np.abs(out[:, swap] - swapped).max() > 1e-4  # without rotation this would be 0
    p["blocks"]["attention"]["qkv"]["kernel"] *= 0  # nothing mixes positions now
    out = apply(model, {"params": p}, jnp.zeros((1, L), jnp.int32))
    np.testing.assert_allclose(out[0], np.broadcast_to(out[0, 0], (L, V)), atol=1e-6)
    p["pos_embed"] = normal(7, L, 16)
    out = apply(model, {"params": p}, jnp.zeros((1, L), jnp.int32))
    assert np.abs(out[0, 0] - out[0, 1]).max() > 1e-3


def test_masked_transformer_per_position_table():
    codes = jnp.zeros((1, L), jnp.int32)
    model = small_prior(per_position=True)
    p = drawn(model, codes)["params"]
    assert p["token_embed"].shape == (L, V + 1, 16)
    out = apply(model, {"params": p}, codes)
    p["token_embed"] = (
        p["token_embed"].at[1, 3].add(normal(5, 16))
    )  # value 3 of position 1 is not among the codes ...
    np.testing.assert_array_equal(apply(model, {"params": p}, codes), out)
    p["token_embed"] = p["token_embed"].at[1, 0].add(normal(5, 16))  # ... value 0 is
    assert np.abs(apply(model, {"params": p}, codes) - out).max() > 1e-4


def test_masked_transformer_with_sigma():
    codes, sigma = jnp.zeros((2, L), jnp.int32), jnp.array([0.5, 3.0])
    model = small_prior(sigma_conditioning=True)
    variables = drawn(model, codes, sigma)
    out = apply(model, variables, codes, sigma)
    assert out.shape == (2, L, V + 1)
    assert np.abs(out[0] - out[1]).max() > 1e-3
    with pytest.raises(UserError, match="sigma is missing"):
        apply(model, variables, codes)


def test_masked_transformer_is_its_blocks_between_a_table_and_a_modulated_end():
    codes, sigma = integers(3, V + 1, 2, L), jnp.array([0.5, 3.0])
    model = small_prior(sigma_conditioning=True)
    variables = drawn(model, codes, sigma)
    p = jax.tree.map(np.asarray, variables["params"])
    c = silu(embedded(p["sigma_embed"], np.asarray(sigma, np.float64)))
    h = p["token_embed"][np.asarray(codes)] + p["pos_embed"]
    angles = positions.rotary(L, 8)
    block = masked_transformer.Block(2, 4.0, None)
    h = blocks(block, p, h, angles, jnp.asarray(c, jnp.float32))
    h = normalized(h, 1e-5) * p["final_norm"]["scale"]
    shift, scale = np.split(dense(p["final_modulation"], c), 2, axis=-1)
    out = dense(p["final"], h * (1 + scale[:, None]) + shift[:, None])
    np.testing.assert_allclose(apply(model, variables, codes, sigma), out, atol=1e-3)


def test_masked_transformer_block_order_is_shift_scale_gate():
    x, c, angles = normal(0, 2, L, 16), normal(1, 2, 8), positions.rotary(L, 8)
    block = masked_transformer.Block(2, 4.0, None)
    p = drawn(block, x, angles, c)["params"]
    parts = jnp.split(c @ p["modulation"]["kernel"] + p["modulation"]["bias"], 6, axis=-1)
    shift1, scale1, gate1, shift2, scale2, gate2 = (part[:, None] for part in parts)
    norm1, norm2 = (
        layers.LayerNorm(eps=1e-5, use_bias=False).bind({"params": p[name]})
        for name in ("norm1", "norm2")
    )
    attend, mlp = layers.Attention(2, use_bias=False), layers.Mlp(64, gelu="tanh")
    y = x + gate1 * attend.apply(
        {"params": p["attention"]}, norm1(x) * (1 + scale1) + shift1, rotary=angles
    )
    y = y + gate2 * mlp.apply({"params": p["mlp"]}, norm2(y) * (1 + scale2) + shift2)
    np.testing.assert_allclose(apply(block, {"params": p}, x, angles, c), y, atol=1e-4)


# layers between a parameter and the head


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


# all of them

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
    compute = jax.make_jaxpr(model.apply)(to_bfloat16(variables), *args)
    products = [eqn for eqn in equations(compute.jaxpr) if eqn.primitive.name == "dot_general"]
    assert products and all(v.aval.dtype == jnp.bfloat16 for eqn in products for v in eqn.invars)


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


def test_simplicial_reads_only_the_positions_it_is_told_to():
    head = simplicial.Simplicial(positions=4, values=3)
    tokens = jax.random.normal(jax.random.key(0), (2, 8))
    params = head.init(jax.random.key(1), tokens, width=5)
    whole, half = (head.apply(params, tokens, width=5, read=read) for read in (None, (2, 4)))
    np.testing.assert_array_equal(whole["simplices"], half["simplices"])
    kernel = params["params"]["out"]["kernel"]
    want = np.asarray(whole["simplices"])[:, 2:].reshape(2, -1) @ np.asarray(kernel)[6:]
    np.testing.assert_allclose(half["vector"], want, rtol=1e-5, atol=1e-6)
