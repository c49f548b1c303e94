"""dlc import dit FILE --out DIR, dlc export dit W --out FILE: DiT in the files of others."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from ml_collections import ConfigDict

from dlc_jax import recipe
from dlc_jax.cli import diffusers_settings, weights
from dlc_jax.cli.networks import prepare, whole, writing
from dlc_jax.errors import UserError
from dlc_jax.interop import dit_names, files, slots
from dlc_jax.interop.weights import Weights
from dlc_jax.recipe.lines import flat

if TYPE_CHECKING:
    from dlc_jax.models.dit import DiT

IMPORT = "dlc import dit transformer/diffusion_pytorch_model.safetensors --out weights/dit"
EXPORT = "dlc export dit runs/imagenet256 --out dit.safetensors"
STEP = "generator"  # of a recipe: it is taken from it or put in it
KNOWN = ("num_attention_heads", "sample_size", "input_size")  # of a config.json


def take_flags(parser) -> None:
    """Flags of dlc import dit beside the file."""
    parser.add_argument(
        "--heads", type=whole, metavar="H", help="of attention, at another width than DiT's own"
    )
    parser.add_argument(
        "--image", type=whole, metavar="N", help="side of the latents, if nothing tells it"
    )


def give_flags(parser) -> None:
    """Flags of dlc export dit beside the file."""
    parser.add_argument(
        "--format",
        choices=dit_names.FORMATS,
        help="names of the DLC paper and the public DiT, or of diffusers' DiTTransformer2DModel; "
        "those of the imported file, or official",
    )


def take(arguments, rest) -> None:
    """dlc import dit."""
    out = weights.absent(arguments.out)
    found, lines = read(arguments.file, arguments.heads, arguments.image)
    arrays, aside, facts = params(found, lines)
    said = described(arrays, lines)
    weights.save(out, arrays, step=0, model=facts["model"])
    weights.keep(out, facts, aside)
    print(f"wrote {out}: {said}\n{found.where}: {weights.told(found, aside)}\nto start from it:")
    lines = {"train.init_from": str(out), **lines}
    print(shlex.join(f"--config.{STEP}.{key}={value}" for key, value in lines.items()))


def read(
    path: str | Path, heads: int | None = None, image: int | None = None
) -> tuple[Weights, dict]:
    """(a generator's file or folder, opened; {field: value} of the step of it).

    Args:
      path: of the tensors, of their folder, or of diffusers' folder of a pipeline, whose
        `transformer` it is and whose `scheduler` tells the process.
      heads, image: where nothing tells them; see `dit_names.section`.

    Raises:
      UserError: see `dit_names.section` and `diffusers_settings.process`.
    """
    folder = diffusers_settings.pipeline(path)
    file = files.inside(folder.transformer if folder else path)
    found = Weights(file, dit_names.clean)
    beside = diffusers_settings.transformer(file.with_name("config.json"))
    known = [weights.number(beside, key) for key in KNOWN]
    heads = heads or found.number("heads") or known[0]
    image = image or found.number("image") or known[1] or known[2]
    model = dit_names.section(found.shapes, found.where, heads=heads, image=image)
    lines = {}
    if model.get("out_channels", 0) == 2 * model["channels"]:  # noise and variances
        lines["process.name"] = "ddpm"
    if folder:
        lines |= diffusers_settings.process(folder.scheduler)
    return found, lines | flat({"model": model})


def params(found: Weights, lines: Mapping) -> tuple[dict, dict, dict]:
    """({path: array}, {name: array} that is not read, what `weights.record` gives back).

    Args:
      lines: that `read` gave.

    Raises:
      UserError: see `dit_names.read`.
    """
    from dlc_jax.models.dit import DiT

    start = "model."
    model = {key.removeprefix(start): lines[key] for key in lines if key.startswith(start)}
    network, name = DiT(**model), dit_names.kind(found.shapes, found.where)
    shapes = weights.shapes(network, *_inputs(network))
    arrays = dit_names.read(found, _layout(network, shapes, name), shapes)
    aside = {
        found.names[key]: found.read(key) for key in [dit_names.POSITIONS] if key in found.shapes
    }
    facts = {"file": found.where, "metadata": found.metadata, "dtypes": found.dtypes}
    return arrays, aside, facts | {"model": model, "format": name}


def fitted(config: ConfigDict, lines: Mapping) -> ConfigDict:
    """The recipe with these fields of its generator, of latents, and its codes' sizes everywhere.

    Raises:
      UserError: it has no generator.
    """
    if STEP not in config or config[STEP].stage != "generator":
        raise UserError(
            f"dlc import: the recipe has no step {STEP!r} that is a generator; "
            "give another --config"
        )
    changes = {}
    if lines["model.positions"]:
        changes = weights.sizes(config, lines["model.positions"], lines["model.values"])
    changes |= {f"{STEP}.{name}": value for name, value in lines.items()}
    return recipe.changed(config, changes | {f"{STEP}.latents": True, f"{STEP}.normalize": False})


def described(params: Mapping[str, np.ndarray], lines: Mapping) -> str:
    """The size of a generator, in words."""
    model = {key.removeprefix("model."): lines[key] for key in lines if key.startswith("model.")}
    return ", ".join([weights.count(params), *(f"{key} {value}" for key, value in model.items())])


def give(arguments) -> None:
    """dlc export dit."""
    out = Path(arguments.out)
    if out.suffix != ".safetensors":
        raise UserError(f"dlc export dit: --out={out} is not a .safetensors file")
    found, metadata, network, name = written(arguments.workdir, arguments.format)
    prepare(out, out.parent)
    files.save(out, found, metadata)
    print(f"wrote {out}: {len(found)} tensors, {name} names")
    if name == "diffusers" and not (beside := out.with_name("config.json")).exists():
        with writing(beside):
            settings = diffusers_settings.transformer_config(network)
            beside.write_text(f"{json.dumps(settings, indent=2)}\n")
        print(f"wrote {beside}: DiTTransformer2DModel")


def written(
    workdir: str | Path, name: str | None = None
) -> tuple[dict[str, np.ndarray], dict[str, str], "DiT", str]:
    """(tensors, metadata, network, format) of a run's generator, or of one that was imported.

    An imported one is as it came in the format that it came in, which None takes.

    Raises:
      UserError: see `_network` and `dit_names.written`.
    """
    network, directory, facts = _network(workdir)
    name = name or (facts or {}).get("format", "official")
    from dlc_jax import checkpoint

    abstract = weights.abstract(network, *_inputs(network))
    shapes = slots.shapes_of(abstract)
    layout = _layout(network, shapes, name)
    params = checkpoint.load_params(directory / "checkpoints", abstract)
    params = {path: np.asarray(array) for path, array in slots.flat(params).items()}
    found = dit_names.written(params, layout, str(directory))
    if facts and facts["format"] == name:  # as it came
        kept = (
            files.load(directory / weights.ASIDE) if (directory / weights.ASIDE).exists() else None
        )
        found = {
            key: kept.read(key)
            if kept and key in kept.shapes
            else found[dit_names.clean(key)].astype(weights.dtype(dtype), copy=False)
            for key, dtype in facts["dtypes"].items()
        }
        return found, facts["metadata"], network, name
    numbers = {"heads": str(network.heads), "image": str(network.image)}
    return found, {"format": "pt"} | numbers, network, name


def _network(workdir: str | Path):
    """(DiT, folder of its checkpoints, what import wrote down) of a run or an imported file."""
    from dlc_jax.models.dit import DiT

    facts = weights.record(Path(workdir))
    if facts is not None:
        if "format" not in facts:
            raise UserError(f"{workdir} holds no DiT; dlc import dit makes such a folder")
        return DiT(**facts["model"]), Path(workdir), facts
    config = recipe.of_run(workdir)
    if STEP not in config:
        raise UserError(f"{workdir} is a run whose recipe has no step {STEP!r}")
    from dlc_jax.networks import GeneratorNetwork

    settings = {"mesh": None, "batch": 1, "dtype": None}
    model = GeneratorNetwork(config, Path(workdir), STEP, **settings).model
    directory = recipe.trained(config, workdir, STEP)
    return model, directory, weights.record(directory)


def _inputs(network) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a batch of one image and time."""
    return (1, network.image, network.image, network.channels), (1,)


def _layout(network, shapes, name: str) -> dit_names.Layout:
    from dlc_jax.models.positions import sincos_2d

    side = network.image // network.patch
    positions = sincos_2d(side, side, network.width)
    return dit_names.layout(
        shapes, name, patch=network.patch, channels=network.channels, positions=positions
    )
