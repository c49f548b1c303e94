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


@pytest.mark.parametrize("per_position", [False, True])
def test_masked_transformer_reads_soft_codes(per_position):
    """Sure ones as hard ones, and of others the mean of their rows."""
    codes, other = integers(0, V, 2, L), integers(1, V, 2, L)
    model = small_prior(per_position=per_position)
    variables = drawn(model, codes)
    hard = apply(model, variables, codes)
    np.testing.assert_allclose(apply(model, variables, jax.nn.one_hot(codes, V)), hard, atol=1e-5)
    table = variables["params"]["token_embed"]
    index = (jnp.arange(L), codes) if per_position else codes
    rows = (jnp.arange(L), other) if per_position else other
    between = model._rows(table, (jax.nn.one_hot(codes, V) + jax.nn.one_hot(other, V)) / 2)
    np.testing.assert_allclose(between, (table[index] + table[rows]) / 2, atol=1e-6)


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


def test_masked_transformer_with_classes():
    codes, label = integers(3, V + 1, 4, L), jnp.array([0, 2, 3, 0])
    model = small_prior(classes=3)
    variables = drawn(model, codes, None, label)
    out = apply(model, variables, codes, label=label)
    assert out.shape == (4, L, V)  # without sigma there is no output for the mask
    changed = apply(model, variables, codes, label=label.at[0].set(3))
    assert (np.abs(out - changed).max((1, 2)) > 1e-4).tolist() == [True, False, False, False]
    assert np.isnan(apply(model, variables, codes, label=label.at[1].set(4))[1]).all()
    with pytest.raises(UserError, match="classes=3, but the label is missing"):
        apply(model, variables, codes)
    with pytest.raises(UserError, match="classes=0, but the label is given"):
        apply(small_prior(), variables, codes, label=label)


def test_masked_transformer_adds_the_embeddings_of_sigma_and_class():
    codes, sigma, label = integers(3, V, 2, L), jnp.array([0.5, 3.0]), jnp.array([1, 3])
    both = small_prior(sigma_conditioning=True, classes=3)
    p = drawn(both, codes, sigma, label)["params"]
    row = 2.5 * p["label_table"]["table"][1]
    p["label_table"]["table"] = p["label_table"]["table"].at[3].set(row)
    out = apply(both, {"params": p}, codes, sigma, label)
    alone = {name: part for name, part in p.items() if name != "label_table"}
    second = p["sigma_embed"]["fc2"]
    for example, row in enumerate(p["label_table"]["table"][label]):
        alone["sigma_embed"] = p["sigma_embed"] | {"fc2": second | {"bias": second["bias"] + row}}
        model = small_prior(sigma_conditioning=True)
        one = apply(model, {"params": alone}, codes, sigma)[example]
        np.testing.assert_allclose(out[example], one, atol=1e-5)


def test_dropout_is_of_each_branch_and_each_example_by_its_own_key():
    """What a block adds, where nothing is dropped, is larger by 1 / (1 - share); else it is 0."""
    share, x, c = 0.25, normal(0, 64, L, 16), normal(1, 64, 8)
    angles, keys = positions.rotary(L, 8), jax.random.split(jax.random.key(3), 64)
    block = masked_transformer.Block(2, 4.0, None, share)
    p = drawn(block, x, angles, c)["params"]
    every = {}
    for name, dropped in (("mlp", "attention"), ("attention", "mlp")):  # the other adds nothing
        last = {"mlp": "fc2", "attention": "out"}[dropped]
        zero = {last: jax.tree.map(jnp.zeros_like, p[dropped][last])}
        q = p | {dropped: p[dropped] | zero}
        added = apply(block, {"params": q}, x, angles, c) - x
        found = apply(block, {"params": q}, x, angles, c, keys) - x
        kept = np.abs(found) > 1e-7
        np.testing.assert_allclose(found, np.where(kept, added / (1 - share), 0), atol=1e-5)
        assert abs((~kept).mean() - share) < 5 * np.sqrt(share * (1 - share) / kept.size), name
        every[name] = kept.reshape(64, -1)
        again = apply(block, {"params": q}, x[5:9], angles, c[5:9], keys[5:9]) - x[5:9]
        np.testing.assert_array_equal(np.abs(again) > 1e-7, kept[5:9])
    masks = np.concatenate(list(every.values()))
    assert len(np.unique(masks, axis=0)) == 128


def test_dropout_differs_between_layers_and_is_off_without_keys():
    codes, keys = integers(3, V + 1, 4, L), jax.random.split(jax.random.key(3), 4)
    model, off = small_prior(dropout=0.5), small_prior()
    variables = drawn(off, codes)
    np.testing.assert_array_equal(apply(model, variables, codes), apply(off, variables, codes))
    plain = apply(off, variables, codes, dropout_keys=keys)
    np.testing.assert_array_equal(plain, apply(off, variables, codes))
    out = apply(model, variables, codes, dropout_keys=keys)
    assert np.abs(out - plain).max() > 1e-2
    alone = apply(model, variables, codes[2:], dropout_keys=keys[2:])
    np.testing.assert_allclose(alone, out[2:], atol=1e-5)
    p = variables["params"]
    h, block = p["token_embed"][codes] + p["pos_embed"], masked_transformer.Block(2, 4.0, None, 0.5)
    for layer in range(2):  # each by keys of its own
        own = jax.vmap(lambda key, layer=layer: jax.random.fold_in(key, layer))(keys)
        one = {"params": jax.tree.map(lambda leaf, layer=layer: leaf[layer], p["blocks"])}
        h = apply(block, one, h, positions.rotary(L, 8), None, own)
    h = normalized(np.asarray(h), 1e-5) * p["final_norm"]["scale"]
    np.testing.assert_allclose(out, dense(p["final"], h), atol=1e-4)
    with pytest.raises(UserError, match="dropout=1"):
        apply(small_prior(dropout=1.0), variables, codes)
