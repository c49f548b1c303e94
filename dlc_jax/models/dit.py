"""Diffusion transformer (DiT, arXiv 2212.09748) that reads discrete codes (arXiv 2507.12318)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax.errors import UserError
from dlc_jax.models import layers
from dlc_jax.models.layers import (
    ZEROS,
    Attention,
    Dense,
    LayerNorm,
    Mlp,
    block_flops,
    block_layer,
    modulate,
    patchify,
    scan_blocks,
    unpatchify,
)
from dlc_jax.models.positions import sincos_2d
from dlc_jax.models.time_embedding import TimeEmbedding, time_embedding_flops
from dlc_jax.typing import Array, Condition, Float, Int

# A device looks up its columns of all rows: codes cross the network, and one vector an example,
# never the table.
RULES = (*layers.RULES, (r"code_table/table$", -1, "fsdp"))


class CodeTable(nn.Module):
    """Codes to one vector: the mean over positions i of E[i, c_i].

    E is [L, V + 1, D], a table for each position. Its row V is the null value, what a denoiser
    reads without a condition.
    """

    positions: int
    values: int
    width: int

    def setup(self):
        self.table = self.param("table", _table_init, (self.positions, self.values + 1, self.width))

    def __call__(self, codes: Int[Array, "b l"] | Float[Array, "b l v"]) -> Float[Array, "b d"]:
        """Of hard codes, integers in 0..V (V is null), or of soft ones, weights over the V values.

        A code above V has no row: its example becomes NaN, since a compiled step cannot raise.

        Raises:
          UserError: the codes are of another shape.
        """
        if codes.shape[1:] not in ((self.positions,), (self.positions, self.values)):
            expected = f"{self.positions} positions x {self.values} values"
            raise UserError(f"codes of shape {codes.shape[1:]} do not fit a table of {expected}")
        if codes.ndim == 2:
            index = jnp.arange(self.positions), codes
            rows = self.table.at[index].get(mode="fill", fill_value=jnp.nan)
            return jnp.mean(rows, axis=1, dtype=jnp.float32).astype(self.table.dtype)
        weights = codes.reshape(len(codes), -1).astype(self.table.dtype)
        return weights @ self.table[:, : self.values].reshape(-1, self.width) / self.positions

    def null(self) -> Float[Array, "1 d"]:
        """The vector of codes that are null everywhere."""
        vector = jnp.mean(self.table[:, self.values], axis=0, keepdims=True, dtype=jnp.float32)
        return vector.astype(self.table.dtype)


def _table_init(key, shape):
    """N(0, 1 / D); the null row starts the same at all positions."""
    positions, rows, width = shape
    key_values, key_null = jax.random.split(key)
    values = jax.random.normal(key_values, (positions, rows - 1, width))
    null = jnp.broadcast_to(jax.random.normal(key_null, (width,)), (positions, 1, width))
    return jnp.concatenate([values, null], axis=1) * width**-0.5


class Block(nn.Module):
    """adaLN-zero block: shift, scale and gate come from the condition, and start at 0."""

    heads: int
    mlp_ratio: float
    qk_norm: bool
    implementation: str | None

    @nn.compact
    def __call__(
        self, x: Float[Array, "b n d"], condition: Float[Array, "b d"]
    ) -> Float[Array, "b n d"]:
        width = x.shape[-1]
        modulation = Dense(6 * width, kernel_init=ZEROS, name="modulation")(condition)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)
        norm = LayerNorm(use_scale=False, use_bias=False)
        attend = Attention(
            self.heads,
            qk_norm=self.qk_norm,
            implementation=self.implementation,
            name="attention",
        )
        x = x + gate1[:, None] * attend(modulate(norm(x), shift1, scale1))
        mlp = Mlp(int(self.mlp_ratio * width), gelu="tanh", name="mlp")
        return x + gate2[:, None] * mlp(modulate(norm(x), shift2, scale2))


class DiT(nn.Module):
    """Predicts what a diffusion process asks for from noisy images, times and codes.

    `__call__` is `denoise(x, t, embed(codes))`. Another embedding of codes makes a `Condition` and
    calls `denoise`; a sampler can call `embed` once.

    Attributes:
      image: side in pixels, or latent pixels, that the positions are made for. On other sizes they
        are stretched.
      channels: of the input.
      patch: side of a patch in pixels.
      width: of a token.
      depth: number of blocks.
      heads: of attention.
      positions: L of the codes. 0 for a model without codes.
      values: V of the codes. 0 for a model without codes.
      out_channels: of the output. None is those of the input.
      mlp_ratio: hidden units of the MLP in multiples of the width.
      qk_norm: root-mean-square normalization of queries and keys.
      remat: what is stored for the backward pass, "none", "dots" or "full". See `scan_blocks`.
      unroll: blocks in a turn of the loop over blocks. 0 is all.
      implementation: of attention. None is the best that there is.
    """

    image: int = 32
    channels: int = 4
    patch: int = 2
    width: int = 1152
    depth: int = 28
    heads: int = 16
    positions: int = 512
    values: int = 256
    out_channels: int | None = None
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    remat: str = "dots"
    unroll: int = 1
    implementation: str | None = None

    def setup(self):
        if self.image % self.patch:
            raise UserError(
                f"images of {self.image} pixels cannot be cut into patches of {self.patch}; "
                "change image or patch"
            )
        if bool(self.positions) != bool(self.values):
            raise UserError(
                f"positions={self.positions}, values={self.values}: give both, "
                "or 0 and 0 for a model without codes"
            )
        self.patch_embed = Dense(self.width)
        self.time_embed = TimeEmbedding(self.width)
        if self.positions:
            self.code_table = CodeTable(self.positions, self.values, self.width)
        self.blocks = Block(self.heads, self.mlp_ratio, self.qk_norm, self.implementation)
        self.final_norm = LayerNorm(use_scale=False, use_bias=False)
        self.final_modulation = Dense(2 * self.width, kernel_init=ZEROS)
        self.final = Dense(self.patch**2 * (self.out_channels or self.channels), kernel_init=ZEROS)

    def __call__(
        self,
        x: Float[Array, "b y x c"],
        t: Float[Array, "b"],
        codes: Int[Array, "b l"] | Float[Array, "b l v"] | None = None,
    ) -> Float[Array, "b y x _"]:
        """See `embed` for the codes and `denoise` for the rest."""
        return self.denoise(x, t, self.embed(codes))

    def embed(self, codes: Int[Array, "b l"] | Float[Array, "b l v"] | None = None) -> Condition:
        """What the blocks read of codes, hard or soft (see `CodeTable`). None: the null condition.

        Raises:
          UserError: the model was made without codes, or for codes of another shape.
        """
        if self.positions:
            return Condition(
                vector=self.code_table.null() if codes is None else self.code_table(codes)
            )
        if codes is not None:
            raise UserError(
                "this DiT has no code table, so it takes codes=None; "
                "set positions and values to give it one"
            )
        return Condition()

    def denoise(
        self, x: Float[Array, "b y x c"], t: Float[Array, "b"], condition: Condition
    ) -> Float[Array, "b y x _"]:
        """The prediction, float32.

        Args:
          x: noisy images.
          t: time, 1 is noise, 0 is data.
          condition: its vector, [b d] or [1 d], is added to the time embedding.

        Raises:
          NotImplementedError: the condition has tokens, which need cross-attention.
          UserError: the images are not square, or the patch does not divide them.
        """
        if condition.tokens is not None:
            raise NotImplementedError(
                "DiT reads Condition.vector; it has no cross-attention for Condition.tokens"
            )
        side = x.shape[1] // self.patch
        h = self.patch_embed(patchify(x, self.patch))
        positions = sincos_2d(side, side, self.width, extent=self.image // self.patch)
        h = h + jnp.asarray(positions, h.dtype)
        c = self.time_embed(t)
        if condition.vector is not None:
            c = c + condition.vector.astype(c.dtype)
        c = jax.nn.silu(c)
        h = scan_blocks(self.blocks, h, c, depth=self.depth, remat=self.remat, unroll=self.unroll)
        shift, scale = jnp.split(self.final_modulation(c), 2, axis=-1)
        h = self.final(modulate(self.final_norm(h), shift, scale))
        return unpatchify(h.astype(jnp.float32), self.patch)

    @property
    def rules(self) -> tuple[tuple[str, int, str], ...]:
        """How parameters are split, see `stage.Stage.rules`."""
        return RULES if self.positions else layers.RULES

    @nn.nowrap
    def flops(self) -> float:
        """FLOPs of a forward pass of one image, without or with hard codes; see `block_flops`.

        L (24 n d^2 + 4 n^2 d + 12 d^2) for the usual MLP, plus patches in and out, time and the
        last modulation.
        """
        width, tokens = self.width, (self.image // self.patch) ** 2
        block = block_flops(tokens, width, mlp_ratio=self.mlp_ratio) + 12.0 * width**2
        channels = self.channels + (self.out_channels or self.channels)
        ends = 2.0 * tokens * width * self.patch**2 * channels
        return self.depth * block + ends + time_embedding_flops(width) + 4.0 * width**2

    @nn.nowrap
    def layer(self, name: str, shape: tuple[int, ...]) -> np.ndarray | int:
        """Layers between a parameter and the head, see `block_layer`; patches are below all."""
        if name.startswith("patch_embed/"):
            return self.depth + 1
        return block_layer(name, shape, depth=self.depth)
