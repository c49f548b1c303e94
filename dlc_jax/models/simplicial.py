"""Simplicial embedding head (arXiv 2204.00616) and the encoder of Discrete Latent Codes (arXiv 2507.12318)."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp

from dlc_jax.errors import UserError
from dlc_jax.models.layers import FAN_IN, NORMAL, ONES, Dense, LayerNorm
from dlc_jax.models.vit import ViT
from dlc_jax.models.vit import flops as vit_flops
from dlc_jax.parallel import matmul
from dlc_jax.typing import Array, Bool, Float, Int, Key

RELAXATIONS = ("softmax", "gumbel", "straight_through")
READOUTS = ("plain", "shared", "pos-shared")
LARGEST = 2**16  # values that the widest code store tells apart


def relax(
    logits: Float[Array, "b l v"], relaxation: str, *, keys: Key[Array, "b"] | None = None, temperature: float | Array = 1.0
) -> Float[Array, "b l v"]:
    """Points of the simplex from logits, one for each position; float32.

    "softmax" takes softmax(logits / temperature); "gumbel" perturbs the logits with Gumbel noise first (arXiv 1611.01144);
    "straight_through" has the one-hot of the perturbed logits' maximum as value, and the gradient of "gumbel".

    Args:
      keys: one for each example, so that its noise does not depend on the batch; None draws no noise. "softmax" needs none.
      temperature: above 0.
    """
    if relaxation not in RELAXATIONS:
        raise UserError(f"relaxation={relaxation!r} is not one of {', '.join(RELAXATIONS)}")
    logits = logits.astype(jnp.float32)
    if relaxation != "softmax" and keys is not None:
        # mode="high": the common 23-bit uniform cannot produce the far tail, which biases draws over thousands of values
        logits = logits + jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], mode="high"))(keys)
    soft = jax.nn.softmax(logits / temperature, axis=-1)
    if relaxation != "straight_through":
        return soft
    hard = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
    return hard + (soft - jax.lax.stop_gradient(soft))  # the bracket is exactly 0


class Simplicial(nn.Module):
    """Tokens to L points on simplices of V corners, and back to one vector.

    The norm is taken over all L * V numbers together, so it couples the positions.

    Attributes:
      readout: "plain": the vector is a linear map of all L * V numbers; "shared": the mean over positions of one map of V numbers;
        "pos-shared": of this map plus a learned vector for each position.

    Raises:
      UserError: there is no such readout, or more values than a code store's uint16 can tell apart.
    """

    positions: int
    values: int
    width: int
    relaxation: str = "softmax"
    readout: str = "plain"

    def setup(self):
        if self.readout not in READOUTS:
            raise UserError(f"readout={self.readout!r} is not one of {', '.join(READOUTS)}")
        if self.values > LARGEST:
            raise UserError(f"values={self.values} is more than {LARGEST}: codes are uint16 at most; choose fewer")
        self.embed = Dense(self.positions * self.values, use_bias=False, kernel_init=FAN_IN)
        self.norm = LayerNorm()
        self.out = Dense(self.width, use_bias=False, kernel_init=FAN_IN)
        if self.readout == "pos-shared":
            self.bias = self.param("bias", NORMAL, (self.positions, self.width))

    def logits(self, tokens: Float[Array, "b m"]) -> Float[Array, "b l v"]:
        """float32, so that narrow dtypes add no ties after the norm."""
        joint = self.norm(self.embed(tokens, dtype=tokens.dtype).astype(jnp.float32))
        return joint.reshape(-1, self.positions, self.values)

    def __call__(
        self,
        tokens: Float[Array, "b m"],
        *,
        keys: Key[Array, "b"] | None = None,
        temperature: float | Array = 1.0,
        read: tuple[int, int] | None = None,
    ) -> dict[str, Array]:
        """logits [b l v], simplices [b l v] (see `relax`), vector [b d], not normalized, of the positions `read`: (from, below); None is all.

        A mean over positions is one over those that are read.
        """
        logits = self.logits(tokens)
        simplices = relax(logits, self.relaxation, keys=keys, temperature=temperature)
        low, high = read or (0, self.positions)
        if self.readout == "plain":
            place = jnp.arange(self.positions)[:, None]
            shown = simplices if read is None else jnp.where((place >= low) & (place < high), simplices, 0.0)
            vector = self.out(shown.reshape(len(tokens), -1))
        else:  # a linear map of the mean is the mean of the maps, at a fraction of the work
            vector = self.out(simplices[:, low:high].mean(1))
        if self.readout == "pos-shared":
            vector = vector + self.bias[low:high].mean(0).astype(vector.dtype)
        return {"logits": logits, "simplices": simplices, "vector": vector}


class DinoHead(nn.Module):
    """Scores against prototypes: three dense layers, L2 norm, weight-normalized linear map (DINO, arXiv 2104.14294)."""

    prototypes: int
    hidden: int = 2048
    bottleneck: int = 256

    @nn.compact
    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n p"]:
        x = jax.nn.gelu(Dense(self.hidden, kernel_init=NORMAL, name="fc1")(x), approximate=False)
        x = jax.nn.gelu(Dense(self.hidden, kernel_init=NORMAL, name="fc2")(x), approximate=False)
        x = Dense(self.bottleneck, kernel_init=NORMAL, name="fc3")(x)
        direction = self.param("direction", FAN_IN, (self.bottleneck, self.prototypes))
        gain = self.param("gain", ONES, (self.prototypes,))
        kernel = _unit(direction, axis=0) * gain.astype(jnp.float32)
        name = "/".join((*self.path, "direction"))
        y = matmul(_unit(x, axis=-1).astype(x.dtype).reshape(-1, self.bottleneck), kernel.astype(x.dtype), name)
        return y.reshape(*x.shape[:-1], self.prototypes)


def _unit(x, axis):
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=axis, keepdims=True), 1e-24))  # not below a length of 1e-12


class Encoder(nn.Module):
    """ViT, simplicial head on its class token and registers, and DINO head.

    The simplicial head's vector goes through the ViT's final norm and takes the place of the class token.

    Attributes, besides those of `ViT`:
      positions, values: L and V, the shape of a code.
      relaxation: "softmax", "gumbel" or "straight_through"; see `relax`.
      readout: "plain", "shared" or "pos-shared"; see `Simplicial`.
      prototypes, hidden, bottleneck: of the DINO head.
      separate_head: a second DINO head for patches, as in the larger models of DINOv2; otherwise patches share that of the class token.
    """

    image: int
    patch: int
    width: int
    depth: int
    heads: int
    positions: int
    values: int
    prototypes: int
    relaxation: str = "softmax"
    readout: str = "plain"
    hidden: int = 2048
    bottleneck: int = 256
    separate_head: bool = False
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

    def setup(self):
        self.vit = ViT(
            image=self.image,
            patch=self.patch,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            channels=self.channels,
            registers=self.registers,
            mlp_ratio=self.mlp_ratio,
            mlp=self.mlp,
            pos=self.pos,
            pos_resize=self.pos_resize,
            layer_scale=self.layer_scale,
            qk_norm=self.qk_norm,
            remat=self.remat,
            unroll=self.unroll,
            implementation=self.implementation,
        )
        self.simplicial = Simplicial(self.positions, self.values, self.width, self.relaxation, self.readout)
        self.head = DinoHead(self.prototypes, self.hidden, self.bottleneck)
        if self.separate_head:
            self.patch_head = DinoHead(self.prototypes, self.hidden, self.bottleneck)

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
          keys, temperature: see `relax`; keys=None draws no noise.
          masked, kept: see `ViT`.
          read: the range of positions from which the vector is made; see `Simplicial`.

        Returns:
          vector [b d], the class token; logits and simplices [b l v]; prototypes [b p]; and the ViT's last block, not normalized:
          cls [b d], registers [b r d], patches [b n d].
        """
        tokens = self.vit(images, masked=masked, kept=kept)
        codes = self.simplicial(_flat(tokens), keys=keys, temperature=temperature, read=read)
        vector = self.vit.normalize(codes.pop("vector"))
        if self.is_initializing():
            self.score(tokens["patches"])  # makes the parameters of a head of its own
        return {**tokens, **codes, "vector": vector, "prototypes": self.head(vector)}

    def codes(self, images: Float[Array, "b y x c"]) -> Int[Array, "b l"]:
        """Discrete codes, argmax over V of the logits: neither temperature nor noise; int32."""
        return jnp.argmax(self.simplicial.logits(_flat(self.vit(images))), axis=-1).astype(jnp.int32)

    def score(self, vectors: Float[Array, "*n d"]) -> Float[Array, "*n p"]:
        """Prototype scores of normalized patches (iBOT): of their own DINO head if there is one, else of the class token's."""
        return self.patch_head(vectors) if self.separate_head else self.head(vectors)

    def normalize(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
        """The ViT's final norm."""
        return self.vit.normalize(x)


def flops(model: Encoder, *, image: int | None = None, codes: bool = False, drop_path: float = 0.0) -> float:
    """FLOPs of a forward pass of one crop through ViT, simplicial head and DINO head; what is left out: `layers.block_flops`.

    Args:
      image: side of the crop in pixels; by default the model's.
      codes: counts `Encoder.codes`, which ends at the logits of the simplicial head.
      drop_path: see `vit.flops`.
    """
    joint = model.positions * model.values
    logits = vit_flops(model, image=image, drop_path=drop_path) + 2.0 * (1 + model.registers) * model.width * joint
    if codes:
        return logits
    read = joint if model.readout == "plain" else model.values
    return logits + 2.0 * read * model.width + head_flops(model)


def head_flops(model: Encoder) -> float:
    """FLOPs of a forward pass of one token through a DINO head."""
    widths = (model.width, model.hidden, model.hidden, model.bottleneck, model.prototypes)
    return sum(2.0 * inputs * outputs for inputs, outputs in itertools.pairwise(widths))


def _flat(tokens):
    """Class token and registers side by side, [b, (1 + r) d]."""
    return jnp.concatenate([tokens["cls"], tokens["registers"].reshape(len(tokens["cls"]), -1)], axis=-1)
