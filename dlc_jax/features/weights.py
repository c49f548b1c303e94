"""Weights of published networks, from files to the parameters of our modules."""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax.errors import UserError
from dlc_jax.interop import files, slots
from dlc_jax.interop.weights import Weights
from dlc_jax.typing import Tree


class Published(NamedTuple):
    """A file of weights.

    Attributes:
      file: its name.
      where: it is published.
      sha256: of it, all or the first digits; "" if it is not known.
    """

    file: str
    where: str
    sha256: str = ""

    def __str__(self):
        digits = f" (SHA-256 {self.sha256[:8]}…)" if self.sha256 else ""
        return f"{self.file}{digits}, published at {self.where}"


def check_there(path: str | Path | None, who: str, expected: Published) -> Path:
    """The path, if there is a file.

    Raises:
      UserError: there is none; it says which file is wanted and where it is published.
    """
    if path is None or not Path(path).is_file():
        given = "no file was given" if path is None else f"{path} is not a file"
        raise UserError(f"{who}: {given}; give the path of {expected}")
    return Path(path)


@contextlib.contextmanager
def expecting(expected: Published) -> Iterator[None]:
    """Adds to what is wrong with a file, which one is wanted."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}; expected is {expected}") from error


def open_file(path: str | Path, clean: Callable[[str], str] = str) -> Weights:
    """The tensors of a safetensors, PyTorch or .npz file.

    Raises:
      UserError: see `interop.files.load`; a damaged .npz.
    """
    return Weights(path, clean, load=_npz if Path(path).suffix == ".npz" else files.load)


def read(
    found: Weights,
    shapes: Tree,
    name: Callable[[str], str],
    *,
    unused: str = "",
) -> Tree:
    """Parameters of these shapes: a kernel is a convolution's or a matrix, the rest is as it is.

    Args:
      shapes: tree of what has a shape, see `abstract`.
      name: path of one of our parameters, as in "conv1/kernel", to its name in the file.
      unused: regular expression of names that may be there besides.

    Raises:
      UserError: the tensors are not those of this network, see `Weights.params`.
    """
    flat = slots.shapes_of(shapes)
    form = {4: "conv", 2: "linear"}
    table = {
        name(path): slots.slot(flat, path, form=form.get(len(shape), "same"))
        for path, shape in flat.items()
    }
    aside = [given for given in found.shapes if re.fullmatch(unused, given)]
    return slots.nested(found.params(table, flat, unused=aside))


def abstract(module: nn.Module, *shape: int) -> Tree:
    """Shapes of a module's parameters, from the shape of its input."""
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(lambda images: module.init(jax.random.key(0), images)["params"], images)


def _npz(path: str | Path) -> files.Tensors:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive)
    except Exception as error:  # whatever a damaged archive brings about
        raise UserError(f"{path} is damaged, or not an .npz of arrays; fetch it again") from error
    return files.Tensors(
        {name: array.shape for name, array in arrays.items()}, arrays.__getitem__, {}
    )
