"""Layers of convolutional networks at inference, NHWC."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax.errors import UserError
from dlc_jax.typing import Array, Float

ZEROS = nn.initializers.zeros  # weights are always read from a file
Images = Float[Array, "n y x c"]


class ConvNorm(nn.Module):
    """A convolution without bias, then batch normalization by the running statistics.

    (conv(x) - mean) / sqrt(variance + eps) * scale + bias, with all factors in the kernel.

    Attributes:
      features: channels of the output.
      kernel: its rows and columns.
      stride: in both directions.
      padding: "SAME" or "VALID", or of both ends of rows and columns.
      eps: added to the variance.
    """

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str | tuple[tuple[int, int], ...] = "SAME"
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Images) -> Images:
        weights = self.param("kernel", ZEROS, (*self.kernel, x.shape[-1], self.features))
        names = ("scale", "bias", "mean", "variance")
        scale, bias, mean, variance = (self.param(name, ZEROS, (self.features,)) for name in names)
        factor = scale / jnp.sqrt(variance + self.eps)
        strides, order = (self.stride, self.stride), ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(
            x, weights * factor, strides, self.padding, dimension_numbers=order
        )
        return y + (bias - mean * factor)


class Pointwise(nn.Module):
    """A 1x1 convolution, as the matrix product that it is: several times as fast on CPUs."""

    features: int

    @nn.compact
    def __call__(self, x: Images) -> Images:
        kernel = self.param("kernel", ZEROS, (1, 1, x.shape[-1], self.features))
        return x @ kernel[0, 0] + self.param("bias", ZEROS, (self.features,))


class Fire(nn.Module):
    """A squeeze to few channels, then 1x1 and 3x3 convolutions side by side (arXiv 1602.07360).

    Attributes:
      squeezed: channels between.
      expanded: channels of each of the two.
    """

    squeezed: int
    expanded: int

    @nn.compact
    def __call__(self, x: Images) -> Images:
        x = nn.relu(Pointwise(self.squeezed, name="squeeze")(x))
        small = Pointwise(self.expanded, name="expand1x1")(x)
        large = nn.Conv(self.expanded, (3, 3), name="expand3x3")(x)
        return nn.relu(jnp.concatenate([small, large], axis=-1))


def max_pool(x: Images, window: int = 3, *, ceil: bool = False) -> Images:
    """The maximum of windows, 2 apart. With `ceil`, one that reaches over the edge counts too.

    By slices: three times as fast on CPUs as a windowed reduction.

    Raises:
      UserError: no window fits.
    """
    if min(x.shape[1:3]) < window:
        raise UserError(
            f"these images are too small for this network: {x.shape[1]} x {x.shape[2]} are left "
            f"where it takes the maximum of {window} x {window}; give larger ones"
        )
    for axis in (1, 2):
        over = (x.shape[axis] - window) % 2 if ceil else 0
        x = jnp.pad(x, [(0, over * (axis == each)) for each in range(4)], constant_values=-jnp.inf)
        last = x.shape[axis] - window
        parts = (
            jax.lax.slice_in_dim(x, first, first + last + 1, stride=2, axis=axis)
            for first in range(window)
        )
        x = functools.reduce(jnp.maximum, parts)
    return x


def standardize(pixels: Images) -> Images:
    """Pixels of 0 to 255 with ImageNet's mean and deviation."""
    mean = np.array([0.485, 0.456, 0.406], np.float32)
    deviation = np.array([0.229, 0.224, 0.225], np.float32)
    return (pixels / 255 - mean) / deviation
