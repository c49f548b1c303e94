"""Attention and its gradients in float64, and inputs to compare others with it."""

import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax.models.positions import rotary

OPTIONS = ("mask", "rotary", "qk_scale", "causal")


def inputs(b, n, h, k, dtype, options=(), seed=0):
    """(qkv, the gradient of the output, keyword arguments of `attention`), all random."""
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
    """[out, gradient of qkv, of both of qk_scale], of a function like `attention`."""

    def both(qkv, qk_scale, out_grad):
        out, back = jax.vjp(lambda x, s: attention(x, qk_scale=s, **given), qkv, qk_scale)
        return jax.tree.leaves((out, back(out_grad)))

    return jax.jit(both)(qkv, qk_scale, out_grad)


def exact(qkv, *, mask=None, rotary=None, qk_scale=None, causal=False):
    """As `attention`, in the dtype of its inputs throughout; no line is shared with it."""
    q, k, v = (qkv[:, :, part] for part in range(3))
    if qk_scale is not None:
        q, k = (
            x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale
            for x, scale in zip((q, k), qk_scale)
        )
    if rotary is not None:
        half = q.shape[-1] // 2
        turn = (rotary[0] + 1j * rotary[1])[:, None]
        q, k = ((x[..., :half] + 1j * x[..., half:]) * turn for x in (q, k))
        q, k = (jnp.concatenate([x.real, x.imag], -1) for x in (q, k))
    n = q.shape[1]
    reads = np.tril(np.ones((n, n), bool)) if causal else np.ones((n, n), bool)
    reads = reads if mask is None else reads & mask[:, None, None]
    logits = jnp.einsum("bnhk,bmhk->bhnm", q, k) / q.shape[-1] ** 0.5
    weights = jnp.where(reads, jnp.exp(logits - logits.max(-1, keepdims=True)), 0)
    return jnp.einsum("bhnm,bmhk->bnhk", weights / weights.sum(-1, keepdims=True), v)


def errors(attention, qkv, out_grad, given):
    """Largest error of each of `gradients`, as parts of the largest number there."""
    found = gradients(attention, qkv, out_grad, **given)
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        wide = jax.tree.map(
            lambda x: (
                x
                if isinstance(x, bool)
                else np.asarray(x, x.dtype if x.dtype == bool else np.float64)
            ),
            (qkv, out_grad, given),
        )
        expected = gradients(exact, *wide[:2], **wide[2])
        expected = [np.asarray(x) for x in expected]
    assert expected[0].dtype == np.float64
    found = [np.asarray(x, np.float64) for x in found]
    return [float(np.abs(x - y).max() / np.abs(y).max()) for x, y in zip(found, expected)]
