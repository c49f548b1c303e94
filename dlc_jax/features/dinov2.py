"""DINOv2 (arXiv 2304.07193): features of our own vision transformer with published weights.

Output:
  cls: the class token after the final norm; 1024 of size L, which FD-DINOv2 is defined with
    (arXiv 2306.04675).

The protocol is "clean", see `resize`, to 224 pixels, then ImageNet's mean and deviation. Learned
positions of other sizes are resized as transformers does. DINOv2's own code steps through those of
models without registers by 37 / 16.1 and not 37 / 16; features differ a little for it.
"""

from pathlib import Path

import jax.numpy as jnp

from dlc_jax.features import resize, weights
from dlc_jax.features.layers import standardize
from dlc_jax.interop import sections, slots, torch_names
from dlc_jax.models.vit import ViT

PROTOCOLS = ("clean",)
SIDE = 224


def make(path: Path, protocol: str) -> dict:
    """Fields of the Extractor; the file may have DINOv2's names or those of transformers.

    Raises:
      UserError: the file is not of a DINOv2.
    """
    found = weights.open_file(path, torch_names.clean)
    section = sections.vit(found.shapes, found.where, heads=found.number("heads"))
    network = ViT(**section)
    shapes = slots.shapes_of({"vit": weights.abstract(network, 1, SIDE, SIDE, 3)})
    params = found.params(torch_names.layout(found.shapes)(shapes), shapes)

    def apply(params, prepared):
        images = standardize(prepared.astype(jnp.float32))
        return {"cls": network.apply({"params": params}, images)["vector"]}

    return {
        "params": slots.nested(params)["vit"],
        "prepare": lambda images: resize.clean(images, SIDE),
        "apply": apply,
        "outputs": {"cls": section["width"]},
    }
