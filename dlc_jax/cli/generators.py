"""dlc import dit FILE --out DIR, dlc export dit W --out FILE: DiT in the files of others."""

import json
import shlex
from pathlib import Path

import numpy as np

from dlc_jax import recipe
from dlc_jax import workdir as home
from dlc_jax.cli import weights
from dlc_jax.cli.networks import prepare, whole, writing
from dlc_jax.errors import UserError
from dlc_jax.interop import dit_names, files, slots
from dlc_jax.interop.weights import Weights
from dlc_jax.recipe.lines import flat

IMPORT = "dlc import dit transformer/diffusion_pytorch_model.safetensors --out weights/dit"
EXPORT = "dlc export dit runs/imagenet256 --out dit.safetensors"
STEP = "generator"  # of a recipe: it is taken from it


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


def take(arguments) -> None:
    """dlc import dit."""
    out, found = weights.absent(arguments.out), Weights(arguments.file, dit_names.clean)
    beside = _config(Path(arguments.file).with_name("config.json"))
    heads = arguments.heads or found.number("heads") or beside.get("num_attention_heads")
    sides = beside.get("sample_size"), beside.get("input_size")
    image = arguments.image or found.number("image") or sides[0] or sides[1]
    model = dit_names.section(found.shapes, found.where, heads=heads, image=image)
    from dlc_jax.models.dit import DiT

    network, name = DiT(**model), dit_names.kind(found.shapes, found.where)
    shapes = weights.shapes(network, *_inputs(network))
    params = dit_names.read(found, _layout(network, shapes, name), shapes)
    aside = {
        found.names[key]: found.read(key) for key in [dit_names.POSITIONS] if key in found.shapes
    }
    said = ", ".join([weights.count(params), *(f"{key} {value}" for key, value in model.items())])
    weights.save(out, params, step=0, model=model)
    if aside:
        files.save(out / weights.ASIDE, aside)
    facts = {"file": arguments.file, "metadata": found.metadata, "dtypes": found.dtypes}
    home.write(out / weights.RECORD, facts | {"model": model, "format": name})
    print(f"wrote {out}: {said}\nto start from it:")
    lines = {"train.init_from": str(out), **flat({"model": model})}
    if model.get("out_channels", 0) == 2 * model["channels"]:  # noise and variances
        lines = {"process.name": "ddpm", **lines}
    print(shlex.join(f"--config.{STEP}.{key}={value}" for key, value in lines.items()))


def give(arguments) -> None:
    """dlc export dit."""
    out = Path(arguments.out)
    if out.suffix != ".safetensors":
        raise UserError(f"dlc export dit: --out={out} is not a .safetensors file")
    network, directory, facts = _network(arguments.workdir)
    name = arguments.format or (facts or {}).get("format", "official")
    from dlc_jax import checkpoint

    abstract = weights.abstract(network, *_inputs(network))
    shapes = slots.shapes_of(abstract)
    layout = _layout(network, shapes, name)
    params = checkpoint.load_params(directory / "checkpoints", abstract)
    params = {path: np.asarray(array) for path, array in slots.flat(params).items()}
    found = dit_names.written(params, layout, str(directory))
    prepare(out, out.parent)
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
        metadata = facts["metadata"]
    else:
        numbers = {"heads": str(network.heads), "image": str(network.image)}
        metadata = {"format": "pt"} | numbers
    files.save(out, found, metadata)
    print(f"wrote {out}: {len(found)} tensors, {name} names")
    if name == "diffusers" and not (beside := out.with_name("config.json")).exists():
        with writing(beside):
            beside.write_text(f"{json.dumps(_diffusers_config(network), indent=2)}\n")
        print(f"wrote {beside}: DiTTransformer2DModel")


def _network(workdir: str):
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
    return model, recipe.trained(config, workdir, STEP), None


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


def _config(path: Path) -> dict:
    """The config.json that diffusers has beside a file, or {}."""
    try:
        found = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); move it away, or mend it") from error
    return found if isinstance(found, dict) else {}


def _diffusers_config(network) -> dict:
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": network.heads,
        "attention_head_dim": network.width // network.heads,
        "in_channels": network.channels,
        "out_channels": network.out_channels or network.channels,
        "num_layers": network.depth,
        "sample_size": network.image,
        "patch_size": network.patch,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": network.classes,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
    }
