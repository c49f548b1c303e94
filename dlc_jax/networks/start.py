"""Where training starts from: a trained step, or its part of a folder of dlc export torch."""

from collections.abc import Sequence

import jax

from dlc_jax import checkpoint, recipe
from dlc_jax import workdir as home
from dlc_jax.errors import UserError
from dlc_jax.interop import hub_names, slots
from dlc_jax.networks import KINDS, weights
from dlc_jax.networks.network import Network
from dlc_jax.typing import Tree

PARTS = {"distill": "prior"}  # of a folder, by the kind of a step; others are called as their kind


def check_start(place: str, params: Tree, *, kind: str, new: Sequence[str] = ()) -> None:
    """Refuses what `warm_start` would, by names, shapes and sizes alone.

    Raises:
      UserError: as `warm_start`.
    """
    if (network := _exported(place, kind)) is None:
        checkpoint.check_start(place, params, new=new)
    else:
        _fit(place, network, params, new)


def warm_start(place: str, params: Tree, *, kind: str, new: Sequence[str] = ()) -> Tree:
    """`checkpoint.warm_start` that also takes an exported folder, a part of one, or "demo".

    Args:
      kind: `stage` of the step that starts, which says the part.
      new: as `checkpoint.warm_start`; what only training reads is in no exported folder.

    Raises:
      UserError: as `checkpoint.warm_start`; the folder has no such part, or a damaged one.
    """
    if (network := _exported(place, kind)) is None:
        return checkpoint.warm_start(place, params, new=new)
    added, parts = _fit(place, network, params, new)

    def read(kept):
        found = hub_names.read(network.directory / weights.FILE, *parts)
        arrays = {name.replace("/", "."): array for name, array in found.items()}
        return {
            name: jax.device_put(arrays[name].astype(leaf.dtype), leaf.sharding)
            for name, leaf in kept.items()
        }

    return checkpoint.filled(params, added, read, path=network.directory)


def _exported(place: str, kind: str) -> Network | None:
    """The network of an exported folder; None of a trained step.

    Raises:
      UserError: the folder lacks it, or its recipe is damaged.
    """
    folder, part = home.locate(place), PARTS.get(kind, kind)
    if not (folder / home.RUN).is_file():
        folder, part = folder.absolute().parent, folder.absolute().name
        if not (folder / part / weights.FILE).is_file() or not (folder / home.RUN).is_file():
            return None
    try:
        config = recipe.of_run(folder)
    except UserError as error:
        raise UserError(f"train.init_from={place}: {error}") from error
    if part not in config or not (folder / part / weights.FILE).is_file():
        raise UserError(
            f"train.init_from={place}: {folder} has no {part}; give a folder that dlc export torch "
            "made of a run with one"
        )
    return KINDS[config[part].stage](config, folder, part, mesh=None, batch=1, dtype=None)


def _fit(place: str, network: Network, params: Tree, new: Sequence[str]) -> tuple:
    """(names that are new, what `hub_names.read` takes) of a network that fits."""
    where, path = f"train.init_from={place}", network.directory
    shapes = slots.shapes_of(network.shapes)
    table, shapes, constants = weights.parts_of(network.section.stage, shapes)
    present = {name.replace("/", "."): [shape, ""] for name, shape in shapes.items()}
    added = checkpoint.fit(present, params, new, where=where, path=path)
    try:
        hub_names.opened(path / weights.FILE, table, constants)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return added, (table, shapes, constants)
