"""Vision transformer with registers and LayerScale, as in DINOv2.

Source: arXiv 2010.11929, 2309.16588, 2304.07193.
"""

import re

import flax.linen as nn
import jax.numpy as jnp

from dlc_jax.errors import UserError
from dlc_jax.models.drop_path import add_residual
from dlc_jax.models.layers import (
    FAN_IN,
    NORMAL,
    RULES,
    ZEROS,
    Attention,
    Dense,
    LayerNorm,
    Mlp,
    SwiGlu,
    block_flops,
    block_layer,
    mlp_hidden,
    patchify,
    scan_blocks,
)
from dlc_jax.models.positions import axial_rotary, resize, sincos_2d
from dlc_jax.typing import Array, Bool, Float, Int, UInt8

SIZES = {
    "S": {"width": 384, "depth": 12, "heads": 6},
    "B": {"width": 768, "depth": 12, "heads": 12},
    "L": {"width": 1024, "depth": 24, "heads": 16},
    "g": {"width": 1536, "depth": 40, "heads": 24, "mlp": "swiglu"},
}
CHOICES = {
    "mlp": ("gelu", "swiglu"),
    "pos": ("learned", "sincos", "rope"),
    "pos_resize": ("antialias", "plain"),
}
TOKEN = nn.initializers.normal(1e-6)
# parameters below the first block
BELOW = r"(patch_embed|pos_embed|cls_token|register_tokens|mask_token)(/.*)?"


class Block(nn.Module):
    """Pre-norm block: x + gamma1 attention(norm x), then x + gamma2 mlp(norm x).

    Without LayerScale the gammas are 1.
    """

    heads: int
    mlp_ratio: float
    layer_scale: float | None
    qk_norm: bool
    implementation: str | None
    swiglu: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b n d"],
        rotary: tuple | None = None,
        kept: Int[Array, "2 g keep"] | None = None,
    ) -> Float[Array, "b n d"]:
        norm1, norm2 = LayerNorm(name="norm1"), LayerNorm(name="norm2")
        attend = Attention(
            self.heads,
            qk_norm=self.qk_norm,
            kernel_init=NORMAL,
            implementation=self.implementation,
            name="attention",
        )
        hidden = mlp_hidden(x.shape[-1], self.mlp_ratio, mlp="swiglu" if self.swiglu else "gelu")
        mlp = (SwiGlu if self.swiglu else Mlp)(hidden, kernel_init=NORMAL, name="mlp")
        first, second = (None, None) if kept is None else kept
        x = add_residual(x, lambda x: self._scale("gamma1", attend(norm1(x), rotary=rotary)), first)
        return add_residual(x, lambda x: self._scale("gamma2", mlp(norm2(x))), second)

    def _scale(self, name, y):
        if self.layer_scale is None:
            return y
        return y * self.param(
            name, nn.initializers.constant(self.layer_scale), y.shape[-1:]
        ).astype(y.dtype)


class ViT(nn.Module):
    """Images to a class token, registers and patch tokens: a backbone (`models/backbone.py`).

    Tokens are ordered class, registers, patches. The class token has a position of its own,
    registers have none.

    Attributes:
      image: side in pixels that the positions are made for; other sizes get them resized.
      patch: side of a patch in pixels.
      width: of a token; `SIZES` has the usual widths, depths and heads.
      depth: number of blocks.
      heads: of the attention.
      channels: of the images.
      registers: extra tokens that belong to no patch.
      mlp_ratio: width of the MLP over that of a token; `layers.mlp_hidden`.
      mlp: "gelu", or "swiglu" as in DINOv2's size g.
      pos: "learned" positions, fixed "sincos" ones of patches only, or "rope". Rotary positions
        turn queries and keys of patches along both axes (`positions.axial_rotary`).
      pos_resize: bicubic that makes positions for other sizes, "antialias" or "plain". See
        `positions.cubic_matrix`. DINOv2 with registers and transformers'
        Dinov2WithRegistersModel use the first, transformers' Dinov2Model the second. DINOv2's own
        code without registers uses the second too, but steps through the table by
        base / (side + 0.1), not base / side.
      layer_scale: initial LayerScale; None leaves LayerScale out, which suits a small model trained
        from scratch.
      qk_norm: normalizes queries and keys by their root mean square.
      remat: what the backward pass finds stored, "none", "dots" or "full"; see `scan_blocks`.
      unroll: layers in a turn of the loop, 0 for all; see `scan_blocks`.
      implementation: of attention; None chooses.
    """

    image: int = 224
    patch: int = 14
    width: int = 1024
    depth: int = 24
    heads: int = 16
    channels: int = 3
    registers: int = 4
    mlp_ratio: float = 4.0
    mlp: str = "gelu"
    pos: str = "learned"
    pos_resize: str = "antialias"
    layer_scale: float | None = 1e-5
    qk_norm: bool = False
    remat: str = "dots"
    unroll: int = 1
    implementation: str | None = None

    rules = RULES
    tables = ("mask_token",)  # read by thousands of patches

    def setup(self):
        if self.image % self.patch:
            raise UserError(
                f"images of {self.image} pixels cannot be cut into patches of {self.patch}; "
                "change image or patch"
            )
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise UserError(f"{name}={getattr(self, name)!r} is not one of {', '.join(known)}")
        side = self.image // self.patch
        self.patch_embed = Dense(self.width, kernel_init=FAN_IN)
        self.cls_token = self.param("cls_token", TOKEN, (1, 1, self.width))
        if self.registers:
            self.register_tokens = self.param(
                "register_tokens", TOKEN, (1, self.registers, self.width)
            )
        self.mask_token = self.param("mask_token", ZEROS, (1, 1, self.width))
        if self.pos == "learned":
            self.pos_embed = self.param("pos_embed", NORMAL, (1 + side * side, self.width))
        self.blocks = Block(
            self.heads,
            self.mlp_ratio,
            self.layer_scale,
            self.qk_norm,
            self.implementation,
            self.mlp == "swiglu",
        )
        self.norm = LayerNorm()

    def __call__(
        self,
        images: Float[Array, "b y x c"],
        *,
        masked: Bool[Array, "b n"] | None = None,
        kept: Int[Array, "depth 2 g keep"] | None = None,
        every: bool = False,
    ) -> dict[str, Array]:
        """The last block's outputs, not normalized, and the normalized class token.

        Args:
          images: normalized; square, of a side that the patch divides.
          masked: True for the patches that the mask token replaces (iBOT, arXiv 2111.07832).
          kept: rows of each group whose residuals drop path computes, see
            `drop_path.drop_subsets`; None computes all.
          every: adds the outputs of all blocks.

        Returns:
          cls [b d], registers [b r d], patches [b n d]; vector [b d] = normalize(cls). With `every`
          also blocks [depth, b, 1 + r + n, d].

        Raises:
          UserError: the patch does not divide the images, or they are not square; the batch does
            not divide into groups.
        """
        patches = self.patch_embed(patchify(images, self.patch), dtype=self.cls_token.dtype)
        b, n, _ = patches.shape
        if masked is not None:
            shown = jnp.where(masked[..., None], self.mask_token, patches)
            patches = shown.astype(patches.dtype)
        side, cls = images.shape[1] // self.patch, self.cls_token.astype(patches.dtype)
        rotary = None
        if self.pos == "rope":
            rotary = axial_rotary(side, self.width // self.heads, before=1 + self.registers)
        else:
            cls_position, patch_positions = self._positions(side)
            cls, patches = (
                cls + cls_position.astype(patches.dtype),
                patches + patch_positions.astype(patches.dtype),
            )
        tokens = [cls, self.register_tokens.astype(patches.dtype)] if self.registers else [cls]
        x = jnp.concatenate(
            [*(jnp.broadcast_to(token, (b, *token.shape[1:])) for token in tokens), patches], axis=1
        )
        x = scan_blocks(
            self.blocks,
            x,
            rotary,
            depth=self.depth,
            own=(kept,),
            every=every,
            remat=self.remat,
            unroll=self.unroll,
        )
        blocks, x = ({"blocks": x}, x[-1]) if every else ({}, x)
        cls, registers, patches = jnp.split(x, [1, 1 + self.registers], axis=1)
        return {
            "cls": cls[:, 0],
            "registers": registers,
            "patches": patches,
            "vector": self.normalize(cls[:, 0]),
            **blocks,
        }

    def normalize(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        """The final norm; heads that make a class token of their own share it."""
        return self.norm(x)

    @property
    def summary(self) -> int:
        """Number of tokens of the whole image: the class token and the registers."""
        return 1 + self.registers

    @property
    def stride(self) -> int:
        """Pixels on a side of the image behind one patch token."""
        return self.patch

    @nn.nowrap
    def flops(self, image: int | None = None, drop_path: float = 0.0) -> float:
        """FLOPs of a forward pass of one image; what is left out: `layers.block_flops`.

        Args:
          image: side in pixels; None is the model's.
          drop_path: share of the residuals that is not computed; see `drop_path.drop_subsets`.
        """
        patches = ((image or self.image) // self.patch) ** 2
        embed = 2.0 * patches * self.patch**2 * self.channels * self.width
        tokens = self.summary + patches
        block = block_flops(tokens, self.width, mlp_ratio=self.mlp_ratio, mlp=self.mlp)
        return embed + (1 - drop_path) * self.depth * block

    @nn.nowrap
    def layer(self, name: str, shape: tuple[int, ...]):
        """Layers between a parameter and the heads; an array for the stacked ones of the blocks."""
        if re.fullmatch(BELOW, name):
            return self.depth + 1
        return block_layer(name, shape, depth=self.depth)

    def _positions(self, side):
        """Of the class token [1, d] and of the patches [side * side, d]."""
        base = self.image // self.patch
        if self.pos == "sincos":
            return jnp.zeros((1, self.width)), jnp.asarray(
                sincos_2d(side, side, self.width, extent=base)
            )
        cls, patches = jnp.split(self.pos_embed, [1])
        return cls, patches if side == base else resize(
            patches, side, antialias=self.pos_resize == "antialias"
        )


def standardize(images: UInt8[Array, "*n y x c"]) -> Float[Array, "*n y x c"]:
    """uint8 images to float32 with ImageNet's mean and deviation, as DINOv2's weights expect."""
    mean, deviation = jnp.array([0.485, 0.456, 0.406]), jnp.array([0.229, 0.224, 0.225])
    pixels, shape = images.astype(jnp.float32) / 255, (1,) * (images.ndim - 1) + (3,)
    return (pixels - mean.reshape(shape)) / deviation.reshape(shape)
