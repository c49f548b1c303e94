"""dlc export torch | sem | dinov2 | sedd | vae | dit: networks for other programs."""

import json
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from dlc_jax import recipe
from dlc_jax.cli import autoencoders, export_torch, generators, priors, weights
from dlc_jax.cli.networks import prepare, writing
from dlc_jax.errors import UserError
from dlc_jax.interop import files, hub_config, slots, torch_names
from dlc_jax.interop.weights import tensors

SEM = "dlc export sem runs/imagenet256 --out encoder.safetensors"
DINOV2 = "dlc export dinov2 runs/imagenet256 --out encoder/"
EXAMPLE = "\n  ".join(
    [export_torch.EXPORT, SEM, DINOV2, autoencoders.EXPORT, generators.EXPORT, priors.EXPORT]
)


def arguments(parser) -> None:
    parser.epilog = f"examples:\n  {EXAMPLE}"
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    export_torch.add(actions)
    what = "the encoder, by the published names; an imported one as it came, byte by byte"
    _action(actions, "sem", what, SEM, "FILE", "a .safetensors file")
    what = "its vision transformer, as a folder that transformers loads"
    _action(actions, "dinov2", what, DINOV2, "FOLDER", "a new folder")
    what = "its image generator; an imported one (W is its folder) as it came, byte by byte"
    generators.give_flags(
        _action(actions, "dit", what, generators.EXPORT, "FILE", "a .safetensors file")
    )
    what = "its prior, by the names of SEDD; an imported one as it came, byte by byte"
    priors.give_flags(_action(actions, "sedd", what, priors.EXPORT, "FILE", "the file"))
    what = "an autoencoder as it came: by the names and in the types of the imported files"
    out = "a .safetensors file, or two of a tiny one: its encoder and its decoder"
    where = {"where": "dir", "of": "folder that dlc import vae made", "count": "+"}
    _action(actions, "vae", what, autoencoders.EXPORT, "FILE", out, **where)


def _action(
    actions,
    name: str,
    what: str,
    example: str,
    metavar: str,
    out: str,
    *,
    where: str = "workdir",
    of: str = "folder of a run",
    count: str | None = None,
):
    said = f"{what[0].upper()}{what[1:]}."
    settings = {"description": said, "epilog": f"example: {example}", "allow_abbrev": False}
    action = actions.add_parser(name, help=what, **settings)
    action.add_argument(where, metavar="W" if where == "workdir" else "DIR", help=of)
    action.add_argument("--out", required=True, metavar=metavar, nargs=count, help=out)
    return action


def run(arguments, rest) -> None:
    from absl import logging

    logging.set_verbosity(logging.ERROR)
    verbs = {"sem": sem, "dinov2": dinov2, "sedd": priors.give, "vae": autoencoders.give}
    verbs |= {"dit": generators.give, "torch": export_torch.give}
    verbs[arguments.action](arguments)


def sem(arguments) -> None:
    out = Path(arguments.out)
    if out.suffix != ".safetensors":
        raise UserError(f"dlc export sem: --out={out} is not a .safetensors file")
    model, directory, params = _load(arguments.workdir)
    prepare(out, out.parent)
    facts = weights.record(directory)
    if facts is None:
        _complete(params, model.backbone)
        found = tensors(params, torch_names.official(slots.shapes_of(params)), str(directory))
        code = {"L": model.simplicial.positions, "V": model.simplicial["values"]}
        numbers = code | {"heads": model.backbone.heads}
        metadata = {"format": "pt", **{name: str(number) for name, number in numbers.items()}}
    else:
        found, metadata = _as_it_came(params, directory, facts), facts["metadata"]
    files.save(out, found, metadata)
    print(f"wrote {out}: {len(found)} tensors, {_readable(found)}")


def dinov2(arguments) -> None:
    out = weights.absent(arguments.out)
    model, directory, params = _load(arguments.workdir)
    backbone = model.backbone
    prepare(out, out)
    params = {path: array for path, array in params.items() if path.startswith("vit/")}
    _complete(params, backbone)
    found = tensors(params, torch_names.transformers(slots.shapes_of(params)), str(directory))
    name = "Dinov2WithRegisters" if backbone.registers else "Dinov2"
    metadata = {"format": "pt", "heads": str(backbone.heads)}
    files.save(out / "model.safetensors", found, metadata)
    with writing(out):
        text = json.dumps(hub_config.dinov2(backbone, name), indent=2)
        (out / "config.json").write_text(f"{text}\n")
    print(
        f"wrote {out}: {name}Model, {len(found)} tensors, {_readable(found)}; "
        "the simplicial and the DINO head are not part of it"
    )
    if (backbone.pos_resize == "antialias") != bool(backbone.registers):
        print(
            f"images of other than {backbone.image} pixels differ: "
            f"{name}Model resizes positions by the other bicubic"
        )


def _load(workdir: str) -> tuple[ConfigDict, Path, dict[str, np.ndarray]]:
    """(model section, directory of the step, parameters by path) of a run's encoder.

    Raises:
      UserError: no run, no encoder in it, or one with another backbone than a ViT.
    """
    config = recipe.of_run(workdir)
    if weights.STEP not in config:
        raise UserError(f"{workdir} is a run whose recipe has no step {weights.STEP!r}")
    model = config[weights.STEP].model
    if model.backbone.name != "vit":
        raise UserError(
            f"{workdir} has an encoder with backbone {model.backbone.name!r}, which these formats "
            "have no names for; only 'vit' can be exported"
        )
    from dlc_jax import checkpoint
    from dlc_jax.models.encoder import Encoder

    directory = recipe.trained(config, workdir, weights.STEP)
    images = (1, model.backbone.image, model.backbone.image, 3)
    abstract = weights.abstract(recipe.build(Encoder, model), images)
    params = checkpoint.load_params(directory / "checkpoints", abstract)
    return model, directory, {path: np.asarray(array) for path, array in slots.flat(params).items()}


def _complete(params: dict[str, np.ndarray], backbone: ConfigDict) -> None:
    """Adds what other programs always have: LayerScale of ones, fixed positions as a table.

    Raises:
      UserError: rotary positions, which no other program of this kind has.
    """
    if backbone.pos == "rope":
        raise UserError(
            "DINOv2 has no rotary positions (pos='rope'); this encoder cannot be exported"
        )
    width, depth = backbone.width, backbone.depth
    if backbone.pos == "sincos":
        from dlc_jax.models.positions import sincos_2d

        side = backbone.image // backbone.patch
        first = np.zeros((1, width), np.float32)
        params["vit/pos_embed"] = np.concatenate([first, sincos_2d(side, side, width)])
    for name in ("gamma1", "gamma2"):
        params.setdefault(f"vit/blocks/{name}", np.ones((depth, width), np.float32))


def _as_it_came(params: dict, directory: Path, facts: dict) -> dict[str, np.ndarray]:
    """The tensors of the imported file, by its names and dtypes; without a head that it lacked."""
    layout = torch_names.layout(map(torch_names.clean, facts["dtypes"]))
    table = tensors(params, layout(slots.shapes_of(params)), str(directory))
    aside = files.load(directory / weights.ASIDE) if (directory / weights.ASIDE).exists() else None
    found = {}
    for name, dtype in facts["dtypes"].items():
        tensor = table.get(torch_names.clean(name))
        found[name] = (
            aside.read(name) if tensor is None else tensor.astype(weights.dtype(dtype), copy=False)
        )
    return found


def _readable(found: dict[str, np.ndarray]) -> str:
    size = sum(tensor.nbytes for tensor in found.values())
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
