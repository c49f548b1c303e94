"""What a DiT may have beside the paper's: conditions, modern blocks, heads, token dropping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from small_models import (
    KEY,
    L,
    V,
    apply,
    dense,
    embedded,
    integers,
    normal,
    normalized,
    silu,
    small_dit,
    to_bfloat16,
)
from small_models import drawn as drawn_variables

from dlc_jax import parallel
from dlc_jax.errors import UserError
from dlc_jax.models import dit, dit_block, layers, positions
from dlc_jax.typing import Condition, Given

CODES, LABEL, T = integers(3, V, 2, L), jnp.array([2, 0]), jnp.array([0.2, 0.9])
X = normal(0, 2, 16, 16, 3)
EMBEDDING = normal(4, 2, 6)
KEEP = jnp.array([[9, 0, 3, 15, 6], [1, 2, 15, 4, 8]])
GIVEN = Given(CODES, LABEL, EMBEDDING, jnp.array([True, False]))


def model(**fields):
    return small_dit(**{"image": 16, "depth": 3, **fields})


def drawn(network):
    return drawn_variables(network, X, T)


def everything(**fields):
    full = {"block": "modern", "qk_norm": True, "context": 2, "cross": 4, "early": 2, "route": True}
    full |= {"head_width": 24, "head_depth": 2, "align": 3, "align_width": 5}
    return model(**{"depth": 5, "classes": 3, "embedding": 6, **full, **fields})


def later(values):
    """A case that only the slow tests run."""
    return pytest.param(*values, marks=pytest.mark.slow)


def close(found, expected, atol=1e-4):
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=atol)


# What it is given.


def test_every_part_has_a_null_and_adds_to_the_vector():
    network = model(classes=3, embedding=6)
    variables = drawn(network)

    def vector(**given):
        return apply(network, variables, Given(**given), method="embed").vector

    null = vector()
    assert null.shape == (1, 16)
    parts = {"codes": CODES, "label": LABEL, "embedding": EMBEDDING}
    alone = {name: vector(**{name: part}) for name, part in parts.items()}
    assert all(np.abs(one - null).max() > 1e-2 for one in alone.values())
    close(vector(**parts), sum(alone.values()) - 2 * null)
    nulls = {"codes": jnp.full_like(CODES, V), "label": jnp.array([3, 3])}
    nulls |= {"embedding": EMBEDDING, "drop": jnp.array([True, True])}
    close(vector(**nulls), np.broadcast_to(null, (2, 16)))
    mixed = vector(embedding=EMBEDDING, drop=jnp.array([True, False]))
    close(mixed, jnp.stack([null[0], alone["embedding"][1]]))
    close(vector(codes=jax.nn.one_hot(CODES, V)), alone["codes"])


def test_a_code_or_label_out_of_range_makes_its_example_nan():
    network = model(classes=3, context=2, cross=2)
    variables = drawn(network)
    for given in (Given(label=jnp.array([4, 1])), Given(label=jnp.array([-1, 1]))):
        out = apply(network, variables, X, T, given)
        assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()
    for code in (V + 1, -1):
        condition = apply(network, variables, CODES.at[0, 3].set(code), method="embed")
        for part in (condition.vector, condition.context, condition.tokens[:, :2]):
            assert np.isnan(part[0]).any() and np.isfinite(part[1]).all()


def test_code_tokens_are_runs_of_positions_of_variance_one():
    table = dit.CodeTable(64, 9, 32)
    codes = integers(0, 9, 4, 64)
    variables = table.init(KEY, codes)
    rows = variables["params"]["table"][jnp.arange(64), codes].reshape(4, 8, 8, 32)

    def tokens(codes):
        return table.apply(variables, codes, 8, method="tokens")

    close(tokens(codes), rows.mean(2) * (32 * 8) ** 0.5)
    assert abs(float(tokens(codes).std()) - 1) < 0.1
    close(tokens(jax.nn.one_hot(codes, 9)), tokens(codes))
    close(jnp.broadcast_to(tokens(None), (4, 8, 32)), tokens(jnp.full_like(codes, 9)))


@pytest.mark.slow
@pytest.mark.parametrize("option", ["context", "cross"])
def test_tokens_of_codes_reach_the_patches(option):
    network = model(**{option: 2})
    variables = drawn(network)
    condition = apply(network, variables, CODES, method="embed")
    field = {"context": "context", "cross": "tokens"}[option]
    tokens = getattr(condition, field)
    assert tokens.shape == (2, 2 + (option == "cross"), 16)

    def out(**parts):
        return apply(network, variables, X, T, condition._replace(**parts), method="denoise")

    plain = out()
    close(plain, apply(network, variables, X, T, CODES))
    assert np.abs(out(**{field: tokens.at[:, 1].add(normal(7, 16))}) - plain).max() > 1e-3
    if option == "cross":  # any number of tokens, of which some count
        mask = jnp.array([[True, False, True]] * 2)
        masked = out(mask=mask)
        close(masked, out(tokens=tokens[:, ::2]))
        assert np.abs(masked - plain).max() > 1e-3
    # null codes: of one example, for all
    close(
        apply(network, variables, X, T, None),
        apply(network, variables, X, T, jnp.full_like(CODES, V)),
    )


@pytest.mark.slow
def test_nothing_but_the_null_token_is_there_when_codes_are_masked():
    network = model(cross=2)
    variables = drawn(network)
    condition = apply(network, variables, CODES, method="embed")
    other = apply(network, variables, (CODES + 1) % V, method="embed")
    mask = jnp.array([[False, False, True]] * 2)
    masked = [
        apply(network, variables, X, T, one._replace(mask=mask, vector=None), method="denoise")
        for one in (condition, other)
    ]
    close(*masked)


# How it starts.


@pytest.mark.slow
@pytest.mark.parametrize(
    "option",
    [{"cross": 2}, {"early": 2}, {"align": 1, "align_width": 5}, {"classes": 3}],
    ids=str,
)
def test_what_starts_at_zero_leaves_the_network_as_it_is(option):
    plain, network = model(), model(**option)
    theirs, variables = drawn(plain)["params"], jax.jit(network.init)(KEY, X, T)["params"]
    merged = jax.tree.map(lambda leaf: leaf, variables)

    def put(into, there):
        for name, leaf in there.items():
            if isinstance(leaf, dict):
                put(into[name], leaf)
            else:
                into[name] = leaf

    put(merged, theirs)
    if "classes" in option:
        merged["label_table"]["table"] = jnp.zeros((4, 16))
    expected = apply(plain, {"params": theirs}, X, T, CODES)
    close(apply(network, {"params": merged}, X, T, CODES), expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [None, KEEP], ids=["all", "some"])
def test_routed_and_in_context_blocks_start_as_the_identity(keep):
    network = model(depth=5, route=True, context=2)
    params = jax.jit(network.init)(KEY, X, T)["params"]
    p = jax.tree.map(np.asarray, params)
    params["final"]["kernel"] = kernel = normal(0, *params["final"]["kernel"].shape)
    h = start(p)
    if keep is not None:  # a dropped patch is half the token that it was, and half of the mask's
        kept = np.zeros((2, 16, 1))
        np.put_along_axis(kept, np.asarray(keep)[..., None], 1, axis=1)
        h = np.where(kept, h, h / 2)
    expected = layers.unpatchify(jnp.asarray(normalized(h, 1e-6) @ kernel), 4)
    close(apply(network, {"params": params}, X, T, CODES, keep=keep), expected)


# What it computes.


def start(p):
    """Patches in the first block, [b n d]."""
    h = dense(p["patch_embed"], np.asarray(layers.patchify(X, 4), np.float64))
    return h + positions.sincos_2d(4, 4, h.shape[-1])


def time(p):
    return embedded(p["time_embed"], 1000 * np.asarray(T, np.float64))


def block_of(network):
    numbers = (network.heads, network.mlp_ratio, network.qk_norm, None)
    return dit.Block(*numbers, network.block, bool(network.cross))


def one(block, p, number, h, *args):
    params = jax.tree.map(lambda leaf: leaf[number], p)
    return np.asarray(apply(block, {"params": params}, jnp.asarray(h, jnp.float32), *args))


def test_modern_block():
    x, c = normal(0, 2, 4, 16), normal(1, 2, 4, 16)  # a condition for each token
    turn = positions.axial_rotary(2, 8)
    block = dit.Block(2, 4.0, False, None, "modern")
    p = drawn_variables(block, x, c, turn)["params"]
    assert {name for name, part in p["attention"].items() if "bias" in part} == set()
    assert p["mlp"]["fc1"]["kernel"].shape == (16, 2, 48)  # two thirds of 64, up to eights
    parts = jnp.split(c @ p["modulation"]["kernel"] + p["modulation"]["bias"], 6, axis=-1)
    shift1, scale1, gate1, shift2, scale2, gate2 = parts

    def norm(x):
        return x / np.sqrt((np.asarray(x, np.float64) ** 2).mean(-1, keepdims=True) + 1e-6)

    attend = layers.Attention(2, use_bias=False)
    read = jnp.asarray(norm(x) * (1 + scale1) + shift1, jnp.float32)
    y = x + gate1 * apply(attend, {"params": p["attention"]}, read, rotary=turn)
    h = norm(y) * (1 + scale2) + shift2
    up = np.einsum("bnd,dph->bnph", h, p["mlp"]["fc1"]["kernel"])
    y = y + gate2 * ((silu(up[:, :, 0]) * up[:, :, 1]) @ p["mlp"]["fc2"]["kernel"])
    close(apply(block, {"params": p}, x, c, turn), y)


def test_cross_attention_reads_between_attention_and_mlp():
    x, c, tokens = normal(0, 2, 4, 16), normal(1, 2, 16), normal(2, 2, 3, 16)
    block = dit.Block(2, 4.0, False, None, "dit", True)
    p = drawn_variables(block, x, c, None, tokens)["params"]
    plain = {name: part for name, part in p.items() if name != "cross_attention"}
    zero = jax.tree.map(lambda leaf: leaf, plain)  # without the MLP, whose gate is closed
    columns = slice(5 * 16, None)
    zero["modulation"] = {
        "kernel": p["modulation"]["kernel"].at[:, columns].set(0),
        "bias": p["modulation"]["bias"].at[columns].set(0),
    }
    first = apply(dit.Block(2, 4.0, False, None), {"params": zero}, x, c)
    cross = p["cross_attention"]
    q = (dense_flat(cross["q"], normalized(np.asarray(first, np.float64), 1e-6))).reshape(
        2, 4, 2, 8
    )
    k, v = np.moveaxis(dense_flat(cross["kv"], np.asarray(tokens)).reshape(2, 3, 2, 2, 8), 2, 0)
    weight = np.exp(np.einsum("bnhk,bmhk->bhnm", q, k) / 8**0.5)
    weight /= weight.sum(-1, keepdims=True)
    y = first + dense(cross["out"], np.einsum("bhnm,bmhk->bnhk", weight, v).reshape(2, 4, 16))
    parts = np.split(dense(p["modulation"], np.asarray(c)), 6, axis=-1)
    shift, scale, gate = (part[:, None] for part in parts[3:])
    h = jnp.asarray(normalized(y, 1e-6) * (1 + scale) + shift, jnp.float32)
    y = y + gate * apply(layers.Mlp(64, gelu="tanh"), {"params": p["mlp"]}, h)
    close(apply(block, {"params": p}, x, c, None, tokens), y)


def dense_flat(p, x):
    kernel = np.asarray(p["kernel"], np.float64)
    return x @ kernel.reshape(len(kernel), -1) + np.asarray(p["bias"]).reshape(-1)


@pytest.mark.parametrize("early", [1, 2])
def test_the_early_head_reads_its_block(early):
    """It is the final layer of a network of that depth."""
    network = model(early=early)
    params = drawn(network)["params"]
    short = {name: part for name, part in params.items() if name != "early_head"}
    short["blocks"] = jax.tree.map(lambda leaf: leaf[:early], params["blocks"])
    short |= {"final_modulation": params["early_head"]["modulation"]}
    short |= {"final": params["early_head"]["out"]}
    found = apply(network, {"params": params}, X, T, CODES, method="all")
    close(found.early, apply(model(depth=early), {"params": short}, X, T, CODES))
    close(found.output, apply(network, {"params": params}, X, T, CODES), atol=1e-5)
    assert np.abs(found.early - found.output).max() > 1e-2 and found.aligned is None


@pytest.mark.parametrize("align", [1, later((3,))])
def test_alignment_is_a_convolution_of_its_blocks_patches(align):
    network = model(align=align, align_width=5, context=2)
    p = jax.tree.map(np.asarray, drawn(network)["params"])
    condition = apply(network, {"params": p}, CODES, method="embed")
    h = np.concatenate([condition.context, start(p)], axis=1)
    c = jnp.asarray(silu(time(p) + condition.vector), jnp.float32)
    for number in range(align):
        h = one(block_of(network), p["blocks"], number, h, c)
    grid = np.pad(h[:, 2:].reshape(2, 4, 4, 16), ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = p["aligner"]["bias"] + sum(
        grid[:, row : row + 4, column : column + 4] @ p["aligner"]["kernel"][row, column]
        for row in range(3)
        for column in range(3)
    )
    found = apply(network, {"params": p}, X, T, CODES, method="all")
    close(found.aligned, expected.reshape(2, 16, 5), atol=1e-3)
    assert found.early is None


@pytest.mark.parametrize(
    "kind, keep",
    [("dit", KEEP), *map(later, [("dit", None), ("modern", KEEP)])],
    ids=["some", "all", "some, modern"],
)
def test_middle_blocks_see_the_kept_patches_alone(kind, keep):
    network = model(depth=6, route=True, context=2, block=kind, early=3)
    p = jax.tree.map(np.asarray, drawn(network)["params"])
    condition = apply(network, {"params": p}, CODES, method="embed")
    c = jnp.asarray(silu(time(p) + condition.vector), jnp.float32)
    block, turn = block_of(network), None
    if kind == "modern":
        turn = positions.axial_rotary(4, 8, before=2)
    h = np.concatenate([condition.context, start(p)], axis=1)
    for number in (0, 1):
        h = one(block, p["blocks"], number, h, c, turn)
    rows = np.tile(np.arange(18), (2, 1))
    if keep is not None:
        rows = np.concatenate([rows[:, :2], 2 + np.asarray(keep)], axis=1)

    def fused(middle):
        full = np.tile(p["fusion"]["mask"], (2, 18, 1))
        np.put_along_axis(full, rows[..., None], middle, axis=1)
        return dense(p["fusion"]["dense"], np.concatenate([h, full], axis=-1))

    middle = np.stack([h[example, rows[example]] for example in (0, 1)])
    for number in (2, 3):
        here = turn
        if turn is not None:
            here = tuple(jnp.asarray(np.asarray(table)[rows]) for table in turn)
        middle = one(block, p["blocks"], number, middle, c, here)
        early = fused(middle) if number == 2 else early
    h = fused(middle)
    for number in (4, 5):
        h = one(block, p["blocks"], number, h, c, turn)

    def end(h, modulation, final):
        shift, scale = np.split(dense(modulation, np.asarray(c))[:, None], 2, axis=-1)
        mean_square = np.sqrt((h**2).mean(-1, keepdims=True) + 1e-6)
        h = normalized(h, 1e-6) if kind == "dit" else h / mean_square
        return layers.unpatchify(jnp.asarray(dense(final, h * (1 + scale) + shift)[:, 2:]), 4)

    found = apply(network, {"params": p}, X, T, CODES, keep=keep, method="all")
    close(found.output, end(h, p["final_modulation"], p["final"]), atol=1e-3)
    close(found.early, end(early, p["early_head"]["modulation"], p["early_head"]["out"]), atol=1e-3)
    if keep is not None:  # in any order
        again = apply(network, {"params": p}, X, T, CODES, keep=keep[:, ::-1])
        close(again, found.output, atol=1e-5)


@pytest.mark.parametrize("kind", ["dit", later(("modern",))])
def test_the_wide_head_is_blocks_modulated_by_the_encoders_tokens(kind):
    network = model(head_width=24, head_depth=2, block=kind)
    p = jax.tree.map(np.asarray, drawn(network)["params"])
    vector = apply(network, {"params": p}, CODES, method="embed").vector
    c, turn = jnp.asarray(silu(time(p) + vector), jnp.float32), None
    h, block = start(p), block_of(network)
    if kind == "modern":
        turn = positions.axial_rotary(4, 8)
    for number in range(3):
        h = one(block, p["blocks"], number, h, c, turn)
    head = p["head"]
    c = silu(dense(head["project"], time(p)[:, None] + h))
    h = dense(head["patch_embed"], np.asarray(layers.patchify(X, 4)))
    h = h + positions.sincos_2d(4, 4, 24)
    if kind == "modern":
        turn = positions.axial_rotary(4, 12)
    for number in (0, 1):
        h = one(block, head["blocks"], number, h, jnp.asarray(c, jnp.float32), turn)
    shift, scale = np.split(dense(p["final_modulation"], c), 2, axis=-1)
    norm = normalized(h, 1e-6) if kind == "dit" else h / np.sqrt((h**2).mean(-1, keepdims=True))
    out = dense(p["final"], norm * (1 + scale) + shift)
    expected = layers.unpatchify(jnp.asarray(out), 4)
    close(apply(network, {"params": p}, X, T, CODES), expected, atol=1e-3)


# All of it together.


def gradients(network, params, keep=KEEP):
    def weigh(params):
        outputs = network.apply({"params": params}, X, T, GIVEN, keep=keep, method="all")
        return sum((normal(9, *leaf.shape) * leaf).mean() for leaf in jax.tree.leaves(outputs))

    return jax.jit(jax.grad(weigh))(params)


def relative(found, expected):
    """{path: error of a leaf in multiples of its norm}."""
    found, expected = (jax.tree.leaves_with_path(tree) for tree in (found, expected))
    return {
        jax.tree_util.keystr(path): float(
            np.linalg.norm(a.astype(jnp.float32) - b) / np.linalg.norm(b)
        )
        for (path, a), (_, b) in zip(found, expected, strict=True)
    }


@pytest.mark.slow
def test_every_parameter_gets_the_same_gradient_however_blocks_are_stored():
    params = drawn(everything())["params"]
    expected = gradients(everything(remat="none"), params)
    silent = {path for path, error in relative(expected, expected).items() if error != 0}
    assert silent == set()  # no norm is 0
    for remat, unroll in (("dots", 1), ("full", 1), ("dots", 0)):
        found = relative(gradients(everything(remat=remat, unroll=unroll), params), expected)
        assert max(found.values()) < 1e-3, max(found.items(), key=lambda item: item[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "network, keep",
    [(model(classes=3, embedding=6, qk_norm=True), None), (everything(), KEEP)],
    ids=["plain", "everything"],
)
def test_bfloat16_gradients_are_those_of_float32_leaf_by_leaf(network, keep):
    # larger weights make a wide head that turns small errors into large ones
    params = drawn_variables(network, X, T, scale=0.1)["params"]
    wide = gradients(network, params, keep)
    narrow = gradients(network, to_bfloat16(params), keep)
    errors = relative(narrow, wide)
    assert max(errors.values()) < 0.05, max(errors.items(), key=lambda item: item[1])


@pytest.mark.slow
def test_eight_devices_compute_what_one_does(monkeypatch):
    monkeypatch.setattr(parallel, "SMALLEST", 1)  # everything is split
    network = everything(values=V + 2)
    params = drawn(network)["params"]
    batch = [jnp.concatenate([part] * 4) for part in (X, T, KEEP)]
    given = Given(*(jnp.concatenate([part] * 4) for part in GIVEN))

    def weigh(params, x, t, keep, given):
        outputs = network.apply({"params": params}, x, t, given, keep=keep, method="all")
        return sum((normal(9, *leaf.shape) * leaf).mean() for leaf in outputs)

    expected = jax.jit(jax.grad(weigh))(params, *batch, given)
    mesh = parallel.make_mesh(fsdp=2, tensor=2)
    placed = jax.device_put(params, parallel.shardings(params, mesh, rules=network.rules))
    with jax.set_mesh(mesh):
        rows = parallel.to_global((*batch, given), mesh)
        found = jax.jit(jax.grad(weigh))(placed, *rows)
    errors = relative(jax.device_get(found), expected)
    assert max(errors.values()) < 1e-3, max(errors.items(), key=lambda item: item[1])


def test_rules_split_heads_hidden_units_and_tables():
    network = everything(width=128, heads=4, head_width=256, classes=2000, positions=8, values=600)
    shapes = jax.eval_shape(network.init, KEY, X, T)["params"]
    mesh = AbstractMesh((1, 2, 2), parallel.AXES, axis_types=(AxisType.Auto,) * 3)
    found = parallel.shardings(shapes, mesh, rules=network.rules)
    spec = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.spec
        for path, leaf in jax.tree.leaves_with_path(found)
    }
    assert spec["code_table/table"][-1] == spec["label_table/table"][-1] == "fsdp"
    for path, axis in (
        ("blocks/attention/qkv/kernel", 3),
        ("blocks/cross_attention/q/kernel", 2),
        ("blocks/cross_attention/kv/kernel", 3),
        ("blocks/cross_attention/out/kernel", 1),
        ("blocks/mlp/fc1/kernel", 3),
        ("head/blocks/attention/qkv/kernel", 3),
        ("head/blocks/mlp/fc2/kernel", 1),
    ):
        assert spec[path][axis] == "tensor" and spec[path][0] is None, path


def test_layers_are_counted_from_the_output():
    network = everything()
    shapes = jax.eval_shape(network.init, KEY, X, T)["params"]
    found = {}
    for path, leaf in jax.tree.leaves_with_path(shapes):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found[name] = network.layer(name, leaf.shape)
    np.testing.assert_array_equal(found["blocks/mlp/fc1/kernel"], [7, 6, 5, 4, 3])
    np.testing.assert_array_equal(found["head/blocks/mlp/fc1/kernel"], [2, 1])
    assert found["patch_embed/kernel"] == 8 and found["head/patch_embed/kernel"] == 3
    assert found["final/kernel"] == found["code_table/table"] == 0


REFUSED = {
    "an odd context": ({"context": 3}, "context=3 tokens of codes of 4 positions"),
    "cross without codes": ({"cross": 2, "positions": 0, "values": 0}, "cross=2"),
    "early at the end": ({"early": 3}, "early=3 is not a block in 1..2"),
    "align beyond": ({"align": 4, "align_width": 5}, "align=4 is not a block in 1..3"),
    "align without a width": ({"align": 2}, "align_width=0"),
    "half a head": ({"head_width": 24}, "head_depth=0"),
    "a head that heads do not divide": ({"head_width": 25, "head_depth": 1}, "head_width=25"),
    "route in few blocks": ({"route": True}, "more than 4 blocks"),
    "no such block": ({"block": "modem"}, "block='modem' is not one of dit, modern"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_fields_that_do_not_fit_are_refused(case):
    fields, words = REFUSED[case]
    with pytest.raises(UserError, match=words):
        jax.eval_shape(model(**fields).init, KEY, X, T)


@pytest.mark.parametrize(
    "given, words",
    [
        (Given(label=LABEL), "no label; set classes"),
        (Given(embedding=EMBEDDING), "no embedding; set embedding"),
        (jnp.zeros((2, L + 1), jnp.int32), f"{L} positions x {V} values"),
        (Condition(context=jnp.zeros((2, 2, 16))), "has context tokens"),
        (Condition(tokens=jnp.zeros((2, 2, 16))), "has cross tokens"),
    ],
)
def test_what_it_does_not_read_is_refused(given, words):
    network = model()
    method = "denoise" if isinstance(given, Condition) else None
    with pytest.raises(UserError, match=words):
        apply(network, drawn(network), X, T, given, method=method)


def test_of_another_shape_is_refused():
    network = model(classes=3, embedding=6, context=2)
    variables = drawn(network)
    for given, words in (
        (Given(label=LABEL[:, None]), "one class number an example"),
        (Given(embedding=EMBEDDING[:, 1:]), "do not fit a DiT with 6"),
    ):
        with pytest.raises(UserError, match=words):
            apply(network, variables, X, T, given)
    with pytest.raises(UserError, match="lacks context tokens"):
        apply(network, variables, X, T, Condition(), method="denoise")
    with pytest.raises(UserError, match="route=True"):
        apply(network, variables, X, T, CODES, keep=KEEP)
    with pytest.raises(UserError, match="kind"):
        dit_block.plain_norm("kind")
