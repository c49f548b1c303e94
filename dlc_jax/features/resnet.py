"""ResNets for CIFAR-10 at 32 pixels, of 20 and 56 layers (arXiv 1512.03385, section 4.2).

Shortcuts are option A: every other pixel, and zeros for the channels that are new. Files are those
of akamaster/pytorch_resnet_cifar10.

Outputs:
  pool: 64 averages of the last block.
  logits: of the 10 classes, in CIFAR-10's order.

The protocol is "native": images must be of 32 pixels. They get ImageNet's mean and deviation.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from dlc_jax.errors import UserError
from dlc_jax.features import weights
from dlc_jax.features.extractor import stacked
from dlc_jax.features.layers import ConvNorm, standardize
from dlc_jax.typing import Array, Float

PROTOCOLS = ("native",)
OUTPUTS = {"pool": 64, "logits": 10}
SIDE = 32
# our parameter -> what it is called in the file, of a convolution or the norm beside it
NORM = {"scale": "weight", "bias": "bias", "mean": "running_mean", "variance": "running_var"}


class ResNet(nn.Module):
    """The network; its parameters have the file's names of convolutions.

    Attributes:
      depth: number of layers, 6 n + 2.
    """

    depth: int

    @nn.compact
    def __call__(self, x: Float[Array, "n 32 32 3"]) -> dict[str, Array]:
        """Features of standardized images."""
        x = _unit("conv1", 16)(x, relu=True)
        for stage, width in enumerate((16, 32, 64), start=1):
            for number in range((self.depth - 2) // 6):
                stride = 2 if stage > 1 and number == 0 else 1
                name = f"layer{stage}.{number}"
                y = _unit(f"{name}.conv1", width, stride)(x, relu=True)
                y = _unit(f"{name}.conv2", width)(y)
                new = (width - x.shape[-1]) // 2
                x = jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (new, new)))
                x = nn.relu(x + y)
        pool = x.mean((1, 2))
        return {"pool": pool, "logits": nn.Dense(OUTPUTS["logits"], name="linear")(pool)}


def make(path: Path, protocol: str, *, depth: int) -> dict:
    """Fields of the Extractor.

    Raises:
      UserError: the file is not of this network.
    """
    network = ResNet(depth)

    def apply(params, prepared):
        return network.apply({"params": params}, standardize(prepared.astype(jnp.float32)))

    found = weights.open_file(path, lambda name: name.removeprefix("module."))
    shapes, unused = weights.abstract(network, 1, SIDE, SIDE, 3), r".*\.num_batches_tracked"
    return {
        "params": weights.read(found, shapes, _name, unused=unused),
        "prepare": functools.partial(of_size, f"resnet{depth}"),
        "apply": apply,
        "outputs": OUTPUTS,
    }


def of_size(who: str, images: Sequence[np.ndarray]) -> np.ndarray:
    """The images as one array.

    Raises:
      UserError: they are not of 32 pixels.
    """
    for image in images:
        if image.shape[:2] != (SIDE, SIDE):
            raise UserError(
                f"{who} reads images of {SIDE} x {SIDE} pixels, not of "
                f"{image.shape[0]} x {image.shape[1]}; choose other features"
            )
    return stacked(images)


def _unit(name, width, stride=1):
    # With stride 2, "SAME" would pad on one side only.
    layer = ConvNorm(width, (3, 3), stride, ((1, 1), (1, 1)), name=name)
    return lambda x, relu=False: nn.relu(layer(x)) if relu else layer(x)


def _name(path: str) -> str:
    """A parameter's name: of layer1.0.conv1/scale, layer1.0.bn1.weight."""
    layer, tensor = path.split("/")
    if tensor == "kernel":
        return f"{layer}.weight"
    return f"{layer.replace('conv', 'bn')}.{tensor if layer == 'linear' else NORM[tensor]}"
