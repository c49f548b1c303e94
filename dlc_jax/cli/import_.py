"""dlc import dinov2 | sem | vae FILE --out DIR: weights of other programs, every tensor used or named, none left over in silence."""

import shlex
from pathlib import Path

import ml_collections
import numpy as np

from dlc_jax import command
from dlc_jax import workdir as home
from dlc_jax.cli import weights
from dlc_jax.cli.networks import prepare, whole
from dlc_jax.errors import UserError
from dlc_jax.interop import files, sections, slots, torch_names, vae_names
from dlc_jax.interop.weights import Weights

DINOV2 = "dlc import dinov2 dinov2_vitl14_reg4_pretrain.pth --out weights/dinov2"
SEM = "dlc import sem model.safetensors --out runs/published --positions 512 --values 256"
VAE = "dlc import vae diffusion_pytorch_model.safetensors --out weights/vae"
EXAMPLE = f"{DINOV2}\n  {SEM}\n  {VAE}"


def arguments(parser) -> None:
    parser.epilog = f"examples:\n  {EXAMPLE}"
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name, what, example, out):
        made = actions.add_parser(
            name, help=what, description=f"{what[0].upper()}{what[1:]}.", epilog=f"example: {example}", allow_abbrev=False
        )
        made.add_argument("file", metavar="FILE", help=".safetensors; .pth, .pt or .bin with PyTorch installed")
        made.add_argument("--out", required=True, metavar="DIR", help=out)
        return made

    action(
        "dinov2", "a DINOv2 vision transformer, by its own names or transformers', to start training from", DINOV2, "a new folder"
    )
    sem = action("sem", "an encoder with a simplicial head, as a run whose encoder is complete", SEM, "folder of the run")
    sem.add_argument("--positions", type=whole, metavar="L", help="of a code, where the shapes of the tensors leave it open")
    sem.add_argument("--values", type=whole, metavar="V", help="of a position, likewise")
    sem.add_argument(
        "--config", default="configs/imagenet256.py", metavar="FILE",
        help="recipe of the run, whose models take what is found; --config.NAME=VALUE sets a field; configs/imagenet256.py",
    )  # fmt: skip
    action("vae", "the autoencoder of latent diffusion, by diffusers' names", VAE, "a new folder")


def run(arguments, rest) -> None:
    if rest and arguments.action != "sem":
        raise UserError(f"dlc import {arguments.action}: unexpected argument {rest[0]!r}; see dlc import --help")
    from absl import logging

    logging.set_verbosity(logging.ERROR)
    {"dinov2": dinov2, "sem": sem, "vae": vae}[arguments.action](arguments, rest)


def dinov2(arguments, rest) -> None:
    out, found = weights.absent(arguments.out), Weights(arguments.file, torch_names.clean)
    if "sem_embed.weight" in found.shapes:
        raise UserError(
            f"{found.where} has a simplicial head (sem_embed.weight), which is no part of DINOv2; dlc import sem takes it"
        )
    model = sections.vit(found.shapes, found.where, heads=found.number("heads"))
    head = sections.head(found.shapes, found.where)
    from dlc_jax.models.vit import ViT  # and jax: a second, which a mistake need not wait for

    parts = {"vit": weights.abstract(ViT(**model), (1, model["image"], model["image"], 3))}
    parts |= _heads(model | head) if head else {}
    shapes = slots.shapes_of(parts)
    params = found.params(torch_names.layout(found.shapes)(shapes), shapes)
    told = _told(params, model)
    _save(out, params, step=0, model=model | head)
    print(f"wrote {out}: {told}\nto start from it:")
    flags = [f"--config.{weights.STEP}.model.{name}={value}" for name, value in (model | head).items()]
    new = '("simplicial.*",)' if head else '("simplicial.*","(patch_)?head.*")'
    flags += [f"--config.{weights.STEP}.train.init_from={out}", f"--config.{weights.STEP}.train.init_new={new}"]
    print(shlex.join(flags))


def sem(arguments, rest) -> None:
    found = Weights(arguments.file, torch_names.clean)
    model = sections.vit(found.shapes, found.where, heads=found.number("heads"))
    head = sections.head(found.shapes, found.where)
    code = sections.simplicial(
        found.shapes, arguments.positions or found.number("L"), arguments.values or found.number("V"), found.where
    )
    config, _ = command.parse([*command.given(arguments), *rest])
    out = Path(arguments.out)
    directory = weights.absent(out / weights.STEP)
    _fit(config, model | head | code)
    section, steps = config[weights.STEP].model.to_dict(), config[weights.STEP].train.steps
    from dlc_jax.models.simplicial import Encoder

    shapes = weights.shapes(Encoder(**section), (1, section["image"], section["image"], 3))
    fresh = {} if head else _drawn(_heads(section), config.seed)
    there = {path: shape for path, shape in shapes.items() if path not in fresh}
    aside = {found.names[name]: found.read(name) for name in torch_names.UNUSED if name in found.shapes}
    params = found.params(torch_names.layout(found.shapes)(there), there, unused=torch_names.UNUSED)
    told = _told(params, model)
    prepare(out, out)
    with home.lock(out):
        home.remember(out, config.to_dict())
        params.update(fresh)
        _save(directory, params, step=steps, model=section)
        if aside:
            files.save(directory / weights.ASIDE, aside)
        facts = {"file": arguments.file, "metadata": found.metadata, "dtypes": found.dtypes}
        home.write(directory / weights.RECORD, facts)
        home.mark_done(directory, {"steps": steps, "after": {}, "settings": {}})
    print(f"wrote {out}: {told}, codes of {code['positions']} x {code['values']}, {code['readout']} readout")
    if aside:
        print(f"kept aside, for nothing reads them: {', '.join(aside)}")
    if fresh:
        print(
            "there is no DINO head in the file: an untrained one stands in, which codes do not need and training must warm up first"
        )


def vae(arguments, rest) -> None:
    out, found = weights.absent(arguments.out), Weights(arguments.file, vae_names.clean)
    model = vae_names.section(found.shapes, found.where)
    from dlc_jax.models.autoencoder import Autoencoder

    shapes = weights.shapes(Autoencoder(**model), (1, 2 ** len(model["channels"]), 2 ** len(model["channels"]), 3))
    params = found.params(vae_names.table(shapes), shapes)
    told = ", ".join([_count(params), *(f"{name} {value}" for name, value in model.items())])
    _save(out, params, step=0, model=model)
    print(f"wrote {out}: {told}")


def _fit(config, model: dict) -> None:
    """Puts the sizes that were found into the recipe's encoder, and those of its codes into all that reads codes."""
    if weights.STEP not in config or config[weights.STEP].stage != "encoder":
        raise UserError(f"dlc import sem: the recipe has no step {weights.STEP!r} that is an encoder; give another --config")
    from dlc_jax.stages import encoder

    config[weights.STEP].model.update(model)
    for section in config.values():
        if isinstance(section, ml_collections.ConfigDict) and "model" in section and section.model.get("positions"):
            section.model.update({name: model[name] for name in ("positions", "values")})
        if isinstance(section, ml_collections.ConfigDict) and section.get("stage") == "codes" and "dtype" not in section:
            with section.unlocked():  # a recipe that does not say: published priors and generators were trained on exact codes
                section.dtype = "float32"
    encoder.check_crops(config[weights.STEP].crops, model["patch"], weights.STEP)


def _heads(section: dict) -> dict:
    """Shapes of the DINO heads that an encoder of this section has."""
    from dlc_jax.models.simplicial import DinoHead

    head = DinoHead(**{name: section[name] for name in ("prototypes", "hidden", "bottleneck")})
    names = ("head", "patch_head") if section["separate_head"] else ("head",)
    return {name: weights.abstract(head, (1, section["width"])) for name in names}


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


def _save(directory: Path, params: dict[str, np.ndarray], *, step: int, model: dict) -> None:
    """Writes a checkpoint whose average the parameters are: the part that is loaded, and started from.

    `params` is empty then: their memory is let go of once they are copied, for writing takes as much again.
    """
    from dlc_jax.checkpoint import Checkpoints

    tree = slots.nested(params)
    params.clear()
    checkpoints = Checkpoints(directory / "checkpoints")
    checkpoints.save(step, {"ema": tree}, None, {"identity": {"model": model}})
    del tree
    checkpoints.close()


def _told(params: dict[str, np.ndarray], model: dict) -> str:
    extra = f", {model['registers']} registers" if model["registers"] else ""
    return (
        f"{_count(params)}, width {model['width']}, depth {model['depth']}, patch {model['patch']}, "
        f"positions for {model['image']} pixels{extra}, {model['mlp']}"
    )


def _count(params: dict[str, np.ndarray]) -> str:
    return f"{sum(array.size for array in params.values()):,} parameters"
