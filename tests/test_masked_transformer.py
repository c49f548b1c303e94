"""The masked transformer: what it reads, and what it is made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import (
    L,
    V,
    apply,
    blocks,
    dense,
    drawn,
    embedded,
    integers,
    normal,
    normalized,
    silu,
    small_prior,
)

from dlc_jax.errors import UserError
from dlc_jax.models import (
    layers,
    masked_transformer,
    positions,
)


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
