"""A file's tensors under the names that the tables know, and as our parameters."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np

from dlc_jax.errors import UserError
from dlc_jax.interop import files, slots
from dlc_jax.interop.slots import Slot

DTYPES = ("float32", "float16", "bfloat16")  # those that float32 holds without loss


class Weights:
    """The tensors of a file, read one at a time.

    Attributes:
      where: the file.
      names: {clean name: name in the file}.
      shapes: {clean name: shape}.
      dtypes: {name in the file: dtype} of what was read so far.
      metadata: text that came with them.
    """

    def __init__(self, path: str | Path, clean: Callable[[str], str], load: Callable = files.load):
        """Opens a file whose names `clean` makes those of the tables.

        Args:
          load: (path) -> `files.Tensors`.

        Raises:
          UserError: see `files.load`; two names are the same when clean.
        """
        self._file, self.where = load(path), str(path)
        self.names: dict[str, str] = {}
        for name in self._file.shapes:
            if (other := self.names.setdefault(clean(name), name)) != name:
                raise UserError(
                    f"{path} holds two models: {other} and {name} are the same tensor's names"
                )
        self.shapes = {name: self._file.shapes[given] for name, given in self.names.items()}
        self.dtypes: dict[str, str] = {}
        self.metadata = self._file.metadata

    def read(self, name: str) -> np.ndarray:
        """The tensor of a clean name."""
        tensor = self._file.read(self.names[name])
        self.dtypes[self.names[name]] = tensor.dtype.name
        return tensor

    def number(self, name: str) -> int | None:
        """A whole number above 0 in the metadata, if it is there."""
        text = self.metadata.get(name, "")
        return int(text) if text.isdecimal() and int(text) else None

    def params(
        self,
        table: Mapping[str, Slot],
        shapes: Mapping[str, tuple[int, ...]],
        *,
        unused: Collection[str] = (),
    ) -> dict[str, np.ndarray]:
        """Our parameters {path: float32 array} of these shapes.

        Args:
          unused: clean names that may be there beside the table's.

        Raises:
          UserError: tensors are missing, have no place, are of another shape, of a type that
            float32 does not hold, or not finite; the table has no name for some parameter.
        """
        given = {name: shape for name, shape in self.shapes.items() if name not in unused}
        slots.check(given, table, self.where)
        if unnamed := sorted(shapes.keys() - {slot.path for slot in table.values()}):
            raise UserError(
                f"{self.where} has no names for {', '.join(unnamed[: slots.LISTED])}; "
                "no file of this kind has these"
            )
        params = {path: np.empty(shape, np.float32) for path, shape in shapes.items()}
        for name, slot in table.items():
            tensor = self.read(name)
            if tensor.dtype.name not in DTYPES:
                raise UserError(
                    f"{self.where}: {self.names[name]} is {tensor.dtype.name}; "
                    f"convert it to one of {', '.join(DTYPES)}"
                )
            if not np.isfinite(tensor).all():
                raise UserError(
                    f"{self.where}: {self.names[name]} is not finite everywhere; "
                    "the file is damaged, or its training diverged"
                )
            slot.put(tensor, params[slot.path])
        return params


def tensors(
    params: Mapping[str, np.ndarray], table: Mapping[str, Slot], where: str
) -> dict[str, np.ndarray]:
    """The file's tensors of our parameters {path: array}, as views where that can be.

    Raises:
      UserError: the table has no name for some parameter.
    """
    if unnamed := sorted(params.keys() - {slot.path for slot in table.values()}):
        names = ", ".join(unnamed[: slots.LISTED])
        raise UserError(f"{where} has what this format has no name for: {names}")
    return {name: slot.get(params[slot.path]) for name, slot in table.items()}
