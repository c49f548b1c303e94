"""Diffusion transformer (DiT, arXiv 2212.09748) that reads discrete codes (arXiv 2507.12318)."""

import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax.models import dit_sizes, layers
from dlc_jax.models.autoencoder import Conv
from dlc_jax.models.code_table import CodeTable
from dlc_jax.models.conditioning import CodeTokens, EmbeddingInput, LabelTable
from dlc_jax.models.dit_block import Block, plain_norm
from dlc_jax.models.dit_parts import (
    EDGE,
    EarlyHead,
    Fusion,
    Outputs,
    WideHead,
    rows_of,
    scan_span,
)
from dlc_jax.models.layers import ZEROS, Dense, modulate, patchify, scan_blocks, unpatchify
from dlc_jax.models.positions import axial_rotary, sincos_2d
from dlc_jax.models.time_embedding import TimeEmbedding
from dlc_jax.typing import Array, Condition, Float, Given, Int

# A device looks up its columns of all rows: codes cross the network, and one vector an example,
# never the table.
RULES = (*layers.RULES, (r"(code|label)_table/table$", -1, "fsdp"))


class DiT(nn.Module):
    """Predicts what a diffusion process asks for from noisy images, times and a condition.

    `__call__` is `denoise(x, t, embed(given))`; a sampler calls `embed` once. `all` also gives what
    only training reads. A part that starts at zero leaves the network at first what it is without.

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
      classes: number of class labels. 0 for a model without.
      embedding: width of an embedding that conditions it. 0 for a model without.
      block: "dit", or "modern" with RMSNorm, SwiGLU and rotary positions (arXiv 2501.01423).
      context: tokens of codes before the patches, each of L / context positions. 0 is none.
      cross: tokens of codes that every block reads by cross-attention (DisCo-Diff). 0 is none.
      early: block after which a second head makes the weak prediction of internal guidance. 0 is
        none.
      route: makes the parameters that let middle blocks skip patches (SPRINT, arXiv 2510.21986).
      head_width: width of DDT's head (arXiv 2504.05741), which has its own patches. 0 is none.
      head_depth: number of blocks of DDT's head.
      align: block whose patch tokens are aligned to another network's (iREPA, arXiv 2512.10794). 0
        is none.
      align_width: width of what they are aligned to.
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
    classes: int = 0
    embedding: int = 0
    block: str = "dit"
    context: int = 0
    cross: int = 0
    early: int = 0
    route: bool = False
    head_width: int = 0
    head_depth: int = 0
    align: int = 0
    align_width: int = 0

    def setup(self):
        dit_sizes.check(self)
        features = self.patch**2 * (self.out_channels or self.channels)
        numbers = (self.heads, self.mlp_ratio, self.qk_norm, self.implementation, self.block)
        self.patch_embed = Dense(self.width)
        self.time_embed = TimeEmbedding(self.width)
        if self.positions:
            self.code_table = CodeTable(self.positions, self.values, self.width)
        if self.classes:
            self.label_table = LabelTable(self.classes, self.width)
        if self.embedding:
            self.embedding_input = EmbeddingInput(self.embedding, self.width)
        if self.context:
            self.context_tokens = CodeTokens()
        if self.cross:
            self.cross_tokens = CodeTokens(null=True)
        self.blocks = Block(*numbers, cross=bool(self.cross))
        if self.route:
            self.fusion = Fusion()
        if self.early:
            self.early_head = EarlyHead(features, self.block)
        if self.align:
            self.aligner = Conv(self.align_width)
        if self.head_width:
            self.head = WideHead(
                self.head_width,
                self.head_depth,
                *numbers,
                extent=self.image // self.patch,
                remat=self.remat,
                unroll=self.unroll,
            )
        self.final_norm = plain_norm(self.block)
        self.final_modulation = Dense(2 * (self.head_width or self.width), kernel_init=ZEROS)
        self.final = Dense(features, kernel_init=ZEROS)

    def __call__(
        self,
        x: Float[Array, "b y x c"],
        t: Float[Array, "b"],
        given: Given | Int[Array, "b l"] | Float[Array, "b l v"] | None = None,
        *,
        keep: Int[Array, "b k"] | None = None,
    ) -> Float[Array, "b y x _"]:
        """See `embed` for what is given and `denoise` for the rest."""
        return self.denoise(x, t, self.embed(given), keep=keep)

    def all(
        self,
        x: Float[Array, "b y x c"],
        t: Float[Array, "b"],
        given: Condition | Given | Int[Array, "b l"] | Float[Array, "b l v"] | None = None,
        *,
        keep: Int[Array, "b k"] | None = None,
    ) -> Outputs:
        """The prediction, that of the early head, and the aligned tokens, all from one pass.

        `given` may be what `embed` has made of it.
        """
        condition = given if isinstance(given, Condition) else self.embed(given)
        return self._outputs(x, t, condition, keep, every=True)

    def embed(
        self, given: Given | Int[Array, "b l"] | Float[Array, "b l v"] | None = None
    ) -> Condition:
        """What the blocks read of codes, labels and embeddings.

        An array counts as codes, hard or soft (see `CodeTable`). Parts that are None are null; with
        none at all every array of the condition is of one example, [1, ...]. Codes and labels out
        of range make their example NaN, since a compiled step cannot raise.

        Raises:
          UserError: the model was made without such a part, or for one of another shape.
        """
        given = given if isinstance(given, Given) else Given(codes=given)
        dit_sizes.check_given(self, given)
        parts, tokens, context = [], None, None
        if self.positions:
            table, codes = self.code_table, given.codes
            parts.append(table.null() if codes is None else table(codes))
            if self.context:
                context = self.context_tokens(table.tokens(codes, self.context))
            if self.cross:
                tokens = self.cross_tokens(table.tokens(codes, self.cross))
        if self.classes:
            parts.append(self.label_table(given.label))
        if self.embedding:
            parts.append(self.embedding_input(given.embedding, given.drop))
        return Condition(vector=sum(parts) if parts else None, tokens=tokens, context=context)

    def denoise(
        self,
        x: Float[Array, "b y x c"],
        t: Float[Array, "b"],
        condition: Condition,
        *,
        keep: Int[Array, "b k"] | None = None,
    ) -> Float[Array, "b y x _"]:
        """The prediction, float32.

        Args:
          x: noisy images.
          t: time, 1 is noise, 0 is data.
          condition: its vector, [b d] or [1 d], is added to the time embedding.
          keep: with `route`, the patches of each example, by their place in reading order, that the
            middle blocks see. None is all.

        Raises:
          UserError: the images are not square, or the patch does not divide them; the condition has
            tokens that this model does not read, or lacks some; `keep` without `route`.
        """
        return self._outputs(x, t, condition, keep, every=self.is_initializing()).output

    def _outputs(self, x, t, condition, keep, *, every):
        dit_sizes.check_inputs(self, condition, keep)
        patches = patchify(x, self.patch)
        side = x.shape[1] // self.patch
        h = self.patch_embed(patches)
        positions = sincos_2d(side, side, self.width, extent=self.image // self.patch)
        h = h + jnp.asarray(positions, h.dtype)
        time = c = self.time_embed(t)
        if condition.vector is not None:
            c = c + condition.vector.astype(c.dtype)
        c = jax.nn.silu(c)
        h, after = self._encode(h, c, condition, keep, every)
        early = aligned = None
        if self.early in after:
            early = self.early_head(after[self.early], c).astype(jnp.float32)
            early = unpatchify(early, self.patch)
        if self.align in after:
            grid = after[self.align].reshape(len(h), side, side, -1)
            aligned = self.aligner(grid).astype(jnp.float32).reshape(len(h), side**2, -1)
        if self.head_width:
            h, c = self.head(patches, h, time)
        shift, scale = jnp.split(self.final_modulation(c), 2, axis=-1)
        h = self.final(modulate(self.final_norm(h), shift, scale))
        return Outputs(unpatchify(h.astype(jnp.float32), self.patch), early, aligned)

    def _encode(self, h, c, condition, keep, every):
        """(patch tokens after all blocks, {block: those after it} of `early` and `align`)."""
        side, count = math.isqrt(h.shape[1]), self.context
        turn = rows = None
        if self.block == "modern":
            turn = axial_rotary(side, self.width // self.heads, before=count)
        context, tokens = (
            None if part is None else jnp.broadcast_to(part, (len(h), *part.shape[1:]))
            for part in (condition.context, condition.tokens)
        )
        if count:
            h = jnp.concatenate([context.astype(h.dtype), h], axis=1)
        if keep is not None:
            start = jnp.broadcast_to(jnp.arange(count), (len(keep), count))
            rows = jnp.concatenate([start, count + keep], axis=1)
        read = tokens, condition.mask
        loop = {"remat": self.remat, "unroll": self.unroll}
        after = {block: None for block in (self.early, self.align) if block and every}
        inner = (EDGE, self.depth - EDGE) if self.route else ()
        ends = sorted({0, *after, *inner, self.depth})
        if len(ends) == 2 or self.is_initializing():  # which makes what spans are cut from
            whole = scan_blocks(self.blocks, h, c, turn, *read, depth=self.depth, **loop)
        if len(ends) == 2:
            return whole[:, count:], dict.fromkeys(after, whole[:, count:])
        for first, last in itertools.pairwise(ends):
            middle = self.route and EDGE <= first < self.depth - EDGE
            here = turn
            if middle and rows is not None:
                here = turn and tuple(table[rows] for table in turn)
            if middle and first == EDGE:
                begun, h = h, h if rows is None else rows_of(h, rows)
            h = scan_span(self.blocks, h, c, here, *read, first=first, last=last, **loop)
            full = self.fusion(begun, h, rows) if middle else h
            if last in after:
                after[last] = full[:, count:]
            if middle and last == self.depth - EDGE:
                h = full
        return h[:, count:], after

    @property
    def rules(self) -> tuple[tuple[str, int, str], ...]:
        """How parameters are split, see `stage.Stage.rules`."""
        return RULES if self.positions or self.classes else layers.RULES

    @property
    def tables(self) -> tuple[str, ...]:
        """What stays float32 in training, see `stage.Stage.tables`."""
        there = {"code_table/table": self.positions, "label_table/table": self.classes}
        there["fusion/mask"] = self.route
        return tuple(name for name, size in there.items() if size)

    @nn.nowrap
    def flops(self, *, training: bool = False, kept: int | None = None) -> float:
        """FLOPs of a forward pass of one image, see `dit_sizes.flops`."""
        return dit_sizes.flops(self, training=training, kept=kept)

    @nn.nowrap
    def layer(self, name: str, shape: tuple[int, ...]) -> np.ndarray | int:
        """Layers between a parameter and the head, see `block_layer`; patches are below all."""
        return dit_sizes.layer(self, name)
