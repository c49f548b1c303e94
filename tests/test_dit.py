"""The diffusion transformer: code table, blocks and conditions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import (
    KEY,
    L,
    V,
    apply,
    blocks,
    dense,
    dit_inputs,
    drawn,
    embedded,
    integers,
    normal,
    normalized,
    silu,
    small_dit,
)

from dlc_jax.errors import UserError
from dlc_jax.models import (
    dit,
    layers,
    positions,
)
from dlc_jax.typing import Condition


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
    with pytest.raises(UserError, match="cross tokens.*cross=0"):
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
