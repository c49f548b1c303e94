"""dlc export sem, dlc export dinov2: encoders in the files of others."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from dlc_jax import recipe
from dlc_jax.cli import weights
from dlc_jax.cli.networks import prepare, writing
from dlc_jax.errors import UserError
from dlc_jax.interop import files, hub_config, slots, torch_names
from dlc_jax.interop.weights import tensors

SEM = "dlc export sem runs/imagenet256 --out encoder.safetensors"
DINOV2 = "dlc export dinov2 runs/imagenet256 --out encoder/"


def give_flags(parser) -> None:
    """Flags of dlc export sem beside the run."""
    parser.add_argument(
        "--layout",
        choices=torch_names.LAYOUTS,
        help="names of DINOv2 as training writes them, or of transformers; those of the imported "
        "file, or official. transformers' has no DINO head",
    )


def sem(arguments) -> None:
    """dlc export sem."""
    out = Path(arguments.out)
    if out.suffix != ".safetensors":
        raise UserError(f"dlc export sem: --out={out} is not a .safetensors file")
    found, metadata, _ = simplicial(arguments.workdir, arguments.layout)
    prepare(out, out.parent)
    files.save(out, found, metadata)
    print(f"wrote {out}: {len(found)} tensors, {readable(found)}")


def simplicial(
    workdir: str | Path, layout: str | None = None
) -> tuple[dict[str, np.ndarray], dict[str, str], dict]:
    """(tensors, metadata, config.json) of a run's encoder, by the names of a layout.

    An imported one is as it came in the layout that it came in, which None takes.

    Raises:
      UserError: see `_load`; rotary positions.
    """
    model, directory, params = _load(workdir)
    facts = weights.record(directory)
    came = torch_names.kind(map(torch_names.clean, facts["dtypes"])) if facts else None
    layout = layout or came or "official"
    if layout == "transformers" or (
        facts and not any("dino_head." in key for key in facts["dtypes"])
    ):
        heads = tuple(torch_names.HEADS.values())  # the second: an import drew it
        params = {path: array for path, array in params.items() if not path.startswith(heads)}
    backbone, code = model.backbone, model.simplicial
    config = hub_config.dinov2(backbone, "Dinov2WithRegisters")
    config |= {"dlc_L": code.positions, "dlc_V": code["values"]}
    if layout == came:
        return _as_it_came(params, directory, facts), facts["metadata"], config
    _complete(params, backbone)
    table = torch_names.LAYOUTS[layout](slots.shapes_of(params))
    numbers = {"L": code.positions, "V": code["values"], "heads": backbone.heads}
    metadata = {"format": "pt", **{name: str(number) for name, number in numbers.items()}}
    return tensors(params, table, str(directory)), metadata, config


def dinov2(arguments) -> None:
    """dlc export dinov2."""
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
        f"wrote {out}: {name}Model, {len(found)} tensors, {readable(found)}; "
        "the simplicial and the DINO head are not part of it"
    )
    if (backbone.pos_resize == "antialias") != bool(backbone.registers):
        print(
            f"images of other than {backbone.image} pixels differ: "
            f"{name}Model resizes positions by the other bicubic"
        )


def _load(workdir: str | Path) -> tuple[ConfigDict, Path, dict[str, np.ndarray]]:
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


def readable(found: Mapping[str, np.ndarray]) -> str:
    """The size of tensors, in words."""
    size = sum(tensor.nbytes for tensor in found.values())
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
