"""DINOv2 (arXiv 2304.07193): features of our own vision transformer with published weights.

Output:
  cls: the class token after the final norm; 1024 of size L, which FD-DINOv2 is defined with
    (arXiv 2306.04675).

The protocol is "clean", see `resize`, to 224 pixels, then ImageNet's mean and deviation. Learned
positions are resized to that as the program does whose names the file has: DINOv2's own, which
without registers steps through its 37 x 37 positions by 37 / 16.1, or transformers, by 37 / 16.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from dlc_jax.features import resize, weights
from dlc_jax.features.layers import standardize
from dlc_jax.interop import sections, slots, torch_names
from dlc_jax.models import positions
from dlc_jax.models.vit import ViT

PROTOCOLS = ("clean",)
SIDE = 224
OFFSET = 0.1  # of a patch, in the step of DINOv2's own code


def make(path: Path, protocol: str) -> dict:
    """Fields of the Extractor; the file may have DINOv2's names or those of transformers.

    Raises:
      UserError: the file is not of a DINOv2.
    """
    found = weights.open_file(path, torch_names.clean)
    section = sections.vit(found.shapes, found.where, heads=found.number("heads"))
    network = ViT(**section)
    shapes = slots.shapes_of({"vit": weights.abstract(network, 1, SIDE, SIDE, 3)})
    table = torch_names.layout(found.shapes)
    params = found.params(table(shapes), shapes)
    own = table is torch_names.official and not section["registers"]
    if own and section["image"] != SIDE:
        cls, patches = np.split(params["vit/pos_embed"], [1])
        side = SIDE // section["patch"]
        sized = positions.resize(jnp.asarray(patches), side, antialias=False, offset=OFFSET)
        params["vit/pos_embed"] = np.concatenate([cls, sized])
        network = ViT(**section | {"image": SIDE})

    def apply(params, prepared):
        images = standardize(prepared.astype(jnp.float32))
        return {"cls": network.apply({"params": params}, images)["vector"]}

    return {
        "params": slots.nested(params)["vit"],
        "prepare": lambda images: resize.clean(images, SIDE),
        "apply": apply,
        "outputs": {"cls": section["width"]},
    }
