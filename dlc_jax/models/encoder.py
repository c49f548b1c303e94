"""The encoder of Discrete Latent Codes (arXiv 2507.12318): backbone, simplicial head, DINO head."""

from typing import Annotated

import flax.linen as nn
import jax.numpy as jnp

from dlc_jax.models.backbone import BACKBONES
from dlc_jax.models.simplicial import DinoHead, Simplicial
from dlc_jax.models.vit import ViT
from dlc_jax.typing import Array, Bool, Float, Int, Key

EMBEDDINGS = ("class", "summary")  # what may stand for an image instead of its code


class Encoder(nn.Module):
    """A backbone, a simplicial head on its summary tokens, and a DINO head.

    The simplicial head's vector goes through the backbone's final norm and takes the place of the
    class token. Parameters of the backbone stand under its name in `BACKBONES`, as in vit/norm.

    Attributes:
      backbone: images to tokens, see `models/backbone.py`.
      simplicial: tokens to points on simplices, and back.
      dino: scores against prototypes.
      separate_head: gives patches a DINO head of their own, as in DINOv2's larger models; otherwise
        they share that of the class token.
    """

    backbone: Annotated[nn.Module, BACKBONES] = ViT()
    simplicial: Simplicial = Simplicial()
    dino: DinoHead = DinoHead()
    separate_head: bool = False

    def setup(self):
        setattr(self, self.scope_name, self.backbone.copy())
        self.head = self.dino.copy()
        if self.separate_head:
            self.patch_head = self.dino.copy()

    @property
    def scope_name(self) -> str:
        """Under which the backbone's parameters stand."""
        return next(name for name, kind in BACKBONES.items() if type(self.backbone) is kind)

    @property
    def body(self) -> nn.Module:
        """The backbone as it is bound to this encoder's parameters."""
        return getattr(self, self.scope_name)

    @property
    def rules(self) -> tuple[tuple[str, int, str], ...]:
        """How parameters are split, see `stage.Stage.rules`."""
        return self.backbone.rules

    @property
    def tables(self) -> tuple[str, ...]:
        """What stays float32 in training, see `stage.Stage.tables`."""
        return tuple(f"{self.scope_name}/{name}" for name in getattr(self.backbone, "tables", ()))

    def __call__(
        self,
        images: Float[Array, "b y x c"],
        *,
        keys: Key[Array, "b"] | None = None,
        temperature: float | Array = 1.0,
        masked: Bool[Array, "b n"] | None = None,
        kept: Int[Array, "depth 2 g keep"] | None = None,
        read: tuple[int, int] | None = None,
    ) -> dict[str, Array]:
        """Everything a loss may want of normalized images.

        Args:
          keys, temperature: see `simplicial.relax`; keys=None draws no noise.
          masked, kept: see `models/backbone.py`.
          read: range of positions from which the vector is made; see `Simplicial`.

        Returns:
          vector [b d], the class token; logits and simplices [b l v]; prototypes [b p]; and the
          backbone's tokens, not normalized: cls [b d], registers [b r d], patches [b n d].
        """
        tokens = self.body(images, masked=masked, kept=kept)
        codes = self.simplicial(
            _summary(tokens),
            width=self.backbone.width,
            keys=keys,
            temperature=temperature,
            read=read,
        )
        vector = self.normalize(codes.pop("vector"))
        if self.is_initializing():
            self.score(tokens["patches"])  # makes the parameters of a separate head
        return {**tokens, **codes, "vector": vector, "prototypes": self.head(vector)}

    def codes(self, images: Float[Array, "b y x c"]) -> Int[Array, "b l"]:
        """Discrete codes, argmax over V of the logits: no temperature, no noise; int32."""
        return jnp.argmax(self.logits(images), axis=-1).astype(jnp.int32)

    def logits(self, images: Float[Array, "b y x c"]) -> Float[Array, "b l v"]:
        """Of the simplices alone."""
        return self.simplicial.logits(_summary(self.body(images)))

    def score(self, vectors: Float[Array, "*n d"]) -> Float[Array, "*n p"]:
        """Prototype scores of normalized patches (iBOT), by the head that patches have."""
        return self.patch_head(vectors) if self.separate_head else self.head(vectors)

    def normalize(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        """The backbone's final norm."""
        return self.body.normalize(x)

    def embedding(self, tokens: dict[str, Array], kind: str) -> Float[Array, "b e"]:
        """An image's continuous embedding, of the tokens that `__call__` gives.

        Args:
          kind: "class" is the normalized class token, e = d; "summary" all that codes are read
            from, it and the normalized registers side by side, e = (1 + r) d.
        """
        found = tokens["cls"][:, None]
        if kind == "summary":
            found = jnp.concatenate([found, tokens["registers"]], axis=1)
        return self.normalize(found).reshape(len(found), -1)

    @nn.nowrap
    def embedding_width(self, kind: str) -> int:
        """The width e of `embedding`."""
        return self.backbone.width * (self.backbone.summary if kind == "summary" else 1)

    @nn.nowrap
    def flops(
        self, image: int | None = None, *, codes: bool = False, drop_path: float = 0.0
    ) -> float:
        """FLOPs of a forward pass of one crop; what is left out: `layers.block_flops`.

        Args:
          image: side of the crop in pixels; None is the backbone's.
          codes: counts `codes`, which ends at the logits.
          drop_path: share of the backbone's residuals that is not computed.
        """
        backbone = self.backbone
        heads = 0.0 if codes else self.dino.flops(backbone.width)
        head = self.simplicial.flops(backbone.summary, backbone.width, logits=codes)
        return backbone.flops(image, drop_path) + head + heads

    @nn.nowrap
    def layer(self, name: str, shape: tuple[int, ...]):
        """Layers between a parameter and the heads, for layer-wise decay; 0 for the heads."""
        scope, _, inner = name.partition("/")
        return self.backbone.layer(inner, shape) if scope == self.scope_name else 0


def _summary(tokens):
    """Class token and registers side by side, [b, (1 + r) d]."""
    registers = tokens["registers"].reshape(len(tokens["cls"]), -1)
    return jnp.concatenate([tokens["cls"], registers], axis=-1)
