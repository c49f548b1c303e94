"""Vision transformer with registers and LayerScale, as in DINOv2 (arXiv 2010.11929, 2309.16588, 2304.07193)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dlc_jax.errors import UserError
from dlc_jax.models.layers import (
    FAN_IN,
    NORMAL,
    ZEROS,
    Attention,
    Dense,
    LayerNorm,
    Mlp,
    add_residual,
    block_flops,
    patchify,
    scan_blocks,
    sincos_2d,
)
from dlc_jax.typing import Array, Bool, Float, Int, UInt8

SIZES = {
    "S": {"width": 384, "depth": 12, "heads": 6},
    "B": {"width": 768, "depth": 12, "heads": 12},
    "L": {"width": 1024, "depth": 24, "heads": 16},
}
TOKEN = nn.initializers.normal(1e-6)


class Block(nn.Module):
    """Pre-norm block: x + gamma1 attention(norm x), then x + gamma2 mlp(norm x); without LayerScale the gammas are 1."""

    heads: int
    mlp_ratio: float
    layer_scale: float | None
    qk_norm: bool
    implementation: str | None

    @nn.compact
    def __call__(self, x: Float[Array, "b n d"], kept: Int[Array, "2 g keep"] | None = None) -> Float[Array, "b n d"]:
        width = x.shape[-1]
        norm1, norm2 = LayerNorm(name="norm1"), LayerNorm(name="norm2")
        attend = Attention(
            self.heads, qk_norm=self.qk_norm, kernel_init=NORMAL, implementation=self.implementation, name="attention"
        )
        mlp = Mlp(int(self.mlp_ratio * width), kernel_init=NORMAL, name="mlp")
        first, second = (None, None) if kept is None else kept
        x = add_residual(x, lambda x: self._scale("gamma1", attend(norm1(x))), first)
        return add_residual(x, lambda x: self._scale("gamma2", mlp(norm2(x))), second)

    def _scale(self, name, y):
        if self.layer_scale is None:
            return y
        return y * self.param(name, nn.initializers.constant(self.layer_scale), y.shape[-1:]).astype(y.dtype)


class ViT(nn.Module):
    """Images to a class token, registers and patch tokens.

    Tokens are ordered class, registers, patches. The class token has a position of its own, registers have none.

    Attributes:
      image: side in pixels that the positions are made for; other sizes get them resized.
      patch: side of a patch in pixels.
      width, depth, heads: of the transformer; `SIZES` has the usual ones.
      registers: extra tokens that belong to no patch.
      pos: "learned" positions, resized bicubically with antialiasing for other sizes, or fixed "sincos" ones of patches only.
      layer_scale: initial LayerScale; None leaves LayerScale out, which suits a small model trained from scratch.
      remat, unroll: see `layers.scan_blocks`.
      implementation: forces one implementation of attention.
    """

    image: int
    patch: int
    width: int
    depth: int
    heads: int
    channels: int = 3
    registers: int = 4
    mlp_ratio: float = 4.0
    pos: str = "learned"
    layer_scale: float | None = 1e-5
    qk_norm: bool = False
    remat: str = "dots"
    unroll: int = 1
    implementation: str | None = None

    def setup(self):
        if self.image % self.patch:
            raise UserError(f"images of {self.image} pixels cannot be cut into patches of {self.patch}; change image or patch")
        if self.pos not in ("learned", "sincos"):
            raise UserError(f"pos={self.pos!r} is neither learned nor sincos")
        side = self.image // self.patch
        self.patch_embed = Dense(self.width, kernel_init=FAN_IN)
        self.cls_token = self.param("cls_token", TOKEN, (1, 1, self.width))
        if self.registers:
            self.register_tokens = self.param("register_tokens", TOKEN, (1, self.registers, self.width))
        self.mask_token = self.param("mask_token", ZEROS, (1, 1, self.width))
        if self.pos == "learned":
            self.pos_embed = self.param("pos_embed", NORMAL, (1 + side * side, self.width))
        self.blocks = Block(self.heads, self.mlp_ratio, self.layer_scale, self.qk_norm, self.implementation)
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
          kept: drop path: the rows of each group whose residuals are computed, see `layers.drop_subsets`; None computes all.
          every: adds the outputs of all blocks.

        Returns:
          cls [b d], registers [b r d], patches [b n d]; vector [b d] = normalize(cls). With `every` also blocks [depth, b, 1 + r + n, d].

        Raises:
          UserError: the patch does not divide the images, or they are not square; the batch does not divide into groups.
        """
        patches = self.patch_embed(patchify(images, self.patch))
        b, n, _ = patches.shape
        if masked is not None:
            patches = jnp.where(masked[..., None], self.mask_token.astype(patches.dtype), patches)
        cls_position, patch_positions = self._positions(images.shape[1] // self.patch)
        tokens = [self.cls_token.astype(patches.dtype) + cls_position.astype(patches.dtype)]
        if self.registers:
            tokens.append(self.register_tokens.astype(patches.dtype))
        tokens = [jnp.broadcast_to(token, (b, *token.shape[1:])) for token in tokens]
        x = jnp.concatenate([*tokens, patches + patch_positions.astype(patches.dtype)], axis=1)
        x = scan_blocks(self.blocks, x, depth=self.depth, own=(kept,), every=every, remat=self.remat, unroll=self.unroll)
        blocks, x = ({"blocks": x}, x[-1]) if every else ({}, x)
        cls, registers, patches = jnp.split(x, [1, 1 + self.registers], axis=1)
        return {"cls": cls[:, 0], "registers": registers, "patches": patches, "vector": self.normalize(cls[:, 0]), **blocks}

    def normalize(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        """The final norm; heads that make a class token of their own share it."""
        return self.norm(x)

    def _positions(self, side):
        """Of the class token [1, d] and of the patches [side * side, d]."""
        base = self.image // self.patch
        if self.pos == "sincos":
            return jnp.zeros((1, self.width)), jnp.asarray(sincos_2d(side, side, self.width, extent=base))
        cls, patches = jnp.split(self.pos_embed, [1])
        if side != base:
            grid = patches.astype(jnp.float32).reshape(base, base, self.width)
            patches = jax.image.resize(grid, (side, side, self.width), "cubic", antialias=True).reshape(-1, self.width)
        return cls, patches


def flops(model: nn.Module, *, image: int | None = None, drop_path: float = 0.0) -> float:
    """FLOPs of a forward pass of one image, registers counted as the tokens they are; what is left out: `layers.block_flops`.

    Args:
      model: a ViT, or a module with its attributes.
      image: side in pixels; by default the model's.
      drop_path: share of the residuals that is not computed; see `layers.drop_subsets`.
    """
    patches = ((image or model.image) // model.patch) ** 2
    embed = 2.0 * patches * model.patch**2 * model.channels * model.width
    blocks = model.depth * block_flops(1 + model.registers + patches, model.width, mlp_ratio=model.mlp_ratio)
    return embed + (1 - drop_path) * blocks


def standardize(images: UInt8[Array, "*n y x c"]) -> Float[Array, "*n y x c"]:
    """uint8 images to float32 with ImageNet's mean and deviation, channel by channel, as DINOv2's weights expect them."""
    mean, deviation = jnp.array([0.485, 0.456, 0.406]), jnp.array([0.229, 0.224, 0.225])
    pixels = images.astype(jnp.float32) / 255
    return (pixels - mean.reshape((1,) * (images.ndim - 1) + (3,))) / deviation.reshape((1,) * (images.ndim - 1) + (3,))
