"""Where the weights of a step are: in its checkpoints, or in the file of an exported folder."""

from pathlib import Path

import jax
import numpy as np

from dlc_jax import checkpoint, checksum
from dlc_jax.interop import hub_names, slots
from dlc_jax.typing import Tree

FILE = "model.safetensors"


def are_in(directory: Path) -> bool:
    """Whether a step has weights there."""
    return (directory / "checkpoints").is_dir() or (directory / FILE).is_file()


def identity_of(directory: Path) -> str:
    """A short hash of what `load` would load.

    Raises:
      UserError: no good checkpoint.
    """
    if (directory / FILE).is_file():
        return checksum.of_file(directory / FILE)[:16]
    return checkpoint.identity_of(directory / "checkpoints")


def load(directory: Path, stage: str, abstract: Tree, *, step: int | None = None) -> Tree:
    """The saved average of a step; what only training reads is zero in an exported folder.

    Args:
      stage: kind of the step.
      abstract: jax.ShapeDtypeStruct with shardings; another dtype casts.
      step: of its checkpoints; None is the newest.

    Raises:
      UserError: no good checkpoint, a damaged file, other names or shapes.
    """
    path = directory / FILE
    if not path.is_file():
        how = {} if step is None else {"step": step}
        return checkpoint.load_params(directory / "checkpoints", abstract, **how)
    found = hub_names.read(path, *parts_of(stage, slots.shapes_of(abstract)))

    def place(name, leaf):
        array = found[name] if name in found else np.zeros(leaf.shape)
        return jax.device_put(array.astype(leaf.dtype), leaf.sharding)

    return slots.nested({name: place(name, leaf) for name, leaf in slots.flat(abstract).items()})


def parts_of(stage: str, shapes: hub_names.Shapes) -> tuple:
    """(table, shapes, constants) of an exported step's file, as `hub_names.read` takes them.

    Args:
      stage: kind of the step.
      shapes: {path: shape} of all its parameters.
    """
    unread = hub_names.TRAINING.get(stage, ())
    saved = {name: shape for name, shape in shapes.items() if not name.startswith(unread)}
    if stage == "encoder":
        return hub_names.encoder(saved), saved, hub_names.scales(saved)
    return hub_names.network(saved), saved, {}
