"""LPIPS, a perceptual distance of two images (arXiv 1801.03924), versions 0.0 and 0.1.

Features of several layers of a trunk, each divided by its norm over channels at each pixel; the
squared differences are weighted by a head, averaged over pixels, and summed over layers.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from dlc_jax import checksum
from dlc_jax.errors import UserError
from dlc_jax.features.extractor import highest
from dlc_jax.features.layers import Fire, max_pool
from dlc_jax.features.weights import Published, abstract, check_there, expecting, open_file, read
from dlc_jax.typing import Array, Float, Tree

VERSIONS = ("0.1", "0.0")
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)
EPS = 1e-10
UNUSED = r"classifier\..*"
# torchvision's trunks: layers by number, ("conv", channels, kernel, stride, padding),
# ("fire", squeezed, expanded) or "pool"; after those of TAPS features are taken
ALEX = {
    0: ("conv", 64, 11, 4, 2),
    2: "pool",
    3: ("conv", 192, 5, 1, 2),
    5: "pool",
    6: ("conv", 384, 3, 1, 1),
    8: ("conv", 256, 3, 1, 1),
    10: ("conv", 256, 3, 1, 1),
}
VGG = {
    **{number: ("conv", 64, 3, 1, 1) for number in (0, 2)},
    **{number: ("conv", 128, 3, 1, 1) for number in (5, 7)},
    **{number: ("conv", 256, 3, 1, 1) for number in (10, 12, 14)},
    **{number: ("conv", 512, 3, 1, 1) for number in (17, 19, 21, 24, 26, 28)},
    **dict.fromkeys((4, 9, 16, 23), "pool"),
}
SQUEEZE = {
    0: ("conv", 64, 3, 2, 0),
    **dict.fromkeys((2, 5, 8), "pool"),
    **{number: ("fire", 16, 64) for number in (3, 4)},
    **{number: ("fire", 32, 128) for number in (6, 7)},
    **{number: ("fire", 48, 192) for number in (9, 10)},
    **{number: ("fire", 64, 256) for number in (11, 12)},
}
LAYERS = {"alex": ALEX, "vgg": VGG, "squeeze": SQUEEZE}
TAPS = {
    "alex": (0, 3, 6, 8, 10),
    "vgg": (2, 7, 14, 21, 28),
    "squeeze": (0, 4, 7, 9, 10, 11, 12),
}
WINDOW = {"alex": 3, "vgg": 2, "squeeze": 3}  # of the pools
TRUNKS = {
    name: Published(f"{file}-{digits}.pth", f"torchvision, {constant}.IMAGENET1K_V1", digits)
    for name, file, digits, constant in (
        ("alex", "alexnet-owt", "7be5be79", "AlexNet_Weights"),
        ("vgg", "vgg16", "397923af", "VGG16_Weights"),
        ("squeeze", "squeezenet1_1", "b8a52dc0", "SqueezeNet1_1_Weights"),
    )
}
HEADS = "github.com/richzhang/PerceptualSimilarity, lpips/weights"
DIGITS = {  # of SHA-256 of the heads
    ("0.0", "alex"): "18720f55",
    ("0.0", "vgg"): "b9e42362",
    ("0.0", "squeeze"): "c27abd3a",
    ("0.1", "alex"): "df73285e",
    ("0.1", "vgg"): "a78928a0",
    ("0.1", "squeeze"): "4a5350f2",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lpips:
    """A distance with its weights.

    Attributes:
      trunk: "alex", "vgg" or "squeeze".
      version: "0.1", or "0.0", which does not scale its input.
      weights_sha256: of the files, {"trunk": …, "heads": …}.
      published: whether these are the published ones, by their SHA-256.
      params: tree of float32 arrays.
      distance: (params, a, b) -> float32 (n,), of images (n, y, x, 3) in -1..1. It is pure, and
        computes with the highest precision. Images too small for the trunk are a UserError.
    """

    trunk: str
    version: str
    weights_sha256: Mapping[str, str]
    published: Mapping[str, bool]
    params: Tree
    distance: Callable[[Tree, Array, Array], Array]


class Trunk(nn.Module):
    """The features that a distance compares, one array for each layer.

    Attributes:
      trunk: "alex", "vgg" or "squeeze".
    """

    trunk: str

    @nn.compact
    def __call__(self, x: Float[Array, "n y x 3"]) -> list[Array]:
        features = []
        for number, layer in sorted(LAYERS[self.trunk].items()):
            name = f"features.{number}"
            if layer == "pool":
                x = max_pool(x, WINDOW[self.trunk], ceil=self.trunk == "squeeze")
            elif layer[0] == "fire":
                x = Fire(*layer[1:], name=name)(x)
            else:
                _, channels, kernel, stride, padding = layer
                conv = nn.Conv(channels, (kernel, kernel), stride, padding, name=name)
                x = nn.relu(conv(x))
            if number in TAPS[self.trunk]:
                features.append(x)
        return features


def load(
    trunk: str, *, weights: str | Path | None, heads: str | Path | None, version: str = "0.1"
) -> Lpips:
    """LPIPS with a trunk.

    Args:
      weights: file of torchvision's AlexNet ("alex"), VGG16 ("vgg") or SqueezeNet 1.1 ("squeeze").
      heads: file of the heads of this trunk and version.

    Raises:
      UserError: no such trunk or version, no such file, or a file of something else.
    """
    if trunk not in LAYERS or version not in VERSIONS:
        raise UserError(
            f"LPIPS {version} of {trunk!r}: trunks are {', '.join(LAYERS)}, "
            f"versions {', '.join(VERSIONS)}"
        )
    paths = {"trunk": weights, "heads": heads}
    place, digits = f"{HEADS}/v{version}", DIGITS[version, trunk]
    expected = {"trunk": TRUNKS[trunk], "heads": Published(f"{trunk}.pth", place, digits)}
    network, sums, params = Trunk(trunk), {}, {}
    shapes = {"trunk": abstract(network, 1, 64, 64, 3), "heads": _heads(trunk)}
    names = {"trunk": _name, "heads": "{}.model.1.weight".format}
    for part in paths:
        path = check_there(paths[part], f"LPIPS, {part}", expected[part])
        sums[part] = checksum.of_file(path)
        with expecting(expected[part]):
            params[part] = read(open_file(path), shapes[part], names[part], unused=UNUSED)
    return Lpips(
        trunk=trunk,
        version=version,
        weights_sha256=sums,
        published={part: sums[part].startswith(expected[part].sha256) for part in sums},
        params=params,
        distance=highest(functools.partial(_distance, network, version)),
    )


def _name(path: str) -> str:
    """A parameter's name in the file of a trunk: of features.0/kernel, features.0.weight."""
    return path.replace("/kernel", "/weight").replace("/", ".")


def _heads(trunk: str) -> dict[str, np.ndarray]:
    """{name of a head: weights of its shape}."""
    layers = [LAYERS[trunk][number] for number in TAPS[trunk]]
    widths = [2 * layer[2] if layer[0] == "fire" else layer[1] for layer in layers]
    return {f"lin{number}": np.zeros((1, 1, width, 1)) for number, width in enumerate(widths)}


def _distance(network: Trunk, version: str, params: Tree, a: Array, b: Array) -> Array:
    def features(images):
        x = (images - SHIFT) / SCALE if version == "0.1" else images
        return network.apply({"params": params["trunk"]}, x)

    total = jnp.zeros(len(a))
    for number, (x, y) in enumerate(zip(features(a), features(b))):
        weights = params["heads"][f"lin{number}"][0, 0, :, 0]
        total += ((_unit(x) - _unit(y)) ** 2 @ weights).mean((1, 2))
    return total


def _unit(x: Float[Array, "n y x c"]) -> Float[Array, "n y x c"]:
    return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + EPS)
