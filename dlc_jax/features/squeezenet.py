"""SqueezeNet v1.0 of Caffe (arXiv 1602.07360): a small ImageNet network for tests and tracking.

Outputs:
  pool: 512 averages of the last Fire module (fire9).
  logits: 1000, of ImageNet's classes in the order of their WordNet numbers.

Protocols:
  crop: Pillow's bilinear, antialiased, takes the shorter side to 256; the 227 pixels of the center
    are kept. For photographs.
  stretch: both sides to 227, by the bilinear "torch" of `resize`. For images of one size.

Images are then BGR of 0..255 minus (104, 117, 123), as in Caffe.
"""

from collections.abc import Sequence
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from PIL import Image

from dlc_jax.features import resize, weights
from dlc_jax.features.extractor import stacked
from dlc_jax.features.layers import Fire, Pointwise, max_pool
from dlc_jax.typing import Array, Float

PROTOCOLS = ("crop", "stretch")
OUTPUTS = {"pool": 512, "logits": 1000}
SHORTER, SIDE = 256, 227
MEAN = np.array([104, 117, 123], np.float32)  # blue, green, red
# squeezed and expanded channels of fire2 to fire9
FIRES = ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))


class SqueezeNet(nn.Module):
    """The network; its parameters have Caffe's names of layers."""

    @nn.compact
    def __call__(self, x: Float[Array, "n 227 227 3"]) -> dict[str, Array]:
        """Features of BGR images without their mean."""
        x = nn.Conv(96, (7, 7), (2, 2), "VALID", name="conv1")(x)
        x = max_pool(nn.relu(x), ceil=True)
        for number, (squeezed, expanded) in enumerate(FIRES, start=2):
            x = Fire(squeezed, expanded, name=f"fire{number}")(x)
            if number in (4, 8):
                x = max_pool(x, ceil=True)
        scores = nn.relu(Pointwise(OUTPUTS["logits"], name="conv10")(x))
        return {"pool": x.mean((1, 2)), "logits": scores.mean((1, 2))}


def make(path: Path, protocol: str) -> dict:
    """Fields of the Extractor.

    Raises:
      UserError: the file is not of this network.
    """
    network = SqueezeNet()

    def apply(params, prepared):
        x = resize.bilinear(prepared.astype(jnp.float32), SIDE, centers=True)
        return network.apply({"params": params}, x[..., ::-1] - MEAN)

    shapes = weights.abstract(network, 1, SIDE, SIDE, 3)
    return {
        "params": weights.read(weights.open_file(path), shapes, _name),
        "prepare": cropped if protocol == "crop" else stacked,
        "apply": apply,
        "outputs": OUTPUTS,
    }


def cropped(images: Sequence[np.ndarray]) -> np.ndarray:
    """uint8 (n, 227, 227, 3) of uint8 (y, x, 3) each, of any sizes."""
    made = []
    for image in images:
        rows, columns = image.shape[:2]
        scale = SHORTER / min(rows, columns)
        size = round(columns * scale), round(rows * scale)
        scaled = Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)
        left, top = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
        made.append(np.asarray(scaled.crop((left, top, left + SIDE, top + SIDE))))
    return np.stack(made)


def _name(path: str) -> str:
    return path.replace("/squeeze/", "/squeeze1x1/").replace("/kernel", "/weight")
