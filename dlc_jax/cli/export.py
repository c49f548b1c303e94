"""dlc export sem W --out FILE, dlc export dinov2 W --out FOLDER: an encoder for other programs."""

import json
from pathlib import Path

import ml_collections
import ml_dtypes
import numpy as np

from dlc_jax import recipe
from dlc_jax import workdir as home
from dlc_jax.cli import weights
from dlc_jax.cli.networks import prepare, writing
from dlc_jax.errors import UserError
from dlc_jax.interop import files, slots, torch_names
from dlc_jax.interop.weights import tensors

SEM = "dlc export sem runs/imagenet256 --out encoder.safetensors"
DINOV2 = "dlc export dinov2 runs/imagenet256 --out encoder/"
EXAMPLE = f"{SEM}\n  {DINOV2}"


def arguments(parser) -> None:
    parser.epilog = f"examples:\n  {EXAMPLE}"
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, what, example, out in (
        (
            "sem",
            "the encoder, by the published names; an imported one as it came, byte by byte",
            SEM,
            ("FILE", "a .safetensors file"),
        ),
        ("dinov2", "its vision transformer, as a folder that transformers loads", DINOV2, ("FOLDER", "a new folder")),
    ):
        made = actions.add_parser(
            name, help=what, description=f"{what[0].upper()}{what[1:]}.", epilog=f"example: {example}", allow_abbrev=False
        )
        made.add_argument("workdir", metavar="W", help="folder of a run")
        made.add_argument("--out", required=True, metavar=out[0], help=out[1])


def run(arguments, rest) -> None:
    from absl import logging

    logging.set_verbosity(logging.ERROR)
    {"sem": sem, "dinov2": dinov2}[arguments.action](arguments)


def sem(arguments) -> None:
    out = Path(arguments.out)
    if out.suffix != ".safetensors":
        raise UserError(f"dlc export sem: --out={out} is no .safetensors file")
    model, directory, params = _load(arguments.workdir)
    prepare(out, out.parent)
    facts = _record(directory)
    if facts is None:
        _complete(params, model)
        found = tensors(params, torch_names.official(slots.shapes_of(params)), str(directory))
        metadata = {"format": "pt", "L": str(model["positions"]), "V": str(model["values"]), "heads": str(model["heads"])}
    else:
        found, metadata = _as_it_came(params, directory, facts), facts["metadata"]
    files.save(out, found, metadata)
    print(f"wrote {out}: {len(found)} tensors, {_readable(found)}")


def dinov2(arguments) -> None:
    out = weights.absent(arguments.out)
    model, directory, params = _load(arguments.workdir)
    prepare(out, out)
    params = {path: array for path, array in params.items() if path.startswith("vit/")}
    _complete(params, model)
    found = tensors(params, torch_names.transformers(slots.shapes_of(params)), str(directory))
    name = "Dinov2WithRegisters" if model["registers"] else "Dinov2"
    files.save(out / "model.safetensors", found, {"format": "pt", "heads": str(model["heads"])})
    with writing(out):
        (out / "config.json").write_text(json.dumps(_transformers_config(model, name), indent=2) + "\n")
    print(
        f"wrote {out}: {name}Model, {len(found)} tensors, {_readable(found)}; the simplicial and the DINO head are not part of it"
    )
    if (model["pos_resize"] == "antialias") != bool(model["registers"]):
        print(f"images of other than {model['image']} pixels differ: {name}Model resizes positions by the other bicubic")


def _load(workdir: str):
    """(model section, directory of the step, parameters by path) of a run's encoder."""
    config = ml_collections.ConfigDict(home.read_config(workdir))
    if weights.STEP not in config:
        raise UserError(f"{workdir} is a run whose recipe has no step {weights.STEP!r}")
    from dlc_jax import checkpoint
    from dlc_jax.models.simplicial import Encoder

    model = config[weights.STEP].model.to_dict()
    directory = recipe.trained(config, workdir, weights.STEP)
    abstract = weights.abstract(Encoder(**model), (1, model["image"], model["image"], 3))
    params = checkpoint.load_params(directory / "checkpoints", abstract)
    return model, directory, {path: np.asarray(array) for path, array in slots.flat(params).items()}


def _complete(params: dict[str, np.ndarray], model: dict) -> None:
    """Adds what other programs always have: LayerScale of ones, fixed positions as a table.

    Raises:
      UserError: rotary positions, which no other program of this kind has.
    """
    if model["pos"] == "rope":
        raise UserError("rotary positions (pos='rope') are none that DINOv2 has; this encoder cannot be exported")
    if model["pos"] == "sincos":
        from dlc_jax.models.positions import sincos_2d

        side = model["image"] // model["patch"]
        table = sincos_2d(side, side, model["width"])
        params["vit/pos_embed"] = np.concatenate([np.zeros((1, model["width"]), np.float32), table])
    for name in ("gamma1", "gamma2"):
        params.setdefault(f"vit/blocks/{name}", np.ones((model["depth"], model["width"]), np.float32))


def _record(directory: Path) -> dict | None:
    """What import wrote down."""
    path = directory / weights.RECORD
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); put a copy back, or import the encoder anew") from error


def _as_it_came(params: dict[str, np.ndarray], directory: Path, facts: dict) -> dict[str, np.ndarray]:
    """The tensors of the file that was imported, by their names and dtypes there; a head that it had not is left out."""
    table = tensors(params, torch_names.layout(map(torch_names.clean, facts["dtypes"]))(slots.shapes_of(params)), str(directory))
    aside = files.load(directory / weights.ASIDE) if (directory / weights.ASIDE).exists() else None
    found = {}
    for name, dtype in facts["dtypes"].items():
        clean = torch_names.clean(name)
        found[name] = table[clean].astype(_dtype(dtype), copy=False) if clean in table else aside.read(name)
    return found


def _dtype(name: str):
    return ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)


def _transformers_config(model: dict, name: str) -> dict:
    ratio = model["mlp_ratio"]
    config = {
        "architectures": [f"{name}Model"],
        "model_type": {"Dinov2": "dinov2", "Dinov2WithRegisters": "dinov2_with_registers"}[name],
        "hidden_size": model["width"],
        "num_hidden_layers": model["depth"],
        "num_attention_heads": model["heads"],
        "mlp_ratio": int(ratio) if ratio == int(ratio) else ratio,
        "use_swiglu_ffn": model["mlp"] == "swiglu",
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "layerscale_value": model["layer_scale"] or 1.0,
        "image_size": model["image"],
        "patch_size": model["patch"],
        "num_channels": model["channels"],
        "qkv_bias": True,
        "dtype": "float32",
    }
    return config | ({"num_register_tokens": model["registers"]} if model["registers"] else {})


def _readable(found: dict[str, np.ndarray]) -> str:
    size = sum(tensor.nbytes for tensor in found.values())
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
