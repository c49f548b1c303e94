"""Bidirectional transformer over partly masked codes: the network of the prior.

By default it is not told the time: the best prediction does not depend on it (RADD, arXiv 2406.03736), and the network of
SEDD (arXiv 2310.16834) is otherwise kept. `sigma_conditioning` gives back SEDD's own.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dlc_jax.errors import UserError
from dlc_jax.models.layers import (
    FAN_IN,
    ZEROS,
    Attention,
    Dense,
    LayerNorm,
    Mlp,
    TimeEmbedding,
    block_flops,
    modulate,
    scan_blocks,
    time_embedding_flops,
)
from dlc_jax.models.positions import rotary
from dlc_jax.typing import Array, Float, Int

SIZES = {
    "S": {"width": 768, "depth": 12, "heads": 12},
    "M": {"width": 1024, "depth": 24, "heads": 16},
}
CONDITION = 128  # width of SEDD's embedding of sigma


def _embedding_init(key, shape):
    """U(-1 / sqrt(D), 1 / sqrt(D)), D the width of a row."""
    bound = shape[-1] ** -0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


class Block(nn.Module):
    """Pre-norm block with rotary attention; given a condition, adaLN-zero as in DiT."""

    heads: int
    mlp_ratio: float
    implementation: str | None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], rotary: tuple[Array, Array], condition: Float[Array, "b m"] | None
    ) -> Float[Array, "b n d"]:
        width = x.shape[-1]
        attend = Attention(self.heads, use_bias=False, kernel_init=FAN_IN, implementation=self.implementation, name="attention")
        mlp = Mlp(int(self.mlp_ratio * width), gelu="tanh", kernel_init=FAN_IN, name="mlp")
        norm1, norm2 = (LayerNorm(eps=1e-5, use_bias=False, name=name) for name in ("norm1", "norm2"))
        if condition is None:
            x = x + attend(norm1(x), rotary=rotary)
            return x + mlp(norm2(x))
        modulation = Dense(6 * width, kernel_init=ZEROS, name="modulation")(condition)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)
        x = x + gate1[:, None] * attend(modulate(norm1(x), shift1, scale1), rotary=rotary)
        return x + gate2[:, None] * mlp(modulate(norm2(x), shift2, scale2))


class MaskedTransformer(nn.Module):
    """Logits of every position's value, given codes of which some are masked.

    Attributes:
      positions, values: L and V of the codes; the id V is the mask.
      width, depth, heads: of the transformer; `SIZES` has the published ones.
      per_position: a token table for each position, instead of one for all.
      sigma_conditioning: SEDD's network: it is also given sigma, the total noise, and it has V + 1 outputs.
      remat, unroll: see `layers.scan_blocks`.
      implementation: forces one implementation of attention.
    """

    positions: int
    values: int
    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    per_position: bool = False
    sigma_conditioning: bool = False
    remat: str = "dots"
    unroll: int = 1
    implementation: str | None = None

    @nn.compact
    def __call__(self, codes: Int[Array, "b l"], sigma: Float[Array, "b"] | None = None) -> Float[Array, "b l _"]:
        """Logits over the V values (V + 1 with sigma conditioning), float32.

        Args:
          codes: integers in 0..V; an id above V makes its example NaN.
          sigma: total noise, with and only with sigma conditioning.

        Raises:
          UserError: the codes are not of L positions, or sigma is missing or not expected.
        """
        if codes.shape[1] != self.positions:
            raise UserError(f"codes of {codes.shape[1]} positions, but the model has {self.positions}")
        if self.sigma_conditioning != (sigma is not None):
            given = "missing" if sigma is None else "given"
            raise UserError(f"sigma_conditioning={self.sigma_conditioning}, but sigma is {given}")
        rows = (self.positions, self.values + 1) if self.per_position else (self.values + 1,)
        table = self.param("token_embed", _embedding_init, (*rows, self.width))
        index = (jnp.arange(self.positions), codes) if self.per_position else codes
        x = table.at[index].get(mode="fill", fill_value=jnp.nan)
        x = x + self.param("pos_embed", _embedding_init, (self.positions, self.width)).astype(x.dtype)
        condition = None
        if self.sigma_conditioning:
            condition = jax.nn.silu(TimeEmbedding(CONDITION, scale=1.0, kernel_init=FAN_IN, name="sigma_embed")(sigma))
        block = Block(self.heads, self.mlp_ratio, self.implementation, name="blocks")
        angles = rotary(self.positions, self.width // self.heads)
        x = scan_blocks(block, x, angles, condition, depth=self.depth, remat=self.remat, unroll=self.unroll)
        x = LayerNorm(eps=1e-5, use_bias=False, name="final_norm")(x)
        if condition is not None:
            x = modulate(x, *jnp.split(Dense(2 * self.width, kernel_init=ZEROS, name="final_modulation")(condition), 2, axis=-1))
        outputs = self.values + 1 if self.sigma_conditioning else self.values
        return Dense(outputs, kernel_init=ZEROS, name="final")(x).astype(jnp.float32)


def flops(model: MaskedTransformer) -> float:
    """FLOPs of a forward pass of one code of L positions; what is left out: `layers.block_flops`.

    Sigma conditioning adds V + 1 outputs for V, and products of one row an example, which weigh next to nothing.
    """
    outputs = model.values + 1 if model.sigma_conditioning else model.values
    total = model.depth * block_flops(model.positions, model.width, mlp_ratio=model.mlp_ratio)
    total += 2.0 * model.positions * model.width * outputs
    if model.sigma_conditioning:
        total += time_embedding_flops(CONDITION) + 2.0 * CONDITION * model.width * (6 * model.depth + 2)
    return total
