"""The parts of a folder that PyTorch loads, as a run's config has them; and back to their tensors.

Each part is made for `dlc export torch`, with the parameters of a run, and for `dlc import torch`,
with their shapes alone.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dlc_jax import recipe
from dlc_jax.errors import UserError
from dlc_jax.interop import hub_config, hub_names, slots, tiny_names, vae_names

TABLES = {"kl": vae_names.table, "tiny": tiny_names.table}
MODEL = "model.safetensors"


class Part(NamedTuple):
    """One network of the folder.

    Attributes:
      config: its config.json.
      params: {path: array}, or anything with a shape.
      table: {name: Slot} of its file.
      constants: {name: array} of tensors of the file that are no parameters.
      file: its name.
    """

    config: dict
    params: Mapping[str, Any]
    table: dict[str, slots.Slot]
    constants: Mapping[str, Any]
    file: str = MODEL


class Source(NamedTuple):
    """Where parts come from.

    Attributes:
      config: of a run.
      workdir: of the run.
      params: (network) -> {path: array, or its shape}.
      dtype: of the weights in the folder.
      plain: takes plain samplers where PyTorch's code lacks that of the recipe.
    """

    config: ConfigDict
    workdir: Path
    params: Callable[[Any], Mapping[str, Any]]
    dtype: str
    plain: bool


def make(source: Source, part: str, step: str) -> Part:
    """A part of a folder: the network of a step, or the autoencoder of a section.

    Raises:
      UserError: PyTorch's code lacks something that it needs; it is named.
    """
    return {"encoder": _encoder, "prior": _prior, "generator": _generator}.get(part, _autoencoder)(
        source, step
    )


def _encoder(source: Source, step: str) -> Part:
    from dlc_jax.networks import EncoderNetwork

    model = source.config[step].model
    if model.backbone.name != "vit" or model.backbone.channels != 3:
        raise UserError(
            f"{step}.model.backbone: {model.backbone.name!r} of {model.backbone.channels} channels "
            "is not in PyTorch's code, which has 'vit' of 3"
        )
    network = _network(EncoderNetwork, source, step)
    params = _read(network, source, step)
    shapes = _shapes(params)
    found = hub_config.encoder(model, network.size, source.dtype)
    return Part(found, params, hub_names.encoder(shapes), hub_names.scales(shapes))


def _prior(source: Source, step: str) -> Part:
    from dlc_jax.networks import PriorNetwork

    section = source.config[step]
    hub_config.check_prior(section, step)
    how = _sampler(source.config, "code_sampler")
    how = hub_config.code_sampler(how, "samples", plain=source.plain)
    params = _read(_network(PriorNetwork, source, step), source, step)
    return Part(hub_config.prior(section, how), params, hub_names.network(_shapes(params)), {})


def _generator(source: Source, step: str) -> Part:
    from dlc_jax.networks import GeneratorNetwork

    section = source.config[step]
    how = _sampler(source.config, "sampler")
    how = hub_config.sampler(how, section.process.name, "samples", plain=source.plain)
    network = _network(GeneratorNetwork, source, step)
    normalizer = None
    if section.latents and section.normalize:
        normalizer = _normalizer(source, section, network.process.deviation)
    params = _read(network, source, step)
    found = hub_config.generator(section, network.model.out_channels, how, normalizer)
    return Part(found, params, hub_names.network(_shapes(params)), {})


def _normalizer(source: Source, section: ConfigDict, deviation: float) -> dict:
    from dlc_jax.data.manifest import facts
    from dlc_jax.networks.autoencoder import AutoencoderNetwork

    store = facts(recipe.place(source.config, source.workdir, section.codes) / "train")
    decoder = AutoencoderNetwork(source.config, source.config[section.codes].autoencoder)
    decoder.check(store)
    found = decoder.normalizer(store, deviation)
    return {"mean": found.mean.tolist(), "std": found.std.tolist(), "deviation": found.deviation}


def _autoencoder(source: Source, name: str) -> Part:
    from dlc_jax import parallel
    from dlc_jax.networks.autoencoder import AutoencoderNetwork

    network = AutoencoderNetwork(source.config, name, parallel.make_mesh())
    model = source.config[name].model.to_dict()
    params = source.params(network)
    file = MODEL if model["name"] == "tiny" else "diffusion_pytorch_model.safetensors"
    found = hub_config.autoencoder(model, source.config.data.image)
    return Part(found, params, TABLES[model["name"]](_shapes(params)), {}, file)


def _sampler(config: ConfigDict, field: str) -> ConfigDict:
    """A sampler's section of the recipe, or the usual one."""
    if "samples" not in config:
        config = recipe.changed(config, {"samples.stage": "samples"})
    return config.samples[field]


def _network(kind, source: Source, step: str):
    return kind(source.config, source.workdir, step, mesh=None, batch=1, dtype=None)


def _read(network, source: Source, step: str) -> dict[str, Any]:
    """Parameters of a step without what only training reads."""
    unread = hub_names.TRAINING.get(source.config[step].stage, ())
    params = source.params(network).items()
    return {path: array for path, array in params if not path.startswith(unread)}


def _shapes(params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {path: array.shape for path, array in params.items()}
