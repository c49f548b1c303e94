"""dlc export torch -w W --out DIR: a run as a folder that PyTorch loads without dlc_jax or jax."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from dlc_jax import recipe
from dlc_jax import workdir as home
from dlc_jax.cli import weights
from dlc_jax.composition import groups
from dlc_jax.errors import UserError
from dlc_jax.interop import (
    files,
    hub_card,
    hub_config,
    hub_names,
    slots,
    tiny_names,
    vae_names,
)

EXPORT = "dlc export torch -w runs/imagenet256 --out exported"
STEPS = ("encoder", "prior", "generator", "autoencoder")
HUB = Path(hub_card.__file__).with_name("hub")  # PyTorch's code, which nothing here imports
TABLES = {"kl": vae_names.table, "tiny": tiny_names.table}
MODEL = "model.safetensors"


class Part(NamedTuple):
    """One network of the folder.

    Attributes:
      config: its config.json.
      params: {path: array}.
      table: {name: Slot} of its file.
      constants: {name: array} of tensors of the file that are no parameters.
      file: its name.
    """

    config: dict
    params: dict[str, np.ndarray]
    table: dict[str, slots.Slot]
    constants: dict[str, np.ndarray]
    file: str = MODEL


def give_flags(action) -> None:
    action.add_argument(
        "--steps", metavar="A,B,…", help=f"of {','.join(STEPS)}; all that the run has"
    )
    action.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the weights; float32, as they were saved",
    )
    action.add_argument(
        "--license", default="", metavar="NAME", help="of the weights, for the model card"
    )
    action.add_argument(
        "--no-code",
        action="store_true",
        help="leave PyTorch's code out, as of the demo, whose package has it",
    )
    action.add_argument(
        "--plain-samplers",
        action="store_true",
        help="where PyTorch's code lacks a sampler of the recipe, take the plain one",
    )


def give(arguments) -> None:
    """dlc export torch."""
    out, config = weights.absent(arguments.out), recipe.of_run(arguments.workdir)
    names = _names(config, arguments.workdir, arguments.steps)
    makers = {"encoder": _encoder, "prior": _prior, "generator": _generator}
    with weights.whole(out) as place:
        sizes = {}
        for part, step in names.items():
            made = makers.get(part, _autoencoder)(config, arguments, step)
            sizes[part] = write(place / part, made, arguments.dtype)
        results = home.read(Path(arguments.workdir) / "results.json") or {}
        commit = str(results.get("commit") or home.commit() or "an unknown commit")
        data = {key: config.data[key] for key in ("name", "image") if key in config.data}
        code = () if arguments.no_code else tuple(hub_card.CODE)
        card = hub_card.text(sizes, data, results, commit, arguments.license, code)
        (place / "model_card.md").write_text(card)
        for name in code:
            shutil.copyfile(HUB / name, place / name)
        home.write(place / home.RUN, home.portable(config.to_dict()))
        if (Path(arguments.workdir) / groups.FILE).is_file():
            shutil.copyfile(Path(arguments.workdir) / groups.FILE, place / groups.FILE)
        _json(place / "config.json", {"architectures": ["DLCPipeline"], "commit": commit})
        index = {"_class_name": ["pipeline", "DLC"], "_diffusers_version": "0.31.0"}
        _json(place / "model_index.json", index)
    for part, size in sizes.items():
        print(f"{out / part}: {size}")
    if "encoder" in names and (own := recipe.codes_dtype(config, names["encoder"])) != "float32":
        print(f"the run's codes were computed in {own or 'the dtype of training'}, here in float32")
    print(
        f"wrote {out}: all tensors were read back, without what only training reads; "
        "how to load it is in model_card.md"
    )


def _names(config: ConfigDict, workdir: str, asked: str | None) -> dict[str, str]:
    """{part: step or section} of what is exported.

    Raises:
      UserError: an unknown part, one that the run lacks, or that is not complete.
    """
    samples = config.samples if "samples" in config else {}
    steps = {part: samples[part] if part in samples else part for part in STEPS[:3]}
    found = {part: step for part, step in steps.items() if step in config}
    if "generator" in found and (section := recipe.autoencoder(config, found["generator"])):
        found["autoencoder"] = section
    parts = list(found) if asked is None else asked.split(",")
    for part in parts:
        if part not in STEPS:
            raise UserError(f"dlc export torch: --steps={part} is none of {', '.join(STEPS)}")
        if part not in found:
            there = ", ".join(found)
            raise UserError(f"{workdir} is a run whose recipe has no {part}; it has {there}")
        if part == "autoencoder":
            continue
        step = found[part]
        directory = recipe.trained(config, workdir, step)
        done, own = home.done(directory), directory == Path(workdir) / step
        if done is None or own and done["steps"] < config[step].train.steps:
            raise UserError(
                f"step {step!r} of {workdir} is not complete; train it to its end, or leave it out "
                "with --steps"
            )
    if not parts:
        raise UserError(f"{workdir} is a run whose recipe has none of {', '.join(STEPS)}")
    return {part: found[part] for part in STEPS if part in parts}


def _encoder(config: ConfigDict, arguments, step: str) -> Part:
    from dlc_jax.networks import EncoderNetwork

    network = _network(EncoderNetwork, config, arguments, step)
    backbone = config[step].model.backbone
    if backbone.name != "vit" or backbone.channels != 3:
        raise UserError(
            f"{step}.model.backbone: {backbone.name!r} of {backbone.channels} channels is not in "
            "PyTorch's code, which has 'vit' of 3"
        )
    params = _params(network, config, arguments, step)
    shapes = slots.shapes_of(slots.nested(params))
    found = hub_config.encoder(config[step].model, network.size, arguments.dtype)
    return Part(found, params, hub_names.encoder(shapes), hub_names.scales(shapes))


def _prior(config: ConfigDict, arguments, step: str) -> Part:
    from dlc_jax.networks import PriorNetwork

    hub_config.check_prior(config[step], step)
    how = _sampler(config, "code_sampler")
    how = hub_config.code_sampler(how, "samples", plain=arguments.plain_samplers)
    network = _network(PriorNetwork, config, arguments, step)
    params = _params(network, config, arguments, step)
    table = hub_names.network(slots.shapes_of(slots.nested(params)))
    return Part(hub_config.prior(config[step], how), params, table, {})


def _generator(config: ConfigDict, arguments, step: str) -> Part:
    from dlc_jax.networks import GeneratorNetwork
    from dlc_jax.networks.autoencoder import AutoencoderNetwork

    section, normalizer = config[step], None
    how = _sampler(config, "sampler")
    settings = {"plain": arguments.plain_samplers}
    how = hub_config.sampler(how, section.process.name, "samples", **settings)
    network = _network(GeneratorNetwork, config, arguments, step)
    if section.latents and section.normalize:
        from dlc_jax.data.manifest import facts

        store = facts(recipe.place(config, arguments.workdir, section.codes) / "train")
        decoder = AutoencoderNetwork(config, config[section.codes].autoencoder)
        decoder.check(store)
        found = decoder.normalizer(store, network.process.deviation)
        normalizer = {"mean": found.mean.tolist(), "std": found.std.tolist()}
        normalizer["deviation"] = found.deviation
    params = _params(network, config, arguments, step)
    table = hub_names.network(slots.shapes_of(slots.nested(params)))
    outputs = network.model.out_channels
    return Part(hub_config.generator(section, outputs, how, normalizer), params, table, {})


def _autoencoder(config: ConfigDict, arguments, name: str) -> Part:
    from dlc_jax import parallel
    from dlc_jax.networks.autoencoder import AutoencoderNetwork

    network = AutoencoderNetwork(config, name, parallel.make_mesh())
    model = config[name].model.to_dict()
    params = {path: np.asarray(array) for path, array in slots.flat(network.params).items()}
    table = TABLES[model["name"]](slots.shapes_of(slots.nested(params)))
    file = MODEL if model["name"] == "tiny" else "diffusion_pytorch_model.safetensors"
    return Part(hub_config.autoencoder(model, config.data.image), params, table, {}, file)


def _sampler(config: ConfigDict, field: str) -> ConfigDict:
    """A sampler's section of the recipe, or the usual one."""
    if "samples" not in config:
        config = recipe.changed(config, {"samples.stage": "samples"})
    return config.samples[field]


def _network(kind, config: ConfigDict, arguments, step: str):
    return kind(config, Path(arguments.workdir), step, mesh=None, batch=1, dtype=None)


def _params(network, config: ConfigDict, arguments, step: str) -> dict[str, np.ndarray]:
    """{path: float32 array} of a step's average, without what only training reads."""
    from dlc_jax import checkpoint

    directory = recipe.trained(config, arguments.workdir, step)
    params = slots.flat(checkpoint.load_params(directory / "checkpoints", network.shapes))
    unread = hub_names.TRAINING.get(config[step].stage, ())
    return {
        path: np.asarray(array) for path, array in params.items() if not path.startswith(unread)
    }


def write(place: Path, part: Part, dtype: str) -> str:
    """Writes a part, reads it back and compares; its size in words."""
    params = {
        path: array.astype(weights.dtype(dtype), copy=False) for path, array in part.params.items()
    }
    constants = {
        name: array.astype(weights.dtype(dtype), copy=False)
        for name, array in part.constants.items()
    }
    place.mkdir()
    _json(place / "config.json", part.config)
    tensors = {name: slot.get(params[slot.path]) for name, slot in part.table.items()}
    path = place / part.file
    files.save(path, tensors | constants, {"format": "pt"})
    found = hub_names.read(path, part.table, slots.shapes_of(slots.nested(params)), constants)
    hub_names.check(found, params, path)
    size = sum(array.nbytes for array in params.values())
    return f"{weights.count(params)} of {dtype}, {size / 1e6:.1f} MB"


def _json(path: Path, found: dict) -> None:
    path.write_text(f"{json.dumps(found, indent=2)}\n")
