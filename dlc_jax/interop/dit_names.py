"""Names of DiT's tensors in the files of DLC, of the public DiT and of diffusers.

Beside tensors that are our parameters these files have some that follow from others. Official ones
have the fixed positions, as a frozen `pos_embed`. diffusers' have a copy of the embedders of time
and class in every block.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np

from dlc_jax.errors import UserError
from dlc_jax.interop.slots import Slot, slot
from dlc_jax.interop.weights import Weights, tensors

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of DiT's sizes, by width
PREFIXES = ("_orig_mod.", "module.")  # what compilers and parallel wrappers put before the names
POSITIONS = "pos_embed"
FORMATS = ("official", "diffusers")

_EMBEDDERS = "transformer_blocks.{}.norm1.emb."
_PATCHES = {"official": "x_embedder.proj.weight", "diffusers": "pos_embed.proj.weight"}
_FIRST = {
    "official": "blocks.0.mlp.fc1.weight",
    "diffusers": "transformer_blocks.0.ff.net.0.proj.weight",
}
_FINAL = {"official": "final_layer.linear.weight", "diffusers": "proj_out_2.weight"}
_LABELS = {
    "official": "y_embedder.embedding_table.weight",
    "diffusers": f"{_EMBEDDERS.format(0)}class_embedder.embedding_table.weight",
}

Shapes = Mapping[str, tuple[int, ...]]


class Layout(NamedTuple):
    """What a file holds of a DiT.

    Attributes:
      table: {name: Slot} of tensors that are parameters.
      copies: {name: name in the table} of tensors that equal another.
      constants: {name: array} of tensors that are no parameters.
    """

    table: dict[str, Slot]
    copies: dict[str, str]
    constants: dict[str, np.ndarray]


def clean(name: str) -> str:
    """A name without prefixes."""
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    return name


def kind(found: Shapes, where: str) -> str:
    """Which of FORMATS the names are of.

    Raises:
      UserError: neither.
    """
    for name in FORMATS:
        if all(part[name] in found for part in (_PATCHES, _FIRST, _FINAL)):
            return name
    raise UserError(
        f"{where} holds no DiT (x_embedder.proj.weight, blocks.…, final_layer.…; or "
        "transformer_blocks.…, proj_out_2.weight of diffusers)"
    )


def section(
    found: Shapes, where: str, *, heads: int | None = None, image: int | None = None
) -> dict:
    """The keyword arguments of `DiT`, from {clean name: shape}.

    Args:
      heads: their number, if it is known. No shape tells it; DiT's own sizes are known by width.
      image: side of the latents, if it is known. Shapes tell it where `pos_embed` is in the file.

    Raises:
      UserError: there is no DiT, something is left open, or shapes that our model cannot have.
    """
    name = kind(found, where)
    width, channels, patch, _ = _shape(found, _PATCHES[name], 4, where)
    start = {"official": r"blocks\.(\d+)\.", "diffusers": r"transformer_blocks\.(\d+)\."}[name]
    depth = 1 + max(int(match[1]) for key in found if (match := re.match(start, key)))
    heads = heads or HEADS.get(width)
    if not heads or width % heads:
        raise UserError(f"{where} is {width} wide, and no shape tells its heads; give --heads")
    if POSITIONS in found:
        side = math.isqrt(_shape(found, POSITIONS, 3, where)[1])
        if image not in (None, side * patch):
            raise UserError(f"{where} has positions of {side * patch} pixels, not --image={image}")
        image = side * patch
    if not image:
        raise UserError(f"{where}: no shape tells the side of its latents; give --image")
    features, hidden = (
        _shape(found, _FINAL[name], 2, where)[0],
        _shape(found, _FIRST[name], 2, where),
    )
    codes = found.get("sem_embedder.embedding_table", (0, 1, 0))
    labels, continuous = found.get(_LABELS[name]), found.get("y_embedder.fake_latent")
    return {
        "image": image,
        "channels": channels,
        "patch": patch,
        "width": width,
        "depth": depth,
        "heads": heads,
        "positions": codes[0],
        "values": codes[1] - 1,
        "out_channels": features // patch**2,
        "mlp_ratio": hidden[0] / width,
        "classes": labels[0] - 1 if labels and not continuous else 0,
        "embedding": continuous[-1] if continuous else 0,
    }


def layout(
    shapes: Shapes, name: str, *, patch: int, channels: int, positions: np.ndarray
) -> Layout:
    """What a file of the format `name` holds of parameters {path: shape}.

    Args:
      positions: of the patches, [n, d].

    Raises:
      UserError: blocks that these formats have no names for.
    """
    if "blocks/attention/qkv/bias" not in shapes:
        raise UserError(f"the modern block has no names in {name} files; block='dit' has")
    rows: dict[str, Slot] = {}

    def linear(there, path, *index):
        rows[f"{there}.weight"] = slot(shapes, f"{path}/kernel", *index, form="linear")
        bias = shapes[f"{path}/bias"][1 if index else 0 :]
        rows[f"{there}.bias"] = slot(shapes, f"{path}/bias", *index, shape=(math.prod(bias),))

    def part(there, number, of):
        """Queries, keys or values of a packed projection."""
        path, index = "blocks/attention/qkv", (number, slice(None), of)
        rows[f"{there}.weight"] = slot(shapes, f"{path}/kernel", *index, form="linear")
        size = math.prod(shapes[f"{path}/bias"][2:])
        rows[f"{there}.bias"] = slot(shapes, f"{path}/bias", number, of, shape=(size,))

    there = _PATCHES[name].removesuffix(".weight")
    shape = (positions.shape[-1], channels, patch, patch)
    rows[f"{there}.weight"] = slot(shapes, "patch_embed/kernel", form="conv", shape=shape)
    rows[f"{there}.bias"] = slot(shapes, "patch_embed/bias")
    depth = shapes["blocks/modulation/bias"][0]
    if name == "official":
        _embedders(rows, linear, shapes, "t_embedder.mlp.0", "t_embedder.mlp.2", _LABELS[name])
        for number in range(depth):
            block = f"blocks.{number}"
            linear(f"{block}.attn.qkv", "blocks/attention/qkv", number)
            linear(f"{block}.attn.proj", "blocks/attention/out", number)
            linear(f"{block}.mlp.fc1", "blocks/mlp/fc1", number)
            linear(f"{block}.mlp.fc2", "blocks/mlp/fc2", number)
            linear(f"{block}.adaLN_modulation.1", "blocks/modulation", number)
        linear("final_layer.adaLN_modulation.1", "final_modulation")
        linear("final_layer.linear", "final")
        return Layout(rows, {}, {POSITIONS: positions[None]})
    first = _EMBEDDERS.format(0)
    times = (f"{first}timestep_embedder.linear_{number}" for number in (1, 2))
    _embedders(rows, linear, shapes, *times, _LABELS[name])
    copied, copies = [key for key in rows if key.startswith(first)], {}
    for number in range(depth):
        block = f"transformer_blocks.{number}"
        for of, letter in enumerate("qkv"):
            part(f"{block}.attn1.to_{letter}", number, of)
        linear(f"{block}.attn1.to_out.0", "blocks/attention/out", number)
        linear(f"{block}.ff.net.0.proj", "blocks/mlp/fc1", number)
        linear(f"{block}.ff.net.2", "blocks/mlp/fc2", number)
        linear(f"{block}.norm1.linear", "blocks/modulation", number)
        if number:
            copies |= {key.replace(first, _EMBEDDERS.format(number)): key for key in copied}
    linear("proj_out_1", "final_modulation")
    linear("proj_out_2", "final")
    return Layout(rows, copies, {})


def _embedders(rows, linear, shapes, first, second, labels):
    """Time, classes, codes and continuous embeddings, those of them that there are."""
    linear(first, "time_embed/fc1")
    linear(second, "time_embed/fc2")
    if "label_table/table" in shapes:
        rows[labels] = slot(shapes, "label_table/table")
    if labels != _LABELS["official"]:
        return
    if "code_table/table" in shapes:
        rows["sem_embedder.embedding_table"] = slot(shapes, "code_table/table")
    if "embedding_input/null" in shapes and "label_table/table" not in shapes:
        shape = (1, *shapes["embedding_input/null"])
        rows["y_embedder.fake_latent"] = slot(shapes, "embedding_input/null", shape=shape)
        rows[labels] = slot(shapes, "embedding_input/dense/kernel", form="linear")


def read(found: Weights, layout: Layout, shapes: Shapes) -> dict[str, np.ndarray]:
    """Our parameters {path: float32 array}, of a file whose copies and constants are right.

    Raises:
      UserError: see `Weights.params`; a copy differs, or positions are not the fixed ones.
    """
    copied = {name: layout.table[of] for name, of in layout.copies.items()}
    there = layout.constants.keys() & found.shapes.keys()
    params = found.params(layout.table | copied, shapes, unused=there)
    for name, of in layout.copies.items():
        if not np.array_equal(found.read(name), found.read(of)):
            raise UserError(
                f"{found.where}: {name} differs from {of}, and here all blocks share one; "
                "such a model cannot be loaded"
            )
    for name in sorted(there):
        tensor, constant = found.read(name), layout.constants[name]
        near = max(1e-5, float(ml_dtypes.finfo(tensor.dtype).eps))
        if tensor.shape != constant.shape or not (abs(tensor - constant) <= near).all():
            raise UserError(
                f"{found.where}: {name} is not the table of sines and cosines that DiT starts "
                "from; a model with trained positions cannot be loaded"
            )
    return params


def written(params: Mapping[str, np.ndarray], layout: Layout, where: str) -> dict[str, np.ndarray]:
    """The tensors of a file of this layout, copies and constants among them.

    Raises:
      UserError: some parameter has no name in this layout.
    """
    found = tensors(params, layout.table, where)
    return {
        **layout.constants,
        **found,
        **{name: found[of] for name, of in layout.copies.items()},
    }


def _shape(found, name, dimensions, where):
    shape = found.get(name, ())
    if len(shape) != dimensions:
        raise UserError(
            f"{where}: {name} is of shape {tuple(shape)}, not of {dimensions} dimensions"
        )
    return shape
