"""dlc export torch -w W --out DIR: a run as a folder that PyTorch loads without dlc_jax or jax."""

import json
import shutil
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from dlc_jax import recipe
from dlc_jax import workdir as home
from dlc_jax.cli import weights
from dlc_jax.cli.torch_parts import Part, Source, make
from dlc_jax.composition import groups
from dlc_jax.errors import UserError
from dlc_jax.interop import files, hub_card, hub_names, slots
from dlc_jax.interop.weights import DTYPES

EXPORT = "dlc export torch -w runs/imagenet256 --out exported"
STEPS = ("encoder", "prior", "generator", "autoencoder")
HUB = Path(hub_card.__file__).with_name("hub")  # PyTorch's code, which nothing here imports


def give_flags(action) -> None:
    action.add_argument(
        "--steps", metavar="A,B,…", help=f"of {','.join(STEPS)}; all that the run has"
    )
    action.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of the weights; float32, as they were saved",
    )
    action.add_argument(
        "--license", default="", metavar="NAME", help="of the weights, for the model card"
    )
    action.add_argument(
        "--no-code",
        action="store_true",
        help="leave PyTorch's code out, as of the demo, whose package has it",
    )
    action.add_argument(
        "--plain-samplers",
        action="store_true",
        help="where PyTorch's code lacks a sampler of the recipe, take the plain one",
    )


def give(arguments) -> None:
    """dlc export torch."""
    out, config = weights.absent(arguments.out), recipe.of_run(arguments.workdir)
    names = _names(config, arguments.workdir, arguments.steps)
    source = Source(
        config, Path(arguments.workdir), _params, arguments.dtype, arguments.plain_samplers
    )
    with weights.whole(out) as place:
        sizes = {}
        for part, step in names.items():
            sizes[part] = write(place / part, make(source, part, step), arguments.dtype)
        results = home.read(Path(arguments.workdir) / "results.json") or {}
        commit = str(results.get("commit") or home.commit() or "an unknown commit")
        data = {key: config.data[key] for key in ("name", "image") if key in config.data}
        code = () if arguments.no_code else tuple(hub_card.CODE)
        card = hub_card.text(sizes, data, results, commit, arguments.license, code)
        (place / "model_card.md").write_text(card)
        for name in code:
            shutil.copyfile(HUB / name, place / name)
        known = {"architectures": ["DLCPipeline"], "commit": commit, "data": data}
        known |= {"trained": _trained(config, arguments.workdir, names)}
        _json(place / "config.json", known)
        home.write(place / home.RUN, home.portable(_renamed(config.to_dict(), names)))
        if (Path(arguments.workdir) / groups.FILE).is_file():
            shutil.copyfile(Path(arguments.workdir) / groups.FILE, place / groups.FILE)
        index = {"_class_name": ["pipeline", "DLC"], "_diffusers_version": "0.31.0"}
        _json(place / "model_index.json", index)
    for part, size in sizes.items():
        print(f"{out / part}: {size}")
    if "encoder" in names and (own := recipe.codes_dtype(config, names["encoder"])) != "float32":
        print(f"the run's codes were computed in {own or 'the dtype of training'}, here in float32")
    print(
        f"wrote {out}: all tensors were read back, without what only training reads; "
        "how to load it is in model_card.md"
    )


def _names(config: ConfigDict, workdir: str, asked: str | None) -> dict[str, str]:
    """{part: step or section} of what is exported.

    Raises:
      UserError: an unknown part, one that the run lacks, or that is not complete.
    """
    samples = config.samples if "samples" in config else {}
    steps = {part: samples[part] if part in samples else part for part in STEPS[:3]}
    found = {part: step for part, step in steps.items() if step in config}
    if "generator" in found and (section := recipe.autoencoder(config, found["generator"])):
        found["autoencoder"] = section
    parts = list(found) if asked is None else asked.split(",")
    for part in parts:
        if part not in STEPS:
            raise UserError(f"dlc export torch: --steps={part} is none of {', '.join(STEPS)}")
        if part not in found:
            there = ", ".join(found)
            raise UserError(f"{workdir} is a run whose recipe has no {part}; it has {there}")
        if part == "autoencoder":
            continue
        step = found[part]
        directory = recipe.trained(config, workdir, step)
        done, own = home.done(directory), directory == Path(workdir) / step
        if done is None or own and done["steps"] < config[step].train.steps:
            raise UserError(
                f"step {step!r} of {workdir} is not complete; train it to its end, or leave it out "
                "with --steps"
            )
    if not parts:
        raise UserError(f"{workdir} is a run whose recipe has none of {', '.join(STEPS)}")
    return {part: found[part] for part in STEPS if part in parts}


def _trained(config: ConfigDict, workdir: str, names: dict[str, str]) -> dict[str, dict]:
    """{part: its step, and for how many steps that was trained here} of those that are steps."""
    found: dict[str, dict] = {}
    for part, step in names.items():
        if part != "autoencoder":
            directory = recipe.trained(config, workdir, step)
            imported = weights.record(directory) is not None
            steps = {} if imported else {"steps": home.done(directory)["steps"]}
            found[part] = {"step": step, **steps}
    return found


def _renamed(config: dict, names: dict[str, str]) -> dict:
    """A run's config whose steps have the names of the folder's parts.

    A part's teacher is not in the folder, so none is named.
    """
    for part, step in names.items():
        if part == step or part == "autoencoder":
            continue
        config[part] = config.pop(step)
        if "teacher" in config[part]:
            config[part]["teacher"] = ""
        for section in config.values():
            if isinstance(section, dict) and "stage" in section:
                section |= {name: part for name, value in section.items() if value == step}
    return config


def _params(network) -> dict[str, np.ndarray]:
    """{path: float32 array} of a step's average, or of an autoencoder."""
    from dlc_jax import checkpoint
    from dlc_jax.networks.network import Network

    params = network.params if not isinstance(network, Network) else None
    if params is None:
        directory = recipe.trained(network.config, network.workdir, network.step)
        params = checkpoint.load_params(directory / "checkpoints", network.shapes)
    return {path: np.asarray(array) for path, array in slots.flat(params).items()}


def write(place: Path, part: Part, dtype: str) -> str:
    """Writes a part, reads it back and compares; its size in words."""
    params = {
        path: array.astype(weights.dtype(dtype), copy=False) for path, array in part.params.items()
    }
    constants = {
        name: array.astype(weights.dtype(dtype), copy=False)
        for name, array in part.constants.items()
    }
    place.mkdir()
    _json(place / "config.json", part.config)
    tensors = {name: slot.get(params[slot.path]) for name, slot in part.table.items()}
    path = place / part.file
    files.save(path, tensors | constants, {"format": "pt"})
    found = hub_names.read(path, part.table, slots.shapes_of(slots.nested(params)), constants)
    hub_names.check(found, params, path)
    size = sum(array.nbytes for array in params.values())
    return f"{weights.count(params)} of {dtype}, {size / 1e6:.1f} MB"


def _json(path: Path, found: dict) -> None:
    path.write_text(f"{json.dumps(found, indent=2)}\n")
