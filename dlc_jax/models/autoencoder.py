"""The convolutional autoencoder whose latents a generator draws (arXiv 2112.10752).

    image [y, x, 3] in [-1, 1] ──encode──► mean and log-variance of a Gaussian [y/8, x/8, 4]
    ──latents──► a draw, scaled ──decode──► image

The shape is that of the published `sd-vae-ft-ema`, whose weights `dlc import vae` reads; nothing
here trains it.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dlc_jax.errors import UserError
from dlc_jax.models.layers import FAN_IN, ZEROS, Attention
from dlc_jax.typing import Array, Float

LOGVAR = (-30.0, 20.0)  # what the log-variances are clipped to


def check_sides(images: Float[Array, "b y x 3"], stride: int) -> None:
    """UserError if the sides of images are no multiples of an autoencoder's stride."""
    height, width = images.shape[1:3]
    if height % stride or width % stride:
        raise UserError(
            f"images of {height}x{width} pixels have no latents; "
            f"their sides must be multiples of {stride}"
        )


class Conv(nn.Module):
    """Convolution of a square kernel among zeros: `pad` of them before and after.

    Without `pad` there are as many on both sides, but at stride 2 one below and to the right.
    """

    features: int
    size: int = 3
    stride: int = 1
    pad: tuple[int, int] | None = None
    bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b y x c"]) -> Float[Array, "b yy xx d"]:
        kernel = self.param("kernel", FAN_IN, (self.size, self.size, x.shape[-1], self.features))
        pad = self.pad or ((0, 1) if self.stride == 2 else (self.size // 2, self.size // 2))
        y = jax.lax.conv_general_dilated(
            x.astype(kernel.dtype),
            kernel,
            (self.stride,) * 2,
            (pad, pad),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + self.param("bias", ZEROS, (self.features,)) if self.bias else y


class GroupNorm(nn.Module):
    """Group normalization (arXiv 1803.08494) in float32; the result has the input's dtype."""

    groups: int
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "b y x c"]) -> Float[Array, "b y x c"]:
        how = {"epsilon": self.epsilon, "dtype": jnp.float32, "use_fast_variance": False}
        norm = nn.GroupNorm(self.groups, **how, name="norm")
        nn.share_scope(self, norm)
        return norm(x).astype(x.dtype)


class Residual(nn.Module):
    """x + conv(silu norm conv(silu norm x)), with a 1x1 convolution of x for other channels."""

    features: int
    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "b y x c"]) -> Float[Array, "b y x d"]:
        y = Conv(self.features, name="conv1")(jax.nn.silu(GroupNorm(self.groups, name="norm1")(x)))
        y = Conv(self.features, name="conv2")(jax.nn.silu(GroupNorm(self.groups, name="norm2")(y)))
        if x.shape[-1] != self.features:
            x = Conv(self.features, size=1, name="shortcut")(x)
        return y + x


class Middle(nn.Module):
    """At the smallest resolution: a residual, attention of one head over all pixels, a residual."""

    groups: int

    @nn.compact
    def __call__(self, x: Float[Array, "b y x c"]) -> Float[Array, "b y x c"]:
        b, height, width, c = x.shape
        x = Residual(c, self.groups, name="residual0")(x)
        tokens = GroupNorm(self.groups, name="norm")(x).reshape(b, height * width, c)
        x = x + Attention(1, name="attention")(tokens).reshape(x.shape)
        return Residual(c, self.groups, name="residual1")(x)


class Autoencoder(nn.Module):
    """Images to the moments of their latents, and latents to images.

    Attributes:
      channels: of each level. Every level but the first halves the sides.
      residuals: of a level going down. Going up there is one more.
      latent: channels of a latent.
      groups: of the normalizations.
      scaling: of latents. Those that `latents` gives and `decode` takes have about unit variance.
    """

    channels: tuple[int, ...] = (128, 256, 512, 512)
    residuals: int = 2
    latent: int = 4
    groups: int = 32
    scaling: float = 0.18215

    def setup(self):
        self.encoder_in = Conv(self.channels[0])

        def level(width, residuals):
            return [Residual(width, self.groups) for _ in range(residuals)]

        self.down = [level(width, self.residuals) for width in self.channels]
        self.smaller = [Conv(width, stride=2) for width in self.channels[:-1]]
        self.encoder_middle = Middle(self.groups)
        self.encoder_norm = GroupNorm(self.groups)
        self.encoder_out = Conv(2 * self.latent)
        self.quant = Conv(2 * self.latent, size=1)
        self.post_quant = Conv(self.latent, size=1)
        self.decoder_in = Conv(self.channels[-1])
        self.decoder_middle = Middle(self.groups)
        self.up = [level(width, self.residuals + 1) for width in reversed(self.channels)]
        self.larger = [Conv(width) for width in reversed(self.channels[1:])]
        self.decoder_norm = GroupNorm(self.groups)
        self.decoder_out = Conv(3)

    @property
    def stride(self) -> int:
        """Sides of an image in multiples of its latent's."""
        return 2 ** (len(self.channels) - 1)

    def __call__(self, images: Float[Array, "b y x 3"]) -> Float[Array, "b y x 3"]:
        """Images as they come back from their posterior's mean; makes every parameter in `init`."""
        return self.decode(self.scaling * self.encode(images)["mean"])

    def encode(self, images: Float[Array, "b y x 3"]) -> dict[str, Array]:
        """Images in [-1, 1] to the posterior's mean and logvar, float32, before scaling.

        They are [b, y/8, x/8, 4] with four levels.

        Raises:
          UserError: the levels do not halve the sides evenly.
        """
        check_sides(images, self.stride)
        x = self.encoder_in(images)
        for level, residuals in enumerate(self.down):
            for residual in residuals:
                x = residual(x)
            if level < len(self.smaller):
                x = self.smaller[level](x)
        x = self.encoder_out(jax.nn.silu(self.encoder_norm(self.encoder_middle(x))))
        mean, logvar = jnp.split(self.quant(x).astype(jnp.float32), 2, axis=-1)
        return {"mean": mean, "logvar": jnp.clip(logvar, *LOGVAR)}

    def latents(
        self,
        mean: Float[Array, "b y x c"],
        logvar: Float[Array, "b y x c"],
        noise: Float[Array, "b y x c"],
    ) -> Float[Array, "b y x c"]:
        """Draws of the posterior from standard normal noise, scaled: what a generator learns."""
        return self.scaling * (mean + jnp.exp(0.5 * logvar) * noise)

    def decode(self, latents: Float[Array, "b y x c"]) -> Float[Array, "b yy xx 3"]:
        """Scaled latents to images, about in [-1, 1], of eight times the sides with four levels."""
        x = self.decoder_middle(self.decoder_in(self.post_quant(latents / self.scaling)))
        for level, residuals in enumerate(self.up):
            for residual in residuals:
                x = residual(x)
            if level < len(self.larger):
                x = self.larger[level](jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
        return self.decoder_out(jax.nn.silu(self.decoder_norm(x))).astype(jnp.float32)
