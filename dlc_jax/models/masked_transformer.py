"""Bidirectional transformer over partly masked codes: the network of the prior.

By default it is not told the time, on which the best prediction does not depend (RADD, arXiv
2406.03736); otherwise it is the network of SEDD (arXiv 2310.16834). `sigma_conditioning` gives back
SEDD's own.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax.errors import UserError
from dlc_jax.models.layers import (
    FAN_IN,
    RULES,
    ZEROS,
    Attention,
    Dense,
    LayerNorm,
    Mlp,
    block_flops,
    block_layer,
    modulate,
    scan_blocks,
)
from dlc_jax.models.positions import rotary
from dlc_jax.models.time_embedding import TimeEmbedding, time_embedding_flops
from dlc_jax.typing import Array, Float, Int

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
        self,
        x: Float[Array, "b n d"],
        rotary: tuple[Array, Array],
        condition: Float[Array, "b m"] | None,
    ) -> Float[Array, "b n d"]:
        width = x.shape[-1]
        attend = Attention(
            self.heads,
            use_bias=False,
            kernel_init=FAN_IN,
            implementation=self.implementation,
            name="attention",
        )
        mlp = Mlp(int(self.mlp_ratio * width), gelu="tanh", kernel_init=FAN_IN, name="mlp")
        norm1 = LayerNorm(eps=1e-5, use_bias=False, name="norm1")
        norm2 = LayerNorm(eps=1e-5, use_bias=False, name="norm2")
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
      positions: L of the codes.
      values: V of the codes. The id V is the mask.
      width: of a token.
      depth: number of blocks.
      heads: of attention.
      mlp_ratio: hidden units of the MLP in multiples of the width.
      per_position: a token table for each position, instead of one for all.
      sigma_conditioning: SEDD's network. It is also given sigma, the total noise, and it has V + 1
        outputs.
      remat: what is stored for the backward pass, "none", "dots" or "full". See `scan_blocks`.
      unroll: blocks in a turn of the loop over blocks. 0 is all.
      implementation: of attention. None is the best that there is.
    """

    positions: int = 512
    values: int = 256
    width: int = 1024
    depth: int = 24
    heads: int = 16
    mlp_ratio: float = 4.0
    per_position: bool = False
    sigma_conditioning: bool = False
    remat: str = "dots"
    unroll: int = 1
    implementation: str | None = None

    rules = RULES

    @nn.compact
    def __call__(
        self, codes: Int[Array, "b l"], sigma: Float[Array, "b"] | None = None
    ) -> Float[Array, "b l _"]:
        """Logits over the V values (V + 1 with sigma conditioning), float32.

        Args:
          codes: integers in 0..V; an id above V makes its example NaN.
          sigma: total noise, with and only with sigma conditioning.

        Raises:
          UserError: the codes are not of L positions, or sigma is missing or not expected.
        """
        if codes.shape[1] != self.positions:
            raise UserError(
                f"codes of {codes.shape[1]} positions do not fit a model of {self.positions}"
            )
        if self.sigma_conditioning != (sigma is not None):
            given = "missing" if sigma is None else "given"
            raise UserError(f"sigma_conditioning={self.sigma_conditioning}, but sigma is {given}")
        rows = (self.positions, self.values + 1) if self.per_position else (self.values + 1,)
        table = self.param("token_embed", _embedding_init, (*rows, self.width))
        index = (jnp.arange(self.positions), codes) if self.per_position else codes
        x = table.at[index].get(mode="fill", fill_value=jnp.nan)
        place = self.param("pos_embed", _embedding_init, (self.positions, self.width))
        x = x + place.astype(x.dtype)
        condition = None
        if self.sigma_conditioning:
            embed = TimeEmbedding(CONDITION, scale=1.0, kernel_init=FAN_IN, name="sigma_embed")
            condition = jax.nn.silu(embed(sigma))
        block = Block(self.heads, self.mlp_ratio, self.implementation, name="blocks")
        angles = rotary(self.positions, self.width // self.heads)
        loop = {"depth": self.depth, "remat": self.remat, "unroll": self.unroll}
        x = scan_blocks(block, x, angles, condition, **loop)
        x = LayerNorm(eps=1e-5, use_bias=False, name="final_norm")(x)
        if condition is not None:
            final = Dense(2 * self.width, kernel_init=ZEROS, name="final_modulation")
            x = modulate(x, *jnp.split(final(condition), 2, axis=-1))
        outputs = self.values + 1 if self.sigma_conditioning else self.values
        return Dense(outputs, kernel_init=ZEROS, name="final")(x).astype(jnp.float32)

    @nn.nowrap
    def flops(self) -> float:
        """FLOPs of a forward pass of one code of L positions; see `block_flops`.

        Sigma conditioning adds V + 1 outputs for V, and products of one row an example, which weigh
        next to nothing.
        """
        outputs = self.values + 1 if self.sigma_conditioning else self.values
        total = self.depth * block_flops(self.positions, self.width, mlp_ratio=self.mlp_ratio)
        total += 2.0 * self.positions * self.width * outputs
        if self.sigma_conditioning:
            modulations = 2.0 * CONDITION * self.width * (6 * self.depth + 2)
            total += time_embedding_flops(CONDITION) + modulations
        return total

    @nn.nowrap
    def layer(self, name: str, shape: tuple[int, ...]) -> np.ndarray | int:
        """Layers between a parameter and the head, see `block_layer`; positions are below all."""
        if name == "pos_embed":
            return self.depth + 1
        return block_layer(name, shape, depth=self.depth)
