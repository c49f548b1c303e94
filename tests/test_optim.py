"""AdamW against its equations; what decays, goes slower and waits by name; clipping in parts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dlc_jax import optim
from dlc_jax.errors import UserError
from dlc_jax.models.dit import DiT
from dlc_jax.models.encoder import Encoder
from dlc_jax.models.vit import ViT
from dlc_jax.step import clip_norms

PAPER = "(?!.*(bias$|norm|gamma)).*"


def encoder(depth=3):
    """The names of an encoder's parameters, two numbers each; blocks stacked."""
    leaf, stack = jnp.array([1.0, -2.0]), jnp.ones((depth, 2)) * jnp.array([1.0, -2.0])
    vit = {name: leaf for name in ("pos_embed", "cls_token", "mask_token", "register_tokens")}
    vit |= {"patch_embed": {"kernel": leaf, "bias": leaf}, "norm": {"scale": leaf, "bias": leaf}}
    vit["blocks"] = {
        "mlp": {"fc1": {"kernel": stack, "bias": stack}},
        "norm1": {"scale": stack},
        "gamma1": stack,
    }
    head = {"fc1": {"kernel": leaf, "bias": leaf}, "direction": leaf, "gain": leaf}
    return {
        "vit": vit,
        "simplicial": {"embed": {"kernel": leaf}, "norm": {"scale": leaf}},
        "head": head,
    }


def adamw(steps, **options):
    """The optimizer of a recipe with these options, for `encoder()`."""
    return optim.AdamW(**options).make(steps, Encoder(ViT(depth=3)).layer)


def flat(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def follow(optimizer, params, grads):
    """The parameters after each gradient."""
    state, update = optimizer.tx.init(params), jax.jit(optimizer.tx.update)
    for grad in grads:
        updates, state = update(grad, state, params)
        params = optax.apply_updates(params, updates)
        yield flat(params)


def moved(steps=1, *, params=None, **options):
    """How far each parameter goes under gradients of 1, in learning rates: 1 a step, for Adam."""
    params = params or encoder()
    grads = [jax.tree.map(jnp.ones_like, params)] * steps
    *_, last = follow(adamw(100, learning_rate=1e-3, eps=0.0, **options), params, grads)
    return {name: (value - last[name]) / 1e-3 for name, value in flat(params).items()}


def test_adamw_with_every_schedule_against_numpy():
    rng, steps, warmup = np.random.default_rng(0), 12, 4
    params = {"a": {"kernel": jnp.array([0.5, -1.0]), "bias": jnp.array([2.0])}}
    grads = [
        {"a": {"kernel": rng.normal(size=2), "bias": rng.normal(size=1)}} for _ in range(steps)
    ]
    optimizer = adamw(
        steps,
        learning_rate=0.1,
        schedule="cosine",
        warmup=warmup,
        final=0.01,
        weight_decay=0.04,
        weight_decay_final=10.0,
    )
    found = list(follow(optimizer, params, jax.tree.map(jnp.float32, grads)))
    for name, start in flat(params).items():
        x, m, v = start.astype(float), 0.0, 0.0
        for t in range(steps):
            g = flat(grads[t])[name]
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            rest = min(max(t - warmup, 0) / (steps - warmup), 1)
            rate = (
                0.1 * t / warmup
                if t < warmup
                else 0.001 + (0.1 - 0.001) * 0.5 * (1 + np.cos(np.pi * rest))
            )
            decay = (
                (0.4 - (0.4 - 0.04) * 0.5 * (1 + np.cos(np.pi * t / steps)))
                if name.endswith("kernel")
                else 0.0
            )
            x = x - rate * (
                m / (1 - 0.9 ** (t + 1)) / (np.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-8) + decay * x
            )
            np.testing.assert_allclose(found[t][name], x, rtol=2e-5, err_msg=f"{name} {t}")
            np.testing.assert_allclose(optimizer.learning_rate(t), rate, rtol=1e-5, atol=1e-9)


def test_plain_options_are_optax_adamw():
    params = encoder()
    grads = [jax.tree.map(lambda leaf, i=i: jnp.cos(leaf + i), params) for i in range(5)]
    kernels = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
    theirs = optim.Optimizer(optax.adamw(0.01, weight_decay=0.1, mask=kernels), None)
    for ours, other in zip(
        follow(adamw(5, learning_rate=0.01, weight_decay=0.1), params, grads),
        follow(theirs, params, grads),
    ):
        for name in ours:
            np.testing.assert_allclose(ours[name], other[name], rtol=1e-6, err_msg=name)


def test_what_decays():
    with_decay = {
        pattern: moved(weight_decay=0.5, decayed=pattern) for pattern in ("(.*/)?kernel", PAPER)
    }
    decays = {
        pattern: {name for name, far in found.items() if far[0].max() > 1.2}
        for pattern, found in with_decay.items()
    }
    kernels = {name for name in flat(encoder()) if name.endswith("kernel")}
    assert decays["(.*/)?kernel"] == kernels
    tokens = {f"vit/{name}" for name in ("pos_embed", "cls_token", "mask_token", "register_tokens")}
    assert decays[PAPER] == kernels | tokens | {"head/direction", "head/gain"}


def test_layers_learn_the_slower_the_lower():
    found = moved(layer_decay=0.9, multipliers=(("vit/patch_embed/.*", 0.2),))
    for name in ("mlp/fc1/kernel", "mlp/fc1/bias", "norm1/scale", "gamma1"):
        np.testing.assert_allclose(
            found[f"vit/blocks/{name}"], np.array([[0.9**3], [0.9**2], [0.9]]) * [1, 1], rtol=1e-3
        )
    for name in ("pos_embed", "cls_token", "mask_token", "register_tokens"):
        np.testing.assert_allclose(found[f"vit/{name}"], 0.9**4, rtol=1e-3)
    for name in ("kernel", "bias"):
        np.testing.assert_allclose(found[f"vit/patch_embed/{name}"], 0.2 * 0.9**4, rtol=1e-3)
    rest = {
        name: far
        for name, far in found.items()
        if not name.startswith("vit/") or "vit/norm" in name
    }
    assert len(rest) == 8
    for name, far in rest.items():
        np.testing.assert_allclose(far, 1, rtol=1e-3, err_msg=name)


def test_what_goes_slower_decays_slower():
    found = moved(weight_decay=0.5, multipliers=(("head/fc1/kernel", 0.1),))
    np.testing.assert_allclose(
        found["head/fc1/kernel"], [0.15, 0.0], atol=1e-4
    )  # 1 + 0.5 * 1 and 1 - 0.5 * 2
    np.testing.assert_allclose(found["simplicial/embed/kernel"], [1.5, 0.0], atol=1e-3)


def test_what_is_frozen_stays_and_then_goes_on_without_a_jump():
    params, steps = encoder(), 8
    freeze = (("head/(direction|gain)", 3), ("vit/.*", 6))
    grads = [jax.tree.map(jnp.ones_like, params)] * steps
    before, start = flat(params), flat(params)
    optimizer = adamw(steps, learning_rate=1e-3, weight_decay=0.5, decayed=PAPER, freeze=freeze)
    for step, after in enumerate(follow(optimizer, params, grads)):
        for name, value in after.items():
            until = (
                3
                if name in ("head/direction", "head/gain")
                else 6
                if name.startswith("vit/")
                else 0
            )
            if step < until:
                np.testing.assert_array_equal(value, start[name], err_msg=f"{name} {step}")
            else:
                far = (before[name] - value) / 1e-3
                assert 0 <= far.min() and far.max() < 1.6 and far.max() > 0.9, (name, step)
        before = after


def test_an_empty_choice_changes_no_state():
    """A run may be given `freeze` when it goes on: what is saved is the same."""
    plain, frozen = (
        adamw(5, freeze=freeze).tx.init(encoder()) for freeze in ((), (("vit/.*", 3),))
    )
    assert jax.tree.structure(plain) == jax.tree.structure(frozen)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"freeze": (("vti/.*", 3),)},
            "optimizer.freeze: 'vti/.*' matches no parameter; their names are like head/direction",
        ),
        (
            {"freeze": (("head", 3),)},
            "optimizer.freeze: 'head' matches no parameter",
        ),  # the whole name
        (
            {"multipliers": (("head/(", 0.5),)},
            r"optimizer.multipliers: 'head/\(' is an invalid regular expression",
        ),
        (
            {"weight_decay": 0.1, "decayed": "kernel"},
            "optimizer.decayed: 'kernel' matches no parameter",
        ),
        ({"schedule": "step"}, "optimizer.schedule='step' is unknown"),
    ],
)
def test_mistakes_are_told_before_the_first_step(options, message):
    with pytest.raises(UserError, match=message):
        jax.eval_shape(adamw(5, **options).tx.init, encoder())


def test_parts_are_clipped_for_themselves():
    grads = {
        "vit": {"a": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])},
        "head": {"c": jnp.array([0.6]), "d": jnp.array([0.8])},
    }
    clipped = flat(clip_norms(grads, 2.0, ("head/.*",)))
    np.testing.assert_allclose(clipped["vit/a"], np.array([3.0, 4.0]) * 2 / 13, rtol=1e-6)
    np.testing.assert_allclose(clipped["vit/b"], 24 / 13, rtol=1e-6)
    np.testing.assert_allclose(
        [clipped["head/c"][0], clipped["head/d"][0]], [0.6, 0.8], rtol=1e-6
    )  # shorter than 2
    whole = flat(clip_norms(grads, 2.0))
    assert sum((value**2).sum() for value in whole.values()) == pytest.approx(4.0)
    several = flat(clip_norms(grads, 0.1, (".*/c", "head/.*")))  # the first that matches counts
    np.testing.assert_allclose([several["head/c"][0], several["head/d"][0]], [0.1, 0.1], rtol=1e-6)
    for apart, message in (
        (("body/.*",), "matches no parameter"),
        (("head/.*", ".*/c"), r"'\.\*/c' matches no"),
        (("(",), "invalid regular"),
    ):
        with pytest.raises(UserError, match=f"train.clip_separately.*{message}"):
            clip_norms(grads, 1.0, apart)


def test_muon_makes_the_matrices_of_every_layer_orthogonal_and_leaves_the_rest_to_adam():
    """Queries, keys, values, gate and up each; root mean square as Adam's, `scale` of the rate."""
    sizes = {"image": 8, "channels": 3, "patch": 4, "width": 32, "depth": 2, "heads": 4}
    model = DiT(**sizes, positions=4, values=5, block="modern", cross=2)
    inputs = jnp.zeros((1, 8, 8, 3)), jnp.zeros(1), jnp.zeros((1, 4), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    grads = jax.tree.map(
        lambda leaf: jnp.asarray(np.random.default_rng(leaf.size).normal(size=leaf.shape)), params
    )
    tx = optim.Muon(learning_rate=0.01).make(10, model.layer).tx
    updates, _ = jax.jit(tx.update)(grads, tx.init(grads), grads)
    adam, _ = optax.adam(0.01).update(grads, optax.adam(0.01).init(grads))
    of_blocks, adams = updates["blocks"], adam["blocks"]
    cross, mlp = of_blocks["cross_attention"], of_blocks["mlp"]
    matrices = [of_blocks["attention"]["qkv"]["kernel"][1, :, part] for part in range(3)]
    matrices += [cross["q"]["kernel"][1], cross["kv"]["kernel"][1, :, 1]]
    matrices += [mlp["fc1"]["kernel"][1, :, 0], mlp["fc2"]["kernel"][1]]
    for matrix in matrices:
        flat = np.asarray(matrix).reshape(len(matrix), -1) / 0.01
        values = np.linalg.svd(flat, compute_uv=False) / (0.2 * np.sqrt(max(flat.shape)))
        # five steps of Newton-Schulz; the gradient's own are from 0.01 to 2
        assert 0.3 < values.min() and np.median(values) > 0.65 and values.max() < 1.3
    for path in (("modulation", "kernel"), ("modulation", "bias")):
        one, other = of_blocks, adams
        for name in path:
            one, other = one[name], other[name]
        np.testing.assert_allclose(one, other, rtol=1e-4)
    np.testing.assert_allclose(updates["final"]["kernel"], adam["final"]["kernel"], rtol=1e-4)
