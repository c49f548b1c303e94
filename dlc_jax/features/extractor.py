"""A network that turns images into the features that metrics compare."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from dlc_jax.typing import Array, Tree

Images = Sequence[np.ndarray] | np.ndarray  # uint8 (y, x, 3) each


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extractor:
    """A network with its weights, and how images get to the size that it reads.

    Features of different protocols are of different networks, as it were: never compare them.

    Attributes:
      name: "inception", "squeezenet", "dinov2", "resnet20" or "resnet56".
      protocol: how images are resized, see the network's module.
      weights_sha256: of the file of the weights.
      published: that file is the published one, by its SHA-256. None: no SHA-256 is known.
      outputs: {name of a feature: its dimensions}.
      params: tree of float32 arrays.
      prepare: (images) -> array (n, y, x, 3), uint8 or float32: what the protocol needs of the
        host. Images are uint8 RGB, (n, y, x, 3) or a list of (y, x, 3); where the protocol does
        nothing on the host they must be of one size.
      apply: (params, prepared) -> {name: float32 (n, dimensions)}. It is pure. Products are of the
        highest precision, whatever the defaults of the process are.
    """

    name: str
    protocol: str
    weights_sha256: str
    published: bool | None
    outputs: Mapping[str, int]
    params: Tree
    prepare: Callable[[Images], np.ndarray]
    apply: Callable[[Tree, Array], dict[str, Array]]

    @property
    def frechet_name(self) -> str:
        """What the Fréchet distance of these features is called: "fid" of Inception's alone."""
        return "fid" if self.name == "inception" else f"fd_{self.name}"


def highest(function: Callable) -> Callable:
    """The function, whose products and convolutions are traced with the highest precision.

    Products in bfloat16 or TF32, the defaults of TPUs and GPUs, shift the distances.
    """

    @functools.wraps(function)
    def wrapped(*arguments):
        with jax.default_matmul_precision("highest"):
            return function(*arguments)

    return wrapped


def stacked(images: Images) -> np.ndarray:
    """Images of one size as one array (n, y, x, 3): a protocol with nothing to do on the host."""
    return np.ascontiguousarray(np.stack(images))
