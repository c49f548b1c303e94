"""dlc import vae FILE... --out DIR, dlc export vae DIR --out FILE...: autoencoders of latents."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dlc_jax.cli import diffusers_settings, weights
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
    found, model = read(paths)
    usual, arrays = type(_network(model))(), params(found, model)
    said = described(arrays, model)
    put(found, model, out, arrays, count=len(paths))
    other = {key: value for key, value in model.items() if value != getattr(usual, key, "kl")}
    print(f"wrote {out}: {said}\n{found.where}: {weights.told(found, {})}\nto use it:")
    flags = [f"path={out}", *(f"model.{key}={value}" for key, value in other.items())]
    print(shlex.join(f"--config.autoencoder.{flag}" for flag in flags))


def read(paths: Sequence[str | Path]) -> tuple[Weights, dict]:
    """(an autoencoder's file or folder, or its two files, opened; its `model` section).

    Raises:
      UserError: see `section` of the names; a config.json beside it that does not fit.
    """
    if len(paths) == 2:
        found = Weights(" and ".join(map(str, paths)), str, lambda _: tiny_names.both(paths))
        return found, {"name": "tiny", **tiny_names.section(found.shapes, found.where)}
    file = files.inside(paths[0])
    found = Weights(file, vae_names.clean)
    model = {"name": "kl", **vae_names.section(found.shapes, found.where)}
    return found, model | diffusers_settings.autoencoder(file.with_name("config.json"), model)


def params(found: Weights, model: Mapping) -> dict[str, np.ndarray]:
    """Its parameters {path: array}.

    Raises:
      UserError: see `Weights.params`.
    """
    shapes = slots.shapes_of(_abstract(_network(model)))
    return found.params(NAMES[model["name"]].table(shapes), shapes)


def described(params: Mapping[str, np.ndarray], model: Mapping) -> str:
    """The size of an autoencoder, in words."""
    return ", ".join([weights.count(params), *(f"{key} {value}" for key, value in model.items())])


def put(
    found: Weights, model: Mapping, out: Path, params: dict[str, np.ndarray], count: int = 1
) -> None:
    """Writes the folder of an autoencoder that came in `count` files; empties `params`."""
    weights.save(out, params, step=0, model=dict(model))
    facts = {"files": [found.where] * count, "metadata": found.metadata}
    weights.keep(out, facts | {"dtypes": found.dtypes, "model": model}, {})


def give(arguments) -> None:
    """dlc export vae."""
    facts = record(arguments.dir)
    name, outs = facts["model"]["name"], [Path(out) for out in arguments.out]
    wanted = len(facts["files"])
    if len(outs) != wanted or any(out.suffix != ".safetensors" for out in outs):
        what = "one .safetensors file" if wanted == 1 else "two, the encoder and the decoder"
        raise UserError(f"dlc export vae: --out must be {what}; got {' '.join(map(str, outs))}")
    for out in outs:
        prepare(out, out.parent)
    found = written(arguments.dir)[0]
    halves = tiny_names.HALVES if name == "tiny" else ("",)
    for out, half in zip(outs, halves, strict=True):
        start = f"{half}." if half else ""
        part = {
            key.removeprefix(start): array for key, array in found.items() if key.startswith(start)
        }
        files.save(out, part, facts["metadata"])
        print(f"wrote {out}: {len(part)} tensors")


def written(folder: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str], dict]:
    """(tensors as they came, metadata, `model` section) of what dlc import vae made.

    Raises:
      UserError: it did not make this folder.
    """
    from dlc_jax import checkpoint

    facts, folder = record(folder), Path(folder)
    name, abstract = facts["model"]["name"], _abstract(_network(facts["model"]))
    params = checkpoint.load_params(folder / "checkpoints", abstract)
    params = {path: np.asarray(array) for path, array in slots.flat(params).items()}
    found = tensors(params, NAMES[name].table(slots.shapes_of(params)), str(folder))
    clean = vae_names.clean if name == "kl" else str
    found = {
        given: found[clean(given)].astype(weights.dtype(dtype), copy=False)
        for given, dtype in facts["dtypes"].items()
    }
    return found, facts["metadata"], facts["model"]


def record(folder: str | Path) -> dict:
    """What dlc import vae wrote down in a folder.

    Raises:
      UserError: it did not make this folder.
    """
    facts = weights.record(Path(folder))
    if facts is None or "model" not in facts:
        raise UserError(
            f"{folder} holds no autoencoder that dlc import vae of this version made; "
            "import it again"
        )
    return facts


def _network(model: Mapping):
    """The module of a `model` section."""
    from dlc_jax.models.autoencoders import AUTOENCODERS

    fields = {key: value for key, value in model.items() if key != "name"}
    if isinstance(fields["channels"], list):  # as JSON has it
        fields["channels"] = tuple(fields["channels"])
    return AUTOENCODERS[model["name"]](**fields)


def _abstract(network) -> dict:
    """Shapes of the parameters."""
    return weights.abstract(network, (1, network.stride, network.stride, 3))
