"""dlc import dinov2 | sem | sedd | vae | dit FILE --out DIR: weights of other programs.

Every tensor of the file is used, or named as unused.
"""

import shlex
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from dlc_jax import command, recipe
from dlc_jax import workdir as home
from dlc_jax.cli import autoencoders, generators, priors, weights
from dlc_jax.cli.networks import prepare, whole
from dlc_jax.errors import UserError
from dlc_jax.interop import files, sections, slots, torch_names
from dlc_jax.interop.weights import Weights
from dlc_jax.recipe.lines import flat

DINOV2 = "dlc import dinov2 dinov2_vitl14_reg4_pretrain.pth --out weights/dinov2"
SEM = "dlc import sem model.safetensors --out runs/published --positions 512 --values 256"
EXAMPLE = f"{DINOV2}\n  {SEM}\n  {autoencoders.IMPORT}\n  {generators.IMPORT}\n  {priors.IMPORT}"


def arguments(parser) -> None:
    parser.epilog = f"examples:\n  {EXAMPLE}"
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name, what, example, out, files=None):
        said = f"{what[0].upper()}{what[1:]}."
        settings = {"description": said, "epilog": f"example: {example}", "allow_abbrev": False}
        made = actions.add_parser(name, help=what, **settings)
        file = ".safetensors, .pth, .pt or .bin; one from before PyTorch 1.6 needs PyTorch"
        made.add_argument("file", metavar="FILE", nargs=files, help=file)
        made.add_argument("--out", required=True, metavar="DIR", help=out)
        return made

    what = "a DINOv2 vision transformer, by its own names or transformers', to start training from"
    action("dinov2", what, DINOV2, "a new folder")
    what = "an encoder with a simplicial head, as a run whose encoder is complete"
    sem = action("sem", what, SEM, "folder of the run")
    length = "of a code, where the shapes of the tensors leave it open"
    sem.add_argument("--positions", type=whole, metavar="L", help=length)
    sem.add_argument("--values", type=whole, metavar="V", help="of a position, likewise")
    sem.add_argument(
        "--config",
        default="configs/imagenet256.py",
        metavar="FILE",
        help="recipe of the run, whose models take what is found; configs/imagenet256.py. "
        "--config.NAME=VALUE sets a field",
    )
    what = "a DiT by the names of DLC, of the public DiT or of diffusers, to start training from"
    generators.take_flags(action("dit", what, generators.IMPORT, "a new folder"))
    what = (
        "SEDD over codes, published or as its training wrote it, as a run whose prior is complete"
    )
    priors.take_flags(action("sedd", what, priors.IMPORT, "folder of the run"))
    what = "an autoencoder: diffusers' AutoencoderKL, or the two files of a tiny one (TAEF2)"
    vae = f"{autoencoders.IMPORT}\n  {autoencoders.TINY}"
    action("vae", what, vae, "a new folder", files="+")


def run(arguments, rest) -> None:
    if rest and arguments.action not in ("sem", "sedd"):
        verb = f"dlc import {arguments.action}"
        raise UserError(f"{verb}: unexpected argument {rest[0]!r}; see dlc import --help")
    from absl import logging

    logging.set_verbosity(logging.ERROR)
    if arguments.action == "dit":
        return generators.take(arguments)
    verbs = {"dinov2": dinov2, "sem": sem, "sedd": priors.take, "vae": autoencoders.take}
    verbs[arguments.action](arguments, rest)


def dinov2(arguments, rest) -> None:
    out, found = weights.absent(arguments.out), Weights(arguments.file, torch_names.clean)
    if "sem_embed.weight" in found.shapes:
        raise UserError(
            f"{found.where} has a simplicial head (sem_embed.weight), which DINOv2 does not have; "
            "dlc import sem takes it"
        )
    backbone, head = _backbone(found), sections.head(found.shapes, found.where)
    model = {"backbone": {"name": "vit", **backbone}, **head}
    from dlc_jax.models.vit import ViT  # and jax: a second, which a mistake need not wait for

    parts = {"vit": weights.abstract(ViT(**backbone), _images(backbone))}
    parts |= _heads(model) if head else {}
    shapes = slots.shapes_of(parts)
    params = found.params(torch_names.layout(found.shapes)(shapes), shapes)
    said = _described(params, backbone)
    weights.save(out, params, step=0, model=model)
    print(f"wrote {out}: {said}\nto start from it:")
    section = f"--config.{weights.STEP}"
    flags = [f"{section}.model.{name}={value}" for name, value in flat(model).items()]
    new = '("simplicial.*",)' if head else '("simplicial.*","(patch_)?head.*")'
    flags += [f"{section}.train.init_from={out}", f"{section}.train.init_new={new}"]
    print(shlex.join(flags))


def sem(arguments, rest) -> None:
    found = Weights(arguments.file, torch_names.clean)
    backbone, head = _backbone(found), sections.head(found.shapes, found.where)
    positions = arguments.positions or found.number("L")
    values = arguments.values or found.number("V")
    code = sections.simplicial(found.shapes, positions, values, found.where)
    config, _ = command.parse([*command.given(arguments), *rest])
    out = Path(arguments.out)
    directory = weights.absent(out / weights.STEP)
    config = _fitted(config, {"backbone": {"name": "vit", **backbone}, "simplicial": code, **head})
    section, steps = config[weights.STEP].model, config[weights.STEP].train.steps
    from dlc_jax.models.encoder import Encoder

    shapes = weights.shapes(recipe.build(Encoder, section), _images(section.backbone))
    fresh = {} if head else _drawn(_heads(section), config.seed)
    there = {path: shape for path, shape in shapes.items() if path not in fresh}
    unused = [name for name in torch_names.UNUSED if name in found.shapes]
    aside = {found.names[name]: found.read(name) for name in unused}
    params = found.params(torch_names.layout(found.shapes)(there), there, unused=unused)
    said = _described(params, backbone)
    prepare(out, out)
    with home.lock(out):
        home.remember(out, config.to_dict(), present=recipe.read_back)
        params.update(fresh)
        weights.save(directory, params, step=steps, model=section.to_dict())
        if aside:
            files.save(directory / weights.ASIDE, aside)
        facts = {"file": arguments.file, "metadata": found.metadata, "dtypes": found.dtypes}
        home.write(directory / weights.RECORD, facts)
        home.mark_done(directory, {"steps": steps, "after": {}, "settings": {}})
    shape = f"{code['positions']} x {code['values']}"
    print(f"wrote {out}: {said}, codes of {shape}, {code['readout']} readout")
    if aside:
        print(f"kept aside, since nothing reads them: {', '.join(aside)}")
    if fresh:
        print(
            "there is no DINO head in the file: an untrained one stands in, which codes do not "
            "need and training must warm up first"
        )


def _backbone(found: Weights) -> dict:
    return sections.vit(found.shapes, found.where, heads=found.number("heads"))


def _images(backbone: Mapping) -> tuple[int, ...]:
    """Shape of a batch of one image."""
    return 1, backbone["image"], backbone["image"], 3


def _fitted(config: ConfigDict, model: dict) -> ConfigDict:
    """The recipe with these fields of its encoder, and with their sizes in all that reads codes.

    Raises:
      UserError: it has no encoder, or crops that the patches do not divide.
    """
    if weights.STEP not in config or config[weights.STEP].stage != "encoder":
        raise UserError(
            f"dlc import sem: the recipe has no step {weights.STEP!r} that is an encoder; "
            "give another --config"
        )
    from dlc_jax.stages import encoder

    lines = flat({weights.STEP: {"model": model}})
    for name, section in config.items():
        if not isinstance(section, ConfigDict):
            continue
        if "model" in section and section.model.get("positions"):
            for field in ("positions", "values"):
                lines[f"{name}.model.{field}"] = model["simplicial"][field]
        if section.get("stage") == "codes" and not section.dtype:
            # of a run from before this field; published priors were trained on exact codes
            lines[f"{name}.dtype"] = "float32"
    config = recipe.changed(config, lines)
    encoder.check_crops(config[weights.STEP].crops, model["backbone"]["patch"], weights.STEP)
    return config


def _heads(section: Mapping) -> dict:
    """Shapes of the DINO heads that an encoder of this section has."""
    from dlc_jax.models.simplicial import DinoHead

    names = ("head", "patch_head") if section["separate_head"] else ("head",)
    width = section["backbone"]["width"]
    shapes = weights.abstract(DinoHead(**section["dino"]), (1, width))
    return dict.fromkeys(names, shapes)


def _drawn(heads: dict, seed: int) -> dict[str, np.ndarray]:
    """Heads as training would start from."""
    random = np.random.default_rng(seed)
    constant = {"bias": 0.0, "gain": 1.0}
    return {
        path: np.full(shape, constant[kind], np.float32)
        if (kind := path.rpartition("/")[2]) in constant
        else 0.02 * random.standard_normal(shape, np.float32)
        for path, shape in slots.shapes_of(heads).items()
    }


def _described(params: dict[str, np.ndarray], backbone: dict) -> str:
    extra = f", {backbone['registers']} registers" if backbone["registers"] else ""
    sizes = ", ".join(f"{name} {backbone[name]}" for name in ("width", "depth", "patch"))
    positions = f"positions for {backbone['image']} pixels"
    return f"{weights.count(params)}, {sizes}, {positions}{extra}, {backbone['mlp']}"
