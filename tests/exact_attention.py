"""Attention and its gradients in float64, written with numpy from the equations."""

import numpy as np


def exact(qkv, dout, *, mask=None, rotary=None, qk_scale=None, causal=False):
    """(output, gradient of the projection, gradients of the scales [2, k]) for a gradient `dout`.

    Arguments as those of `dlc_jax.kernels.attention.attention`. Rotations are products with complex
    numbers. The last is zero without scales.
    """
    qkv, dout = np.asarray(qkv, np.float64), np.asarray(dout, np.float64)
    n, k = qkv.shape[1], qkv.shape[-1]
    scales = np.ones((2, k)) if qk_scale is None else np.asarray(qk_scale, np.float64)
    turn = np.ones((n, k // 2))
    if rotary is not None:
        turn = np.asarray(rotary[0], np.float64) + 1j * np.asarray(rotary[1], np.float64)
    turn = turn[..., None, :]  # the same for all heads

    def rms(x):
        return np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) if qk_scale is not None else 1.0

    def turned(x, by):
        pairs = (x[..., : k // 2] + 1j * x[..., k // 2 :]) * by
        return np.concatenate([pairs.real, pairs.imag], -1)

    raw, v = [qkv[:, :, 0], qkv[:, :, 1]], qkv[:, :, 2]
    q, key = (turned(x / rms(x) * scale, turn) for x, scale in zip(raw, scales))
    logits = np.einsum("bihk,bjhk->bhij", q, key) / np.sqrt(k)
    if mask is not None:
        logits = np.where(np.asarray(mask)[:, None, None], logits, -np.inf)
    if causal:
        logits = np.where(np.tri(n, dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bhij,bjhk->bihk", weights, v)

    dv = np.einsum("bhij,bihk->bjhk", weights, dout)
    dweights = np.einsum("bihk,bjhk->bhij", dout, v)
    dlogits = weights * (dweights - (weights * dweights).sum(-1, keepdims=True)) / np.sqrt(k)
    dturned = np.einsum("bhij,bjhk->bihk", dlogits, key), np.einsum("bhij,bihk->bjhk", dlogits, q)
    draw, dscales = [], []
    for x, dx, scale in zip(raw, dturned, scales):
        size, dx = rms(x), turned(dx, turn.conj())
        dscales.append((dx * x / size).sum((0, 1, 2)))
        dx = dx * scale
        shrunk = 0.0 if qk_scale is None else x * (x * dx).mean(-1, keepdims=True) / size**2
        draw.append((dx - shrunk) / size)
    dscales = np.array(dscales) if qk_scale is not None else np.zeros((2, k))
    return out, np.stack([*draw, dv], 2), dscales
