"""An exported folder read back: what each part's config.json says, as fields of a recipe.

The inverse of `hub_config`; tensors are read by `hub_names.read`.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlc_jax.errors import UserError
from dlc_jax.interop import files, hub_config

PARTS = ("encoder", "prior", "generator", "autoencoder")
# an encoder's DINO head, which is not in the folder: the smallest stands in
DINO = {"prototypes": 8, "hidden": 8, "bottleneck": 8}
KL = {"residuals": "layers_per_block", "latent": "latent_channels", "groups": "norm_num_groups"}
KL |= {"scaling": "scaling_factor"}
Lines = dict[str, Any]


def configs(folder: Path) -> dict[str, dict]:
    """{part: its config.json} of a folder; "" is that of the folder itself.

    Raises:
      UserError: it is no such folder, or a config.json is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give one that dlc export torch wrote")
    there = [part for part in PARTS if (folder / part).is_dir()]
    if not there:
        raise UserError(
            f"{folder} has none of {', '.join(PARTS)}; give a folder that dlc export torch wrote"
        )
    found = {part: _json(folder / part / "config.json") for part in ("", *there)}
    if found[""].get("architectures") != ["DLCPipeline"] or "data" not in found[""]:
        raise UserError(
            f"{folder / 'config.json'} is not one that dlc export torch of this version wrote; "
            "export the run again"
        )
    return found


def _json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
        if isinstance(found, dict):
            return found
        reason = "it is no JSON object"
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
    raise UserError(f"{path} cannot be read ({reason}); export the run again")


def measured(place: Path, known: Mapping) -> tuple[int, str]:
    """(parameters, dtype of the first) of a part, by the head of its file.

    Args:
      known: its config.json. A backbone without LayerScale has one of ones, which is no parameter.

    Raises:
      UserError: see `files.load`.
    """
    tensors, ours = files.load(place), known.get("dlc")
    plain = isinstance(ours, dict) and ours.get("layer_scale", 0) is None
    shapes = {
        name: shape
        for name, shape in tensors.shapes.items()
        if not (plain and ".layer_scale" in name)
    }
    dtype = next((str(tensors.read(name).dtype) for name in shapes), "no type")
    return sum(map(math.prod, shapes.values())), dtype


def lines(found: Mapping[str, Mapping], folder: Path) -> Lines:
    """{field: value} of the recipe of a run that has these parts.

    Args:
      found: that `configs` gave.

    Raises:
      UserError: a config.json lacks something.
    """
    data = found[""]["data"]
    steps = [part for part in PARTS[:3] if part in found]
    known: Lines = {"steps": tuple(steps)} | {f"{step}.train.dtype": "float32" for step in steps}
    makers = {"encoder": _encoder, "prior": _prior, "generator": _generator}
    makers |= {"autoencoder": _autoencoder}
    for part, config in {"": data, **found}.items():
        try:
            known |= makers[part](config) if part in makers else _data(data)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{folder / part / 'config.json'} lacks or misspells {error}; export the run again"
            ) from error
    return known


def _data(data: Mapping) -> Lines:
    named = "shapes" if data["name"] == "shapes" else "images"
    return {"data.name": named, "data.image": data["image"]}


def _encoder(config: Mapping) -> Lines:
    ours = config["dlc"]
    model = {f"backbone.{name}": ours[name] for name in hub_config.BACKBONE.split()}
    model |= {"backbone.mlp": "swiglu" if ours["gated"] else "gelu"}
    model |= {f"simplicial.{name}": ours[name] for name in hub_config.SIMPLICIAL.split()}
    model |= {f"dino.{name}": value for name, value in DINO.items()}
    side = ours["size"]
    crops = {"encoder.crops.all.global_size": side, "encoder.crops.all.local_size": side}
    return _named("encoder.model", model) | crops


def _prior(config: Mapping) -> Lines:
    model = {name: config["model"][name] for name in hub_config.PRIOR.split()}
    noise, how = config["process"]["noise"], config["sampler"]
    found = _named("prior.model", model) | {"prior.process.name": config["process"]["name"]}
    found |= _named("prior.process.noise", noise)
    how = {"method": "first_hitting", "calls": how["steps"] or 0, "temperature": how["temperature"]}
    return found | _named("samples.code_sampler", how)


def _generator(config: Mapping) -> Lines:
    names = [name for name in hub_config.GENERATOR.split() if name != "out_channels"]
    found = _named("generator.model", {name: config["model"][name] for name in names})
    # the name first: it says which fields there are
    found |= _named("generator.process", {"name": "", **config["process"]})
    how = dict(config["sampler"])
    guidance = {"scale": how.pop("guidance"), "interval": tuple(how.pop("interval"))}
    guidance |= {name: how.pop(name) for name in ("channels", "base")}
    found |= _named("samples.sampler", how) | _named("samples.sampler.guidance", guidance)
    if config["latents"]:
        found["codes.autoencoder"] = "autoencoder"
    if not config["model"]["positions"] and not config["latents"]:
        found["generator.codes"] = ""
    normalized = config["normalizer"] is not None
    return found | {"generator.latents": config["latents"], "generator.normalize": normalized}


def _autoencoder(config: Mapping) -> Lines:
    if config["_class_name"] == "DLCTinyDecoder":
        return _named("autoencoder.model", {"name": "tiny", **config["model"]})
    model = {"name": "kl", "channels": tuple(config["block_out_channels"])}
    return _named("autoencoder.model", model | {ours: config[KL[ours]] for ours in KL})


def _named(start: str, fields: Mapping) -> Lines:
    return {f"{start}.{name}": value for name, value in fields.items()}
