"""Blocks of DiT: its own (arXiv 2212.09748), and the modern one of LightningDiT (2501.01423)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dlc_jax.errors import UserError
from dlc_jax.kernels.reference import cross_attention
from dlc_jax.models.layers import (
    ONES,
    ZEROS,
    Attention,
    Dense,
    LayerNorm,
    Mlp,
    SwiGlu,
    block_flops,
    mlp_hidden,
    modulate,
    per_token,
)
from dlc_jax.typing import Array, Bool, Float

KINDS = ("dit", "modern")


class RMSNorm(nn.Module):
    """x over its root mean square (arXiv 1910.07467) in float32; the result has x's dtype."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return y.astype(x.dtype)


def plain_norm(kind: str, name: str | None = None) -> nn.Module:
    """The norm of a kind of block, without parameters.

    Raises:
      UserError: there is no such kind.
    """
    if kind not in KINDS:
        raise UserError(f"block={kind!r} is not one of {', '.join(KINDS)}")
    if kind == "modern":
        return RMSNorm(name=name)
    return LayerNorm(use_scale=False, use_bias=False, name=name)


class CrossAttention(nn.Module):
    """Multi-head attention of tokens to others; it adds nothing at the start.

    Raises:
      UserError: the heads do not divide the width.
    """

    heads: int
    use_bias: bool
    qk_norm: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        tokens: Float[Array, "b m d"],
        mask: Bool[Array, "b m"] | None,
    ) -> Float[Array, "b n d"]:
        width = x.shape[-1]
        k = width // self.heads
        q = Dense((self.heads, k), use_bias=self.use_bias, name="q")(x)
        kv = Dense((2, self.heads, k), use_bias=self.use_bias, name="kv")(tokens)
        scales = None
        if self.qk_norm:
            scales = self.param("q_scale", ONES, (k,)), self.param("k_scale", ONES, (k,))
        y = cross_attention(q, kv, mask=mask, qk_scale=scales).reshape(x.shape)
        out = Dense(width, use_bias=self.use_bias, kernel_init=ZEROS, name="out")
        return out(y, dtype=x.dtype)


class Block(nn.Module):
    """adaLN-zero block: shift, scale and gate come from the condition, and start at 0.

    "modern" has RMSNorm, SwiGLU with two thirds of the hidden units, and no biases but those of the
    modulation. With `cross`, attention to other tokens stands between self-attention and MLP.
    """

    heads: int
    mlp_ratio: float
    qk_norm: bool
    implementation: str | None
    kind: str = "dit"
    cross: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        condition: Float[Array, "b *n d"],
        rotary: tuple[Array, Array] | None = None,
        tokens: Float[Array, "b m d"] | None = None,
        mask: Bool[Array, "b m"] | None = None,
    ) -> Float[Array, "b n d"]:
        """The condition is that of the example, [b, d], or of each token."""
        width, modern = x.shape[-1], self.kind == "modern"
        modulation = Dense(6 * width, kernel_init=ZEROS, name="modulation")(condition)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)
        norm = plain_norm(self.kind)
        attend = Attention(
            self.heads,
            use_bias=not modern,
            qk_norm=self.qk_norm,
            implementation=self.implementation,
            name="attention",
        )
        x = x + per_token(gate1) * attend(modulate(norm(x), shift1, scale1), rotary=rotary)
        if self.cross:
            read = CrossAttention(self.heads, not modern, self.qk_norm, name="cross_attention")
            x = x + read(norm(x), tokens, mask)
        if modern:
            hidden = mlp_hidden(width, self.mlp_ratio, mlp="swiglu")
            mlp = SwiGlu(hidden, use_bias=False, name="mlp")
        else:
            mlp = Mlp(int(self.mlp_ratio * width), gelu="tanh", name="mlp")
        return x + per_token(gate2) * mlp(modulate(norm(x), shift2, scale2))


def dit_block_flops(
    tokens: int,
    width: int,
    *,
    mlp_ratio: float,
    kind: str = "dit",
    cross: int = 0,
    conditions: int = 1,
) -> float:
    """FLOPs of one block for one example, see `block_flops`.

    Args:
      cross: tokens that cross-attention reads, 0 without.
      conditions: 1, or the number of tokens where each has its own.
    """
    mlp = "swiglu" if kind == "modern" else "gelu"
    total = block_flops(tokens, width, mlp_ratio=mlp_ratio, mlp=mlp)
    total += 12.0 * conditions * width**2
    if cross:
        total += 4.0 * (tokens + cross) * width**2 + 4.0 * tokens * cross * width
    return total
