"""Names of an exported folder's tensors: those of the modules in `networks_dlc.py`, both ways.

Prior and generator have our own names, a dot for a slash and a number after `blocks`. The encoder's
backbone has those of transformers, and its simplicial head those of the published files.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dlc_jax.errors import UserError
from dlc_jax.interop import files, slots, torch_names
from dlc_jax.interop.slots import Slot, slot

LAST = {"kernel": "weight", "scale": "weight"}
# what only training reads, by stage
TRAINING = {"encoder": ("head/", "patch_head/"), "generator": ("aligner/",)}
Shapes = Mapping[str, tuple[int, ...]]


def network(shapes: Shapes) -> dict[str, Slot]:
    """{name: Slot} of a prior or a generator of these parameters, {path: shape}."""
    rows = {}
    for path in shapes:
        *above, last = path.split("/")
        if "blocks" not in above:
            _add(rows, shapes, ".".join([*above, LAST.get(last, last)]), path)
            continue
        at = above.index("blocks") + 1
        for number in range(shapes[path][0]):
            name = ".".join([*above[:at], str(number), *above[at:], LAST.get(last, last)])
            _add(rows, shapes, name, path, number)
    return rows


def encoder(shapes: Shapes) -> dict[str, Slot]:
    """{name: Slot} of an encoder's backbone and simplicial head."""
    known = {"vit/pos_embed": (1, *shapes["vit/cls_token"][-1:])} | dict(shapes)
    rows = {
        name: row for name, row in torch_names.transformers(known).items() if row.path in shapes
    }
    for name in ("q_scale", "k_scale"):
        path = f"vit/blocks/attention/{name}"
        for number in range(shapes.get(path, (0,))[0]):
            _add(rows, shapes, f"encoder.layer.{number}.attention.attention.{name}", path, number)
    for path in shapes:
        if path.startswith("simplicial/"):
            *above, last = path.removeprefix("simplicial/").split("/")
            _add(rows, shapes, f"sem_{'.'.join([*above, LAST.get(last, last)])}", path)
    return rows


def scales(shapes: Shapes) -> dict[str, np.ndarray]:
    """LayerScale of ones for a backbone without, which transformers' models always have."""
    if "vit/blocks/gamma1" in shapes:
        return {}
    depth, width = shapes["vit/blocks/norm1/scale"]
    names = [f"layer_scale{number}.lambda1" for number in (1, 2)]
    ones = np.ones(width, np.float32)
    return {f"encoder.layer.{layer}.{name}": ones for layer in range(depth) for name in names}


def opened(
    path: Path, table: Mapping[str, Slot], constants: Mapping[str, np.ndarray]
) -> files.Tensors:
    """A file's tensors, none of them read yet but constants.

    Args:
      constants: {name: array} of tensors that are no parameters.

    Raises:
      UserError: the file is damaged or lacks a tensor, has others, or constants that differ.
    """
    found = files.load(path)
    given = {name: shape for name, shape in found.shapes.items() if name not in constants}
    slots.check(given, table, str(path))
    for name, constant in constants.items():
        if name not in found.shapes or not np.array_equal(found.read(name), constant):
            raise UserError(f"{path}: {name} is not what it is made of; export it again")
    return found


def read(
    path: Path, table: Mapping[str, Slot], shapes: Shapes, constants: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Our parameters {path: array} of a file, in its dtype.

    Args:
      constants: as `opened` takes them.

    Raises:
      UserError: see `opened`; some tensor is of another dtype.
    """
    found = opened(path, table, constants)
    params: dict[str, np.ndarray] = {}
    dtype = found.read(next(iter(table))).dtype
    for name, row in table.items():
        tensor = found.read(name)
        if tensor.dtype != dtype:
            raise UserError(f"{path}: {name} is {tensor.dtype}, and others are {dtype}")
        if row.path not in params:
            params[row.path] = np.empty(shapes[row.path], tensor.dtype)
        row.put(tensor, params[row.path])
    return params


def check(found: Mapping[str, np.ndarray], params: Mapping[str, np.ndarray], where: Path) -> None:
    """Refuses what was read back if it is not what was written: names, dtypes and bytes.

    Raises:
      UserError: the first difference is named.
    """
    for path in sorted(found.keys() | params.keys()):
        ours, back = params.get(path), found.get(path)
        same = ours is not None and back is not None and ours.dtype == back.dtype
        if not same or ours.tobytes() != back.tobytes():
            raise UserError(f"{where}: {path} was not written as it is; export it again")


def _add(rows, shapes, name, path, *index):
    form = "linear" if path.endswith("/kernel") else "same"
    of_dense = path.endswith("/bias") and f"{path.removesuffix('bias')}kernel" in shapes
    flat = (math.prod(shapes[path][len(index) :]),) if of_dense else ()
    rows[name] = slot(shapes, path, *index, form=form, shape=flat)
