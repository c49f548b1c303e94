"""dlc import dinov2, dlc import sem: encoders of other programs."""

import shlex
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from dlc_jax import command, recipe
from dlc_jax.cli import weights
from dlc_jax.cli.networks import whole
from dlc_jax.errors import UserError
from dlc_jax.interop import files, sections, slots, torch_names
from dlc_jax.interop.weights import Weights
from dlc_jax.recipe.lines import flat

DINOV2 = "dlc import dinov2 dinov2_vitl14_reg4_pretrain.pth --out weights/dinov2"
SEM = "dlc import sem model.safetensors --out runs/published --positions 512 --values 256"
CONFIG = "config.json"  # beside a file, as transformers writes it
UNTRAINED = (
    "there is no DINO head in the file: an untrained one stands in, which codes do not need and "
    "training must warm up first"
)


def take_flags(parser) -> None:
    """Flags of dlc import sem beside the file."""
    length = "of a code, where neither the shapes of the tensors nor a config.json tell it"
    parser.add_argument("--positions", type=whole, metavar="L", help=length)
    parser.add_argument("--values", type=whole, metavar="V", help="of a position, likewise")
    parser.add_argument(
        "--config",
        default="configs/imagenet256.py",
        metavar="FILE",
        help="recipe of the run, whose models take what is found; configs/imagenet256.py. "
        "--config.NAME=VALUE sets a field",
    )


def dinov2(arguments, rest) -> None:
    """dlc import dinov2."""
    out, file = weights.absent(arguments.out), files.inside(arguments.file)
    found = Weights(file, torch_names.clean)
    if "sem_embed.weight" in found.shapes:
        raise UserError(
            f"{found.where} has a simplicial head (sem_embed.weight), which DINOv2 does not have; "
            "dlc import sem takes it"
        )
    backbone, head = _backbone(found, file), sections.head(found.shapes, found.where)
    model = {"backbone": {"name": "vit", **backbone}, **head}
    from dlc_jax.models.vit import ViT  # and jax: a second, which a mistake need not wait for

    parts = {"vit": weights.abstract(ViT(**backbone), _images(backbone))}
    parts |= _heads(model) if head else {}
    shapes = slots.shapes_of(parts)
    params = found.params(torch_names.layout(found.shapes)(shapes), shapes)
    said = described(params, backbone)
    weights.save(out, params, step=0, model=model)
    print(f"wrote {out}: {said}\nto start from it:")
    section = f"--config.{weights.STEP}"
    flags = [f"{section}.model.{name}={value}" for name, value in flat(model).items()]
    new = '("simplicial.*",)' if head else '("simplicial.*","(patch_)?head.*")'
    flags += [f"{section}.train.init_from={out}", f"{section}.train.init_new={new}"]
    print(shlex.join(flags))


def sem(arguments, rest) -> None:
    """dlc import sem."""
    found, model = read(arguments.file, arguments.positions, arguments.values)
    config, _ = command.parse([*command.given(arguments), *rest])
    out = Path(arguments.out)
    directory = weights.absent(out / weights.STEP)
    config = fitted(config, model)
    arrays, aside, fresh = params(found, config)
    said = described(arrays, config[weights.STEP].model.backbone)
    with weights.run(out, config):
        put(found, config, directory, arrays, aside)
    code = model["simplicial"]
    shape = f"{code['positions']} x {code['values']}"
    print(f"wrote {out}: {said}, codes of {shape}, {code['readout']} readout")
    print(f"{found.where}: {weights.told(found, aside)}")
    if fresh:
        print(UNTRAINED)


def read(
    path: str | Path,
    positions: int | None = None,
    values: int | None = None,
    otherwise: int | None = None,
) -> tuple[Weights, dict]:
    """(an encoder's file or folder, opened; its `model` section but for what shapes leave open).

    Args:
      positions, values: L and V, if they are known. A config.json beside the file may tell L, as
        `dlc_L`.
      otherwise: L where nothing else tells it.

    Raises:
      UserError: see `sections`; another L than that of the config.json.
    """
    file = files.inside(path)
    found, beside = Weights(file, torch_names.clean), weights.settings(file.with_name(CONFIG))
    told = weights.number(beside, "dlc_L")
    if told and positions and told != positions:
        raise UserError(
            f"{file}: {CONFIG} beside it has dlc_L={told}, not {positions}; leave --positions out"
        )
    backbone, head = _backbone(found, file), sections.head(found.shapes, found.where)
    positions = positions or told or found.number("L")
    values = values or weights.number(beside, "dlc_V") or found.number("V")
    code = sections.simplicial(found.shapes, positions, values, found.where, otherwise=otherwise)
    return found, {"backbone": {"name": "vit", **backbone}, "simplicial": code, **head}


def put(
    found: Weights,
    config: ConfigDict,
    directory: Path,
    params: dict[str, np.ndarray],
    aside: Mapping[str, np.ndarray],
) -> None:
    """Writes the encoder's step of a run, of what `params` gave; empties `params`."""
    facts = {"file": found.where, "metadata": found.metadata, "dtypes": found.dtypes}
    weights.step(directory, params, config[weights.STEP], facts=facts, aside=aside)


def params(found: Weights, config: ConfigDict) -> tuple[dict, dict, dict]:
    """({path: array} of the recipe's encoder, {name: array} that is not read, fresh ones of these).

    Raises:
      UserError: see `Weights.params`.
    """
    section = config[weights.STEP].model
    from dlc_jax.models.encoder import Encoder

    shapes = weights.shapes(recipe.build(Encoder, section), _images(section.backbone))
    is_headless = not sections.head(found.shapes, found.where)
    fresh_heads = fresh(section, config.seed) if is_headless else {}
    there = {path: shape for path, shape in shapes.items() if path not in fresh_heads}
    unused = [name for name in torch_names.UNUSED if name in found.shapes]
    aside = {found.names[name]: found.read(name) for name in unused}
    read = found.params(torch_names.layout(found.shapes)(there), there, unused=unused)
    return read | fresh_heads, aside, fresh_heads


def _backbone(found: Weights, file: Path) -> dict:
    beside = weights.settings(file.with_name(CONFIG))
    heads = found.number("heads") or weights.number(beside, "num_attention_heads")
    return sections.vit(found.shapes, found.where, heads=heads)


def _images(backbone: Mapping) -> tuple[int, ...]:
    """Shape of a batch of one image."""
    return 1, backbone["image"], backbone["image"], 3


def fitted(config: ConfigDict, model: dict) -> ConfigDict:
    """The recipe with these fields of its encoder, and with their sizes in all that reads codes.

    Raises:
      UserError: it has no encoder, or crops that the patches do not divide.
    """
    if weights.STEP not in config or config[weights.STEP].stage != "encoder":
        raise UserError(
            f"dlc import: the recipe has no step {weights.STEP!r} that is an encoder; "
            "give another --config"
        )
    from dlc_jax.stages import encoder

    code = model["simplicial"]
    lines = weights.sizes(config, code["positions"], code["values"])
    lines |= flat({weights.STEP: {"model": model}})
    for name, section in config.items():
        if not isinstance(section, ConfigDict):
            continue
        if section.get("stage") == "codes" and not section.dtype:
            # of a run from before this field; published priors were trained on exact codes
            lines[f"{name}.dtype"] = "float32"
    config = recipe.changed(config, lines)
    encoder.check_crops(config[weights.STEP].crops, model["backbone"]["patch"], weights.STEP)
    return config


def fresh(section: Mapping, seed: int) -> dict[str, np.ndarray]:
    """{path: array} of the DINO heads that an encoder of this section starts training from."""
    random = np.random.default_rng(seed)
    constant = {"bias": 0.0, "gain": 1.0}
    return {
        path: np.full(shape, constant[kind], np.float32)
        if (kind := path.rpartition("/")[2]) in constant
        else 0.02 * random.standard_normal(shape, np.float32)
        for path, shape in slots.shapes_of(_heads(section)).items()
    }


def _heads(section: Mapping) -> dict:
    """Shapes of the DINO heads that an encoder of this section has."""
    from dlc_jax.models.simplicial import DinoHead

    names = ("head", "patch_head") if section["separate_head"] else ("head",)
    width = section["backbone"]["width"]
    shapes = weights.abstract(DinoHead(**section["dino"]), (1, width))
    return dict.fromkeys(names, shapes)


def described(params: Mapping[str, np.ndarray], backbone: Mapping) -> str:
    """The size of an encoder, in words."""
    extra = f", {backbone['registers']} registers" if backbone["registers"] else ""
    sizes = ", ".join(f"{name} {backbone[name]}" for name in ("width", "depth", "patch"))
    positions = f"positions for {backbone['image']} pixels"
    return f"{weights.count(params)}, {sizes}, {positions}{extra}, {backbone['mlp']}"
