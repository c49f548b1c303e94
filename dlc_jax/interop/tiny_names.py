"""Names of the tiny autoencoder's tensors in its two files, and its settings from shapes.

A file numbers the layers of one half, so `both` sets encoder. or decoder. before its names.
"""

import re
from collections.abc import Mapping, Sequence

from dlc_jax.errors import UserError
from dlc_jax.interop import files
from dlc_jax.interop.slots import Slot, slot

HALVES = ("encoder", "decoder")
GROUPS = 4  # of the normalizations, which shapes do not tell; those of TAEF2


def both(paths: Sequence[str]) -> files.Tensors:
    """The tensors of an encoder's file and of a decoder's, in any order.

    Raises:
      UserError: see `files.load`; they are not one of each.
    """
    found = {}
    for path in paths:
        tensors = files.load(path)
        # a decoder's first layer has no parameters
        half = "encoder" if "0.weight" in tensors.shapes else "decoder"
        if half in found or not {"0.weight", "1.weight"} & tensors.shapes.keys():
            raise UserError(
                f"{' and '.join(map(str, paths))} are not the encoder and the decoder of a tiny "
                "autoencoder; give both files of one, such as taef2_encoder.pth taef2_decoder.pth"
            )
        found[half] = tensors
    shapes = {
        f"{half}.{name}": shape
        for half, tensors in found.items()
        for name, shape in tensors.shapes.items()
    }

    def read(name):
        half, _, inner = name.partition(".")
        return found[half].read(inner)

    return files.Tensors(shapes, read, {})


def section(found: Mapping[str, tuple[int, ...]], where: str) -> dict:
    """The keyword arguments of `TinyAutoencoder` that shapes tell.

    Raises:
      UserError: no tiny autoencoder is there.
    """
    first, last = found.get("encoder.0.weight"), found.get("decoder.1.weight")
    blocks = sum(bool(re.fullmatch(r"encoder\.\d+\.conv\.0\.weight", name)) for name in found)
    if first is None or last is None or len(first) != 4 or len(last) != 4 or blocks % 3 != 1:
        raise UserError(
            f"{where} hold no tiny autoencoder (0.weight, 1.conv.0.weight, …); give both of its "
            "files, such as taef2_encoder.pth taef2_decoder.pth"
        )
    pooled = any(".pool." in name for name in found)
    return {
        "channels": first[0],
        "blocks": blocks // 3,
        "latent": last[1],
        "groups": GROUPS if pooled else 0,
    }


def table(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Slot]:
    """{name: Slot} for a tiny autoencoder of these parameters, {path: shape}."""
    rows = {}
    for path in shapes:
        half, layer, *inner, kind = path.split("/")
        part = [f"{inner[0][:-1]}.{inner[0][-1]}"] if inner else []  # conv0
        last = "bias" if kind == "bias" else "weight"
        name = ".".join([half, layer.removeprefix("layer"), *part, last])
        rows[name] = slot(shapes, path, form="conv" if kind == "kernel" else "same")
    return rows
