"""dlc import vae FILE... --out DIR, dlc export vae DIR --out FILE...: autoencoders of latents."""

import shlex
from pathlib import Path

import numpy as np

from dlc_jax import workdir as home
from dlc_jax.cli import weights
from dlc_jax.cli.networks import prepare
from dlc_jax.errors import UserError
from dlc_jax.interop import files, slots, tiny_names, vae_names
from dlc_jax.interop.weights import Weights, tensors

IMPORT = "dlc import vae diffusion_pytorch_model.safetensors --out weights/vae"
TINY = "dlc import vae taef2_encoder.pth taef2_decoder.pth --out weights/taef2"
EXPORT = "dlc export vae weights/vae --out vae.safetensors"
NAMES = {"kl": vae_names, "tiny": tiny_names}


def take(arguments, rest) -> None:
    """dlc import vae."""
    out, paths = weights.absent(arguments.out), arguments.file
    if len(paths) > 2:
        raise UserError(f"dlc import vae takes one file, or an encoder and a decoder; got {paths}")
    name = "tiny" if len(paths) == 2 else "kl"
    if name == "kl":
        found = Weights(paths[0], vae_names.clean)
    else:
        found = Weights(" and ".join(paths), str, lambda _: tiny_names.both(paths))
    model = {"name": name, **NAMES[name].section(found.shapes, found.where)}
    network = _network(model)
    shapes = slots.shapes_of(_abstract(network))
    params = found.params(NAMES[name].table(shapes), shapes)
    said = ", ".join([weights.count(params), *(f"{key} {value}" for key, value in model.items())])
    weights.save(out, params, step=0, model=model)
    facts = {"files": paths, "metadata": found.metadata, "dtypes": found.dtypes, "model": model}
    home.write(out / weights.RECORD, facts)
    usual = type(network)()
    other = {key: value for key, value in model.items() if value != getattr(usual, key, "kl")}
    print(f"wrote {out}: {said}\nto use it:")
    flags = [f"path={out}", *(f"model.{key}={value}" for key, value in other.items())]
    print(shlex.join(f"--config.autoencoder.{flag}" for flag in flags))


def give(arguments) -> None:
    """dlc export vae."""
    facts = weights.record(Path(arguments.dir))
    if facts is None or "model" not in facts:
        raise UserError(
            f"{arguments.dir} holds no autoencoder that dlc import vae of this version made; "
            "import it again"
        )
    name, outs = facts["model"]["name"], [Path(out) for out in arguments.out]
    wanted = len(facts["files"])
    if len(outs) != wanted or any(out.suffix != ".safetensors" for out in outs):
        what = "one .safetensors file" if wanted == 1 else "two, the encoder and the decoder"
        raise UserError(f"dlc export vae: --out must be {what}; got {' '.join(map(str, outs))}")
    for out in outs:
        prepare(out, out.parent)
    from dlc_jax import checkpoint

    abstract = _abstract(_network(facts["model"]))
    params = checkpoint.load_params(Path(arguments.dir) / "checkpoints", abstract)
    params = {path: np.asarray(array) for path, array in slots.flat(params).items()}
    table = NAMES[name].table(slots.shapes_of(params))
    found = tensors(params, table, arguments.dir)
    clean = vae_names.clean if name == "kl" else str
    found = {
        given: found[clean(given)].astype(weights.dtype(dtype), copy=False)
        for given, dtype in facts["dtypes"].items()
    }
    halves = tiny_names.HALVES if name == "tiny" else ("",)
    for out, half in zip(outs, halves, strict=True):
        start = f"{half}." if half else ""
        part = {
            key.removeprefix(start): array for key, array in found.items() if key.startswith(start)
        }
        files.save(out, part, facts["metadata"])
        print(f"wrote {out}: {len(part)} tensors")


def _network(model: dict):
    """The module of a `model` section."""
    from dlc_jax.models.autoencoders import AUTOENCODERS

    fields = {key: value for key, value in model.items() if key != "name"}
    if isinstance(fields["channels"], list):  # as JSON has it
        fields["channels"] = tuple(fields["channels"])
    return AUTOENCODERS[model["name"]](**fields)


def _abstract(network) -> dict:
    """Shapes of the parameters."""
    return weights.abstract(network, (1, network.stride, network.stride, 3))
