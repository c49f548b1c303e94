"""Tensors of a file and their places in our parameters.

A table {name in the file: Slot} is read in both directions. Parameters are flat here, {path:
array}, as in "vit/blocks/attention/qkv/kernel". A torch linear weight is (out, in) and ours (in,
*out), a torch convolution (out, in, rows, columns) and ours (rows, columns, in, out), perhaps
flattened; blocks are stacked along our axis 0.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dlc_jax.errors import UserError

if TYPE_CHECKING:
    from dlc_jax.typing import Tree

LISTED = 10  # tensors that an error names


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a tensor belongs.

    Attributes:
      path: of our array.
      index: the part of it; () is all.
      form: "same" entries in the same order, a "linear" weight, or a "conv" kernel.
      shape: in the file.
    """

    path: str
    index: tuple
    form: str
    shape: tuple[int, ...]

    def put(self, tensor: np.ndarray, array: np.ndarray) -> None:
        """Writes the file's tensor into our array."""
        part = array[self.index]
        if self.form == "linear":
            tensor = tensor.T
        elif self.form == "conv":
            tensor = tensor.transpose(2, 3, 1, 0)
        part[...] = tensor.reshape(part.shape)

    def get(self, array: np.ndarray) -> np.ndarray:
        """The file's tensor out of our array."""
        part = array[self.index]
        if self.form == "linear":
            return part.reshape(self.shape[::-1]).T
        if self.form == "conv":
            out, into, rows, columns = self.shape
            return part.reshape(rows, columns, into, out).transpose(3, 2, 0, 1)
        return part.reshape(self.shape)


def shapes_of(tree: "Tree") -> dict[str, tuple[int, ...]]:
    """{path: shape} of nested parameters."""
    return {path: leaf.shape for path, leaf in flat(tree).items()}


def flat(tree: "Tree") -> dict[str, Any]:
    """{path: array} of nested parameters."""
    import jax  # names and shapes of a file are looked at without it

    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def nested(params: Mapping[str, Any]) -> dict:
    """The inverse of `flat`."""
    tree: dict = {}
    for path, array in params.items():
        *above, last = path.split("/")
        inner = tree
        for name in above:
            inner = inner.setdefault(name, {})
        inner[last] = array
    return tree


def slot(
    shapes: Mapping[str, tuple[int, ...]],
    path: str,
    *index,
    form: str = "same",
    shape: tuple[int, ...] = (),
) -> Slot:
    """A Slot in the array of `path`; its shape in the file, if not given, follows from the form."""
    part = np.broadcast_to(np.float32(0), shapes[path])[
        index
    ].shape  # a view of one number: no memory
    if not shape and form == "linear":
        shape = (math.prod(part[1:]), part[0])
    elif not shape and form == "conv":
        shape = (part[3], part[2], part[0], part[1])
    return Slot(path, index, form, shape or part)


def check(found: Mapping[str, tuple[int, ...]], table: Mapping[str, Slot], where: str) -> None:
    """Refuses tensors that are not those of the table.

    Args:
      found: {name: shape} in the file.

    Raises:
      UserError: some are missing, have no place, or are of another shape; it names ten at most.
    """
    wrong = [f"{name} is missing" for name in table if name not in found]
    wrong += [f"{name} has no place in this model" for name in found if name not in table]
    wrong += [
        f"{name} is {tuple(found[name])} and not {slot.shape}"
        for name, slot in table.items()
        if name in found and tuple(found[name]) != slot.shape
    ]
    if wrong:
        more = f"; and {len(wrong) - LISTED} more" if len(wrong) > LISTED else ""
        raise UserError(
            f"{where} does not hold this model ({'; '.join(wrong[:LISTED])}{more}); "
            "give all of its tensors and no others"
        )
