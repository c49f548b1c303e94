"""Three ways to the size that a network reads; distances after different ones do not compare.

    adm     bilinear of TensorFlow 1: pixel i is read at i * old / new; no antialiasing. The graph
            that ADM (arXiv 2105.05233) evaluates with has it, and torch-fidelity.
    torch   bilinear between centers of pixels: (i + 1/2) * old / new - 1/2; no antialiasing, as in
            pytorch-fid.
    clean   Pillow's bicubic, antialiased, of each channel in float32, cut to 0..255, as in
            clean-fid (arXiv 2104.11222) and for DINOv2 in dgm-eval (arXiv 2306.04675).

Why they differ: arXiv 2104.11222. The first two are computed on the device, the third on the host.
"""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from PIL import Image

from dlc_jax.typing import Array, Float


@functools.lru_cache(maxsize=64)
def matrix(old: int, new: int, *, centers: bool) -> np.ndarray:
    """Bilinear weights (new, old) of one direction, float32.

    Args:
      centers: True reads at (i + 1/2) * old / new - 1/2, False at i * old / new. Beyond the edge
        is the pixel at the edge.
    """
    scale = np.float32(old) / np.float32(new)
    places = np.arange(new, dtype=np.float64)
    places = np.maximum((places + 0.5) * scale - 0.5, 0) if centers else places * scale
    places = places.astype(np.float32)
    low = np.minimum(places.astype(int), old - 1)
    part, rows = places - low, np.arange(new)
    weights = np.zeros((new, old), np.float32)
    np.add.at(weights, (rows, low), 1 - part)
    np.add.at(weights, (rows, np.minimum(low + 1, old - 1)), part)
    return weights


def bilinear(
    images: Float[Array, "n y x c"], side: int, *, centers: bool
) -> Float[Array, "n side side c"]:
    """Images of `side` pixels; see `matrix`. Identity for those that are."""
    _, rows, columns, _ = images.shape
    if (rows, columns) == (side, side):
        return images
    down, along = matrix(rows, side, centers=centers), matrix(columns, side, centers=centers)
    images = jnp.einsum("nyxc,ty->ntxc", images, down)
    return jnp.einsum("ntxc,sx->ntsc", images, along)


def clean(images: Sequence[np.ndarray], side: int) -> np.ndarray:
    """float32 (n, side, side, 3) in 0..255, of uint8 (y, x, 3) each, of any sizes."""
    made = np.empty((len(images), side, side, 3), np.float32)
    for image, place in zip(images, made):
        for channel in range(3):
            plane = Image.fromarray(image[..., channel].astype(np.float32))
            place[..., channel] = plane.resize((side, side), Image.Resampling.BICUBIC)
    return made.clip(0, 255)
