"""dlc import torch DIR --out W: a folder of dlc export torch, as a run again."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from dlc_jax import recipe
from dlc_jax import workdir as home
from dlc_jax.cli import encoders, official, torch_parts, weights
from dlc_jax.cli.torch_parts import Source
from dlc_jax.errors import UserError
from dlc_jax.interop import files, hub_folder, hub_names, slots
from dlc_jax.interop.weights import DTYPES

IMPORT = "dlc import torch exported --out runs/imported"
AUTOENCODER = "autoencoder"


def take(arguments, rest) -> None:
    """dlc import torch."""
    out, folder = weights.absent(arguments.out), home.locate(arguments.folder)
    found = hub_folder.configs(folder)
    config, parts = fitted(found, folder, out), [part for part in found if part]
    said = [f"wrote {out}"]
    with weights.whole(out) as partial, weights.run(partial, config):
        # the autoencoder first: what the generator's latents mean depends on it
        for part in sorted(parts, key=lambda part: part != AUTOENCODER):
            params = read(folder, found, part, config, partial)
            said.append(f"{part}: {weights.count(params)}")
            _put(part, params, config, partial)
    if "encoder" in parts:
        said.append(encoders.UNTRAINED)
    print("\n".join([*said, *official.uses(config, parts, out)]))


def fitted(found: Mapping[str, Mapping], folder: Path, out: Path) -> ConfigDict:
    """The full config of a run of these parts.

    Args:
      found: that `hub_folder.configs` gave.

    Raises:
      UserError: a config.json has a field or a value that no recipe has.
    """
    lines = hub_folder.lines(found, folder)
    if AUTOENCODER in found:
        lines["autoencoder.path"] = str((out / AUTOENCODER).absolute())
    try:
        return recipe.expand(lines)
    except UserError as error:
        raise UserError(f"{folder}: its config.json files are no recipe: {error}") from error


def read(
    folder: Path, found: Mapping[str, Mapping], part: str, config: ConfigDict, workdir: Path
) -> dict[str, np.ndarray]:
    """Parameters {path: float32 array} of a part of a folder.

    Args:
      found: that `hub_folder.configs` gave.
      config: that `fitted` gave.
      workdir: of the run; a generator of normalized latents is read after its autoencoder.

    Raises:
      UserError: tensors are damaged, missing, too many or of other types; its config.json says
        other things than dlc export torch writes of this config.
    """
    given, place = found[part], folder / part
    if part == "generator" and (units := given["normalizer"]) is not None:
        _put_normalizer(units, config, workdir)
    if AUTOENCODER in config:
        config = recipe.changed(config, {"autoencoder.path": str(workdir / AUTOENCODER)})
    file, source = files.inside(place), Source(config, workdir, _abstract, _dtype(place), False)
    made = torch_parts.make(source, part, part)
    _check(given, json.loads(json.dumps(made.config)), place / "config.json")
    shapes = {path: leaf.shape for path, leaf in made.params.items()}
    params = hub_names.read(file, made.table, shapes, made.constants)
    return {path: array.astype(np.float32, copy=False) for path, array in params.items()}


def _dtype(place: Path) -> str:
    """That of a file's first tensor; `hub_names.read` compares the others with it.

    Raises:
      UserError: float32 does not hold it without loss.
    """
    tensors = files.load(place)
    name = next(iter(tensors.shapes), None)
    found = "no type" if name is None else str(tensors.read(name).dtype)
    if found not in DTYPES:
        raise UserError(f"{place}: tensors are of {found}, and here {', '.join(DTYPES)} alone")
    return found


def _check(given: Mapping, made: Mapping, where: Path) -> None:
    """Refuses a config.json that is not what export writes."""
    given, made = recipe.flat(given), recipe.flat(made)
    for name in sorted(given.keys() | made.keys()):
        if given.get(name) != made.get(name):
            raise UserError(
                f"{where}: {name} is {given.get(name)!r}, and a run of it has {made.get(name)!r}; "
                "export the run again"
            )


def _abstract(network) -> dict:
    """{path: shape} of the parameters of a step or an autoencoder."""
    from dlc_jax.networks.network import Network

    shapes = network.shapes if isinstance(network, Network) else network.abstract()
    return slots.flat(shapes)


def _put(part: str, params: dict[str, np.ndarray], config: ConfigDict, out: Path) -> None:
    """Writes a part into a run; empties `params`."""
    facts = {"file": "a folder of dlc export torch", "model": config[part].model.to_dict()}
    if part == AUTOENCODER:
        weights.save(out / part, params, step=0, model=facts["model"])
        home.mark_done(out / part, {})
        return
    if part == "encoder":
        params |= encoders.fresh(config[part].model, config.seed)
    weights.step(out / part, params, config[part], facts=facts, aside={})


def _put_normalizer(units: Mapping, config: ConfigDict, workdir: Path) -> None:
    """Writes what a code store says of its latents: a store without records."""
    from dlc_jax import checkpoint
    from dlc_jax.data.manifest import FORMAT, code_dtype

    model, latent = config.generator.model, {}
    scaling = np.float32(config.autoencoder.model.scaling)
    for name in ("mean", "std"):
        latent[name] = [_divided(np.float32(value), scaling) for value in units[name]]
    identity = checkpoint.identity_of(workdir / AUTOENCODER / "checkpoints")
    manifest = {"format": FORMAT, "shards": [], "shard_size": 1}
    manifest |= {"dtype": code_dtype(model["values"] or 1), "positions": model["positions"]}
    manifest |= {"fields": {"latent_mean": ["float16", [model.image] * 2 + [model.channels]]}}
    manifest |= {"view": {"latents": {"autoencoder": identity}}}
    manifest |= {"statistics": {"latent": latent | {"count": 0}}}
    home.write(weights.made(workdir / "codes" / "train") / "manifest.json", manifest)


def _divided(value: np.float32, scaling: np.float32) -> float:
    """The float32 number that times `scaling` is `value`, or the nearest to it."""
    near = [value / scaling]
    for end in (-np.inf, np.inf):
        near += [np.nextafter(near[0], np.float32(end))]
    return float(min(near, key=lambda each: abs(each * scaling - value)))
