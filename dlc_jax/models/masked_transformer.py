"""Bidirectional transformer over noisy codes: the network of the prior.

By default it is not told the time, on which the best prediction does not depend (RADD, arXiv
2406.03736); otherwise it is the network of SEDD (arXiv 2310.16834). `sigma_conditioning` gives back
SEDD's own. Classes condition it as sigma does: by adaLN.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax.errors import UserError
from dlc_jax.models.conditioning import LabelTable
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
from dlc_jax.typing import Array, Float, Int, Key

CONDITION = 128  # width of SEDD's embedding of sigma, and of a class


def _embedding_init(key, shape):
    """U(-1 / sqrt(D), 1 / sqrt(D)), D the width of a row."""
    bound = shape[-1] ** -0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


class Block(nn.Module):
    """Pre-norm block with rotary attention; given a condition, adaLN-zero as in DiT.

    With keys it drops the share `dropout` of what attention and MLP add.
    """

    heads: int
    mlp_ratio: float
    implementation: str | None
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        rotary: tuple[Array, Array],
        condition: Float[Array, "b m"] | None,
        keys: Key[Array, "b"] | None = None,
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
            x = x + self._dropped(attend(norm1(x), rotary=rotary), keys, 0)
            return x + self._dropped(mlp(norm2(x)), keys, 1)
        modulation = Dense(6 * width, kernel_init=ZEROS, name="modulation")(condition)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)
        y = attend(modulate(norm1(x), shift1, scale1), rotary=rotary)
        x = x + gate1[:, None] * self._dropped(y, keys, 0)
        y = mlp(modulate(norm2(x), shift2, scale2))
        return x + gate2[:, None] * self._dropped(y, keys, 1)

    def _dropped(self, y, keys, branch):
        """y with some entries 0 and the rest larger by as much; each example's from its own key."""
        if keys is None or not self.dropout:
            return y

        def draw(key):
            return jax.random.bernoulli(jax.random.fold_in(key, branch), self.dropout, y.shape[1:])

        return jnp.where(jax.vmap(draw)(keys), 0, y / (1 - self.dropout)).astype(y.dtype)


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
      classes: number of class labels. 0 for a model without.
      dropout: share of the entries that training drops of what attention and MLP add; 0.1 in SEDD.
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
    classes: int = 0
    dropout: float = 0.0
    remat: str = "dots"
    unroll: int = 1
    implementation: str | None = None

    rules = RULES

    @nn.compact
    def __call__(
        self,
        codes: Int[Array, "b l"] | Float[Array, "b l v"],
        sigma: Float[Array, "b"] | None = None,
        label: Int[Array, "b"] | None = None,
        dropout_keys: Key[Array, "b"] | None = None,
    ) -> Float[Array, "b l _"]:
        """Logits over the V values (V + 1 with sigma conditioning), float32.

        Args:
          codes: integers in 0..V, and an id above V makes its example NaN; or soft ones, weights
            over the V values.
          sigma: total noise, with and only with sigma conditioning.
          label: class of each example, with and only with classes; the number of classes is the
            null class, and one above makes its example NaN.
          dropout_keys: a key for each example, from which alone its dropout is drawn. None drops
            nothing.

        Raises:
          UserError: the codes are not of L positions and V values; sigma or the label is missing or
            not expected; dropout is not a share below 1.
        """
        self._check(codes, sigma, label)
        rows = (self.positions, self.values + 1) if self.per_position else (self.values + 1,)
        table = self.param("token_embed", _embedding_init, (*rows, self.width))
        x = self._rows(table, codes)
        place = self.param("pos_embed", _embedding_init, (self.positions, self.width))
        x = x.astype(place.dtype) + place
        parts, keys, own = [], dropout_keys, ()
        if self.sigma_conditioning:
            embed = TimeEmbedding(CONDITION, scale=1.0, kernel_init=FAN_IN, name="sigma_embed")
            parts.append(embed(sigma))
        if self.classes:
            parts.append(LabelTable(self.classes, CONDITION, name="label_table")(label))
        condition = jax.nn.silu(sum(parts).astype(place.dtype)) if parts else None
        if keys is not None and self.dropout:
            fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))
            own = (fold(keys, jnp.arange(self.depth)),)
        settings = (self.heads, self.mlp_ratio, self.implementation, self.dropout)
        block = Block(*settings, name="blocks")
        angles = rotary(self.positions, self.width // self.heads)
        loop = {"depth": self.depth, "remat": self.remat, "unroll": self.unroll}
        x = scan_blocks(block, x, angles, condition, own=own, **loop)
        x = LayerNorm(eps=1e-5, use_bias=False, name="final_norm")(x)
        if condition is not None:
            final = Dense(2 * self.width, kernel_init=ZEROS, name="final_modulation")
            x = modulate(x, *jnp.split(final(condition), 2, axis=-1))
        outputs = self.values + 1 if self.sigma_conditioning else self.values
        return Dense(outputs, kernel_init=ZEROS, name="final")(x).astype(jnp.float32)

    @nn.nowrap
    def _rows(self, table, codes):
        if codes.ndim == 3:
            rows = table[..., : self.values, :]
            return jnp.einsum("blv,lvd->bld" if self.per_position else "blv,vd->bld", codes, rows)
        index = (jnp.arange(self.positions), codes) if self.per_position else codes
        return table.at[index].get(mode="fill", fill_value=jnp.nan)

    @nn.nowrap
    def _check(self, codes, sigma, label):
        if codes.ndim == 3 and codes.shape[2] != self.values:
            raise UserError(
                f"soft codes of {codes.shape[2]} values do not fit a model of {self.values}"
            )
        if codes.shape[1] != self.positions:
            raise UserError(
                f"codes of {codes.shape[1]} positions do not fit a model of {self.positions}"
            )
        if self.sigma_conditioning != (sigma is not None):
            given = "missing" if sigma is None else "given"
            raise UserError(f"sigma_conditioning={self.sigma_conditioning}, but sigma is {given}")
        if bool(self.classes) != (label is not None):
            given = "missing" if label is None else "given"
            raise UserError(f"classes={self.classes}, but the label is {given}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout={self.dropout} is a share: from 0, below 1")

    @property
    def tables(self) -> tuple[str, ...]:
        """What stays float32 in training, see `stage.Stage.tables`."""
        return ("token_embed", "label_table/table") if self.classes else ("token_embed",)

    @nn.nowrap
    def flops(self) -> float:
        """FLOPs of a forward pass of one code of L positions; see `block_flops`.

        Sigma conditioning adds V + 1 outputs for V, it and classes products of one row an example,
        and soft codes one with their table, which weigh next to nothing.
        """
        outputs = self.values + 1 if self.sigma_conditioning else self.values
        total = self.depth * block_flops(self.positions, self.width, mlp_ratio=self.mlp_ratio)
        total += 2.0 * self.positions * self.width * outputs
        if self.sigma_conditioning:
            total += time_embedding_flops(CONDITION)
        if self.sigma_conditioning or self.classes:
            total += 2.0 * CONDITION * self.width * (6 * self.depth + 2)
        return total

    @nn.nowrap
    def layer(self, name: str, shape: tuple[int, ...]) -> np.ndarray | int:
        """Layers between a parameter and the head, see `block_layer`; positions are below all."""
        if name == "pos_embed":
            return self.depth + 1
        return block_layer(name, shape, depth=self.depth)
