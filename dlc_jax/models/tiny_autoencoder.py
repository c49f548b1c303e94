"""The tiny autoencoder: a distilled one without posterior, in some milliseconds an image.

    image [y, x, 3] in [-1, 1] ──encode──► mean [y/8, x/8, 32] ──decode──► image

The shape is that of TAEF2 (TAESD for the latents of FLUX.2), whose weights `dlc import vae` reads;
nothing here trains it. Layers are numbered as in its files, activations counted.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dlc_jax.models.autoencoder import Conv, GroupNorm, check_sides
from dlc_jax.typing import Array, Float

LEVELS = 3  # each halves the sides
BOUND = 3.0  # latents are squashed to (-BOUND, BOUND) before they are decoded


class Block(nn.Module):
    """relu(x + convolutions of x), after x + 1x1 convolutions of four times the width, if pooled.

    `groups` are those of the normalization between the latter; 0 leaves them out.
    """

    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "b y x c"]) -> Float[Array, "b y x c"]:
        width = x.shape[-1]
        if self.groups:
            y = Conv(4 * width, size=1, bias=False, name="pool0")(x)
            y = jax.nn.relu(GroupNorm(self.groups, epsilon=1e-5, name="pool1")(y))
            x = x + Conv(width, size=1, bias=False, name="pool3")(y)
        y = jax.nn.relu(Conv(width, name="conv0")(x))
        y = jax.nn.relu(Conv(width, name="conv2")(y))
        return jax.nn.relu(x + Conv(width, name="conv4")(y))


class Down(nn.Module):
    """Images in [0, 1] to latents."""

    channels: int
    blocks: int
    latent: int
    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "b y x 3"]) -> Float[Array, "b yy xx c"]:
        x = Conv(self.channels, name="layer0")(x)
        x = Block(0, name="layer1")(x)
        number = 2
        for level in range(LEVELS):
            name = f"layer{number}"
            x = Conv(self.channels, stride=2, pad=(1, 1), bias=False, name=name)(x)
            groups = self.groups if level == LEVELS - 1 else 0
            for block in range(self.blocks):
                x = Block(groups, name=f"layer{number + 1 + block}")(x)
            number += 1 + self.blocks
        return Conv(self.latent, name=f"layer{number}")(x)


class Up(nn.Module):
    """Latents to images in [0, 1], about."""

    channels: int
    blocks: int
    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "b y x c"]) -> Float[Array, "b yy xx 3"]:
        x = BOUND * jnp.tanh(x / BOUND)  # layer 0
        x = jax.nn.relu(Conv(self.channels, name="layer1")(x))  # and 2
        number = 3
        for level in range(LEVELS):
            for block in range(self.blocks):
                groups = 0 if level else self.groups
                x = Block(groups, name=f"layer{number + block}")(x)
            number += self.blocks + 1  # and one that doubles the sides
            x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
            x = Conv(self.channels, bias=False, name=f"layer{number}")(x)
            number += 1
        x = Block(0, name=f"layer{number}")(x)
        return Conv(3, name=f"layer{number + 1}")(x)


class TinyAutoencoder(nn.Module):
    """Images to latents, which are no Gaussians but single values, and back.

    Attributes:
      channels: of every layer.
      blocks: of a level.
      latent: channels of a latent.
      groups: of the normalizations at the smallest resolution; 0 for none, as in TAESD's first.
      scaling: of latents.
    """

    channels: int = 64
    blocks: int = 3
    latent: int = 32
    groups: int = 4
    scaling: float = 1.0

    def setup(self):
        self.encoder = Down(self.channels, self.blocks, self.latent, self.groups)
        self.decoder = Up(self.channels, self.blocks, self.groups)

    @property
    def stride(self) -> int:
        """Sides of an image in multiples of its latent's."""
        return 2**LEVELS

    def __call__(self, images: Float[Array, "b y x 3"]) -> Float[Array, "b y x 3"]:
        """Images as they come back; makes every parameter in `init`."""
        return self.decode(self.scaling * self.encode(images)["mean"])

    def encode(self, images: Float[Array, "b y x 3"]) -> dict[str, Array]:
        """Images in [-1, 1] to latents before scaling: their `mean` alone, float32.

        Raises:
          UserError: sides that are no multiples of 8.
        """
        check_sides(images, self.stride)
        return {"mean": self.encoder((images + 1) / 2).astype(jnp.float32)}

    def latents(
        self,
        mean: Float[Array, "b y x c"],
        logvar: Float[Array, "b y x c"] | None = None,
        noise: Float[Array, "b y x c"] | None = None,
    ) -> Float[Array, "b y x c"]:
        """Scaled latents: what a generator learns. There is nothing to draw."""
        return self.scaling * mean

    def decode(self, latents: Float[Array, "b y x c"]) -> Float[Array, "b yy xx 3"]:
        """Scaled latents to images, about in [-1, 1], of eight times the sides."""
        return 2 * self.decoder(latents / self.scaling).astype(jnp.float32) - 1
