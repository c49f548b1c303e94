"""Small networks, inputs and parameters for their tests, and their layers in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax.models import (
    dit,
    simplicial,
    vit,
)
from dlc_jax.models.encoder import Encoder
from dlc_jax.models.masked_transformer import MaskedTransformer

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


def small_vit(**fields):
    return vit.ViT(
        **{"image": 8, "patch": 2, "registers": 2, "layer_scale": 1.0, **SMALL, **fields}
    )


def small_encoder(readout="plain", **fields):
    fields = {"image": 8, "patch": 4, "registers": 2, "layer_scale": None, **SMALL, **fields}
    head = simplicial.Simplicial(L, V, readout=readout)
    return Encoder(vit.ViT(**fields), head, simplicial.DinoHead(6, hidden=8, bottleneck=4))


def small_dit(**fields):
    return dit.DiT(
        **{"image": 8, "channels": 3, "patch": 4, "positions": L, "values": V, **SMALL, **fields}
    )


def dit_inputs():
    codes = integers(3, V, 2, L)
    return normal(0, 2, 8, 8, 3), jnp.array([0.2, 0.9]), codes


def small_prior(**fields):
    return MaskedTransformer(**{"positions": L, "values": V, **SMALL, **fields})
