"""How far an implementation of attention is from float64, on random inputs."""

import jax
import jax.numpy as jnp
import numpy as np
from exact_attention import exact

from dlc_jax.models.positions import rotary

OPTIONS = ("mask", "rotary", "qk_scale", "causal")


def inputs(b, n, h, k, dtype, options=(), seed=0):
    """(qkv, a gradient of the output, arguments of `attention` by name), all random."""
    random = np.random.default_rng(seed)
    mask = random.random((b, n)) < 0.6
    mask[:, 0] = True
    given = {
        "mask": jnp.asarray(mask),
        "rotary": rotary(n, k),
        "qk_scale": tuple(jnp.asarray(random.uniform(0.5, 2, size=(2, k)), jnp.float32)),
        "causal": True,
    }
    qkv = jnp.asarray(random.normal(size=(b, n, 3, h, k)), dtype)
    out_grad = jnp.asarray(random.normal(size=(b, n, h, k)), dtype)
    return qkv, out_grad, {name: given[name] for name in options}


def gradients(attention, qkv, out_grad, *, qk_scale=None, **given):
    """[output, gradient of qkv, of qk_scale [2, k] if given] of a function like `attention`."""

    @jax.jit
    def both(qkv, qk_scale, out_grad):
        out, pull = jax.vjp(lambda x, s: attention(x, qk_scale=s, **given), qkv, qk_scale)
        grad, scale_grads = pull(out_grad)
        return [out, grad] + ([jnp.stack(scale_grads)] if scale_grads else [])

    return both(qkv, qk_scale, out_grad)


def errors(attention, qkv, out_grad, given):
    """Largest error of each of `gradients`, as a share of the largest number there."""
    found = gradients(attention, qkv, out_grad, **given)
    found = [np.asarray(x, np.float64) for x in found]
    wanted = exact(qkv, out_grad, **given)
    return [float(np.abs(x - y).max() / np.abs(y).max()) for x, y in zip(found, wanted)]
