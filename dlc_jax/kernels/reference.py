"""Attention in plain XLA, which runs everywhere; others are compared with it."""

import jax
import jax.numpy as jnp

from dlc_jax.typing import Array, Bool, Float

QK_EPS = 1e-6  # of the query and key normalization, in every implementation


def rms_normalize(x: Float[Array, "*n k"], scale: Float[Array, "k"]) -> Float[Array, "*n k"]:
    """x / rms(x) * scale over the last dimension, computed and returned in float32."""
    x, scale = x.astype(jnp.float32), scale.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + QK_EPS) * scale


def rotate(x: Float[Array, "*n k"], cos: Array, sin: Array) -> Float[Array, "*n k"]:
    """Turns each pair (x[i], x[i + k/2]) by its angle (RoFormer, arXiv 2104.09864); float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attention(
    qkv: Float[Array, "b n 3 h k"],
    *,
    mask: Bool[Array, "b n"] | None = None,
    rotary: tuple[Float[Array, "*b n half"], Float[Array, "*b n half"]] | None = None,
    qk_scale: tuple[Float[Array, "k"], Float[Array, "k"]] | None = None,
    causal: bool = False,
) -> Float[Array, "b n h k"]:
    """See `dlc_jax.kernels.attention.attention`."""
    # [3, b, h, n, k]: both products are then batched matrix products, which CPUs run up to twice as
    # fast as the unmoved layout
    q, k, v = jnp.transpose(qkv, (2, 0, 3, 1, 4))
    if qk_scale is not None:
        q, k = rms_normalize(q, qk_scale[0]), rms_normalize(k, qk_scale[1])
    if rotary is not None:
        cos, sin = (table if table.ndim == 2 else table[:, None] for table in rotary)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    return _weighted(q, k, v, mask, causal)


def refusal(qkv, *, platform, **inputs) -> None:
    """It computes everything everywhere."""


def cross_attention(
    q: Float[Array, "b n h k"],
    kv: Float[Array, "b m 2 h k"],
    *,
    mask: Bool[Array, "b m"] | None = None,
    qk_scale: tuple[Float[Array, "k"], Float[Array, "k"]] | None = None,
) -> Float[Array, "b n h k"]:
    """Attention of some tokens to others; for mask and scales see `attention`."""
    q = jnp.transpose(q, (0, 2, 1, 3))
    k, v = jnp.transpose(kv, (2, 0, 3, 1, 4))
    if qk_scale is not None:
        q, k = rms_normalize(q, qk_scale[0]), rms_normalize(k, qk_scale[1])
    return _weighted(q, k, v, mask)


def _weighted(q, k, v, mask, causal=False):
    """softmax(q k^T / sqrt(k)) v of [b, h, n, k], as [b, n, h, k]."""
    q, k, scale = q.astype(v.dtype), k.astype(v.dtype), q.shape[-1] ** -0.5
    is_wide = v.dtype == jnp.float32
    q = q * scale if is_wide else q  # n k products instead of n m; narrow ones would be rounded
    logits = jnp.einsum("bhnk,bhmk->bhnm", q, k, preferred_element_type=jnp.float32)
    logits = logits if is_wide else logits * scale
    if mask is not None:
        logits = jnp.where(mask[:, None, None, :], logits, jnp.finfo(jnp.float32).min)
    if causal:
        before = jnp.tril(jnp.ones(logits.shape[-2:], bool))
        logits = jnp.where(before, logits, jnp.finfo(jnp.float32).min)
    if is_wide:
        # Divided by their sum after the product: n k divisions instead of n m, and a gradient that
        # passes over [n, m] half as often. No gradient flows by the maximum, since it cancels.
        weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
        total = jnp.einsum("bhnm,bhmk->bhnk", weights, v)
        return jnp.transpose(total / weights.sum(-1, keepdims=True), (0, 2, 1, 3))
    # The gradient of a softmax subtracts a mean of what was rounded before, so that it cancels.
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.transpose(jnp.einsum("bhnm,bhmk->bhnk", weights, v), (0, 2, 1, 3))
