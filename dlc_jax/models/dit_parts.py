"""Parts that a DiT may have around its blocks: heads, token dropping, spans of blocks."""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from dlc_jax.models.dit_block import Block, plain_norm
from dlc_jax.models.layers import ZEROS, Dense, modulate, scan_blocks
from dlc_jax.models.positions import axial_rotary, sincos_2d
from dlc_jax.typing import Array, Float, Int

EDGE = 2  # blocks before and after those that see only the kept patches (SPRINT)


class Outputs(NamedTuple):
    """What training reads of a DiT, float32.

    Attributes:
      output: [b, y, x, o], the prediction.
      early: [b, y, x, o], the early head's. None without one.
      aligned: [b, n, a], patch tokens after the alignment projector. None without one.
    """

    output: jax.Array
    early: jax.Array | None = None
    aligned: jax.Array | None = None


class EarlyHead(nn.Module):
    """A final layer on the tokens of an early block: the weak prediction of internal guidance."""

    features: int
    kind: str

    @nn.compact
    def __call__(self, h: Float[Array, "b n d"], c: Float[Array, "b d"]) -> Float[Array, "b n p"]:
        modulation = Dense(2 * h.shape[-1], kernel_init=ZEROS, name="modulation")(c)
        shift, scale = jnp.split(modulation, 2, axis=-1)
        h = modulate(plain_norm(self.kind)(h), shift, scale)
        return Dense(self.features, kernel_init=ZEROS, name="out")(h)


class WideHead(nn.Module):
    """DDT's head (arXiv 2504.05741): blocks over the noisy patches, modulated token by token.

    A token's condition is silu(P (time + h)), h the encoder's token at its place. The head may be
    wider than the encoder, as in RAE (arXiv 2510.11690).
    """

    width: int
    depth: int
    heads: int
    mlp_ratio: float
    qk_norm: bool
    implementation: str | None
    kind: str
    extent: int
    remat: str
    unroll: int

    @nn.compact
    def __call__(
        self,
        patches: Float[Array, "b n p"],
        h: Float[Array, "b n d"],
        time: Float[Array, "b d"],
    ) -> tuple[Float[Array, "b n w"], Float[Array, "b n w"]]:
        """(tokens, their conditions)."""
        side = math.isqrt(patches.shape[1])
        c = jax.nn.silu(Dense(self.width, name="project")(time[:, None] + h))
        x = Dense(self.width, name="patch_embed")(patches)
        x = x + jnp.asarray(sincos_2d(side, side, self.width, extent=self.extent), x.dtype)
        turn = axial_rotary(side, self.width // self.heads) if self.kind == "modern" else None
        settings = (self.heads, self.mlp_ratio, self.qk_norm, self.implementation, self.kind)
        block = Block(*settings, name="blocks")
        loop = {"depth": self.depth, "remat": self.remat, "unroll": self.unroll}
        return scan_blocks(block, x, c, turn, None, None, **loop), c


class Fusion(nn.Module):
    """Joins what few blocks made of all patches with what many made of the kept ones.

    SPRINT (arXiv 2510.21986): a learned token stands for each dropped patch, and a linear map of
    both halves, at first their mean, gives the tokens that the last blocks read.
    """

    @nn.compact
    def __call__(
        self,
        first: Float[Array, "b n d"],
        middle: Float[Array, "b k d"],
        rows: Int[Array, "b k"] | None,
    ) -> Float[Array, "b n d"]:
        """`rows` are the places of the middle's tokens; None: all are there."""
        width = first.shape[-1]
        mask = self.param("mask", ZEROS, (width,))
        if rows is not None:
            absent = jnp.broadcast_to(mask, first.shape).astype(first.dtype)
            put = jax.vmap(lambda absent, rows, tokens: absent.at[rows].set(tokens))
            middle = put(absent, rows, middle.astype(first.dtype))
        join = Dense(width, kernel_init=_mean, name="dense")
        return join(jnp.concatenate([first, middle], axis=-1), dtype=first.dtype)


def _mean(key, shape):
    half = jnp.eye(shape[1]) / 2
    return jnp.concatenate([half, half])


def rows_of(x: Float[Array, "b n d"], rows: Int[Array, "b k"]) -> Float[Array, "b k d"]:
    """The tokens in these rows."""
    return jax.vmap(lambda x, rows: x[rows])(x, rows)


def scan_span(
    block: nn.Module, x: Array, *shared: object, first: int, last: int, **loop
) -> Float[Array, "b n d"]:
    """`scan_blocks` over blocks first..last - 1 of a stack that has its parameters already."""

    def body(block, x, *shared):
        return scan_blocks(block, x, *shared, depth=last - first, **loop)

    def cut(params):
        return jax.tree.map(lambda leaf: leaf[first:last], params)

    return nn.map_variables(body, "params", trans_in_fn=cut)(block, x, *shared)
