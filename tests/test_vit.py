"""The vision transformer: its blocks, positions, sizes and masks."""

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
    small_vit,
)

from dlc_jax.errors import UserError
from dlc_jax.models import (
    layers,
    positions,
    vit,
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
