"""dlc import sedd FILE --out DIR, dlc export sedd W --out FILE: priors in the files of others."""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from dlc_jax import command, recipe
from dlc_jax.cli import weights
from dlc_jax.cli.networks import prepare, whole, writing
from dlc_jax.errors import UserError
from dlc_jax.interop import files, sedd_names, slots, torch_zip
from dlc_jax.interop.weights import Weights, tensors
from dlc_jax.recipe.lines import flat

IMPORT = "dlc import sedd model.safetensors --out runs/published"
EXPORT = "dlc export sedd runs/imagenet256 --out sedd.safetensors"
STEP = "prior"  # of a recipe: it is taken from it or put in it
# what SEDD was trained as
PROCESS = {"process.name": "masked", "process.objective": "score"}
PROCESS |= {"process.noise.schedule": "log_linear"}
SUFFIX = {"hf": ".safetensors", "local": ".pth"}


def take_flags(parser) -> None:
    """Flags of dlc import sedd beside the file."""
    parser.add_argument(
        "--heads", type=whole, metavar="H", help="of attention, where nothing in the file tells it"
    )
    parser.add_argument(
        "--config",
        default="configs/imagenet256.py",
        metavar="FILE",
        help="recipe of the run, whose prior takes what is found; configs/imagenet256.py, or that "
        "of DIR if it is a run. --config.NAME=VALUE sets a field",
    )


def give_flags(parser) -> None:
    """Flags of dlc export sedd beside the file."""
    parser.add_argument(
        "--layout",
        choices=sedd_names.LAYOUTS,
        help="hf: the average by name, .safetensors; local: what SEDD's training writes, .pth; "
        "that of the imported file, or hf",
    )


def take(arguments, rest) -> None:
    """dlc import sedd."""
    found, lines = read(arguments.file, arguments.heads)
    out = Path(arguments.out)
    directory = weights.absent(out / STEP)
    if (out / "config.json").exists():
        if rest:
            raise UserError(f"{out} is a run already, whose recipe {rest[0]} cannot change")
        config = recipe.of_run(out)
    else:
        config, _ = command.parse([*command.given(arguments), *rest])
    config = fitted(config, lines)
    arrays, aside = params(found, config)
    said = described(arrays, lines)
    with weights.run(out, config):
        put(found, config, directory, arrays, aside)
    print(f"wrote {out}: {said}\n{found.where}: {weights.told(found, aside)}\nto start from it:")
    lines["train.init_from"] = str(directory)
    print(shlex.join(f"--config.{STEP}.{key}={value}" for key, value in lines.items()))


def read(path: str | Path, heads: int | None = None) -> tuple[Weights, dict]:
    """(a prior's file or folder, opened; {field: value} of the step of it).

    Raises:
      UserError: see `sedd_names.section`.
    """
    found = Weights(files.inside(path), sedd_names.clean, sedd_names.load)
    model = sedd_names.section(found.shapes, found.where, heads or found.number("heads"))
    return found, flat({"model": model}) | PROCESS


def described(params: Mapping[str, np.ndarray], lines: Mapping) -> str:
    """The size of a prior, in words."""
    model = {
        key.removeprefix("model."): value
        for key, value in lines.items()
        if key.startswith("model.")
    }
    return ", ".join([weights.count(params), *(f"{key} {value}" for key, value in model.items())])


def params(found: Weights, config: ConfigDict) -> tuple[dict, dict]:
    """({path: array} of the recipe's prior, {name: array} of the file that is not read).

    Raises:
      UserError: see `Weights.params`; another rotation of positions.
    """
    network, name = _built(config), sedd_names.BUFFER
    raw = [key for key in found.shapes if key.startswith(sedd_names.RAW)]
    aside = {found.names[key]: found.read(key) for key in raw}
    if name in found.shapes:
        aside[found.names[name]] = found.read(name)
        head = network.width // network.heads
        sedd_names.check_buffer(aside[found.names[name]], head, found.where)
    shapes = slots.shapes_of(abstract(network))
    return found.params(sedd_names.table(shapes), shapes, unused=[*raw, name]), aside


def put(
    found: Weights,
    config: ConfigDict,
    directory: Path,
    params: dict[str, np.ndarray],
    aside: Mapping[str, np.ndarray],
) -> None:
    """Writes the prior's step of a run, of what `params` gave; empties `params`."""
    raw = any(name.startswith(sedd_names.RAW) for name in found.shapes)
    facts = {"file": found.where, "metadata": found.metadata, "aside": list(aside)}
    facts["layout"] = "local" if raw else "hf"
    # in the order of the file, which JSON keeps of lists alone
    facts["average"] = [
        (given, found.dtypes[given]) for given in found.names.values() if given not in aside
    ]
    weights.step(directory, params, config[STEP], facts=facts, aside=aside)


def give(arguments) -> None:
    """dlc export sedd."""
    count, layout = write(arguments.workdir, Path(arguments.out), arguments.layout)
    print(f"wrote {arguments.out}: {count} tensors, layout {layout}")


def write(workdir: str | Path, out: Path, layout: str | None = None) -> tuple[int, str]:
    """(tensors, layout) of the file that a run's prior becomes, which is written.

    An imported one is as it came in the layout that it came in, which None takes.

    Raises:
      UserError: no prior, one that is not SEDD, or a file of another kind than the layout's.
    """
    config = recipe.of_run(workdir)
    if STEP not in config:
        raise UserError(f"{workdir} is a run whose recipe has no step {STEP!r}")
    process = config[STEP].process
    if process.name != "masked" or process.objective != "score":
        raise UserError(
            f"{workdir}: SEDD's outputs are scores of masked codes, which only a prior "
            "with process.name=masked and process.objective=score gives"
        )
    from dlc_jax import checkpoint

    network, directory = _built(config), recipe.trained(config, workdir, STEP)
    facts = weights.record(directory) or {}
    layout = layout or facts.get("layout", "hf")
    if out.suffix != SUFFIX[layout]:
        raise UserError(f"dlc export sedd: --out={out} is not a {SUFFIX[layout]} file ({layout})")
    shapes = abstract(network)
    rows = sedd_names.table(slots.shapes_of(shapes))
    params = checkpoint.load_params(directory / "checkpoints", shapes)
    params = {path: np.asarray(array) for path, array in slots.flat(params).items()}
    found = tensors(params, rows, str(directory))
    prepare(out, out.parent)
    if facts.get("layout") == layout:
        found, raw, metadata = _as_it_came(found, directory, facts)
    else:
        raw = found | {sedd_names.BUFFER: sedd_names.buffer(network.width // network.heads)}
        numbers = {"decay": "0.9999", "num_updates": "0", "step": "0"}
        metadata = {"format": "pt", "heads": str(network.heads)} if layout == "hf" else numbers
    if layout == "hf":
        files.save(out, raw | found, metadata)
    else:
        partial = out.with_name(f"{out.name}.partial")
        with writing(out):
            torch_zip.write(partial, sedd_names.local(found, raw, metadata))
            os.replace(partial, out)
    return len(raw | found), layout


def _as_it_came(found, directory: Path, facts: dict) -> tuple[dict, dict, dict]:
    """(the average by the file's names and dtypes, what lay beside it, metadata)."""
    average = {
        name: found[sedd_names.clean(name)].astype(weights.dtype(dtype), copy=False)
        for name, dtype in facts["average"]
    }
    kept = files.load(directory / weights.ASIDE) if facts["aside"] else None
    raw = {name.removeprefix(sedd_names.RAW): kept.read(name) for name in facts["aside"]}
    return average, raw, facts["metadata"]


def fitted(config: ConfigDict, lines: dict) -> ConfigDict:
    """The recipe with these fields of its prior, and with the sizes of its codes everywhere.

    Raises:
      UserError: it has no prior.
    """
    if STEP not in config or config[STEP].stage != "prior":
        raise UserError(
            f"dlc import: the recipe has no step {STEP!r} that is a prior; give another --config"
        )
    changes = weights.sizes(config, lines["model.positions"], lines["model.values"])
    changes |= {f"{STEP}.{name}": value for name, value in lines.items()}
    return recipe.changed(config, changes)


def _built(config: ConfigDict):
    from dlc_jax.models.masked_transformer import MaskedTransformer  # and jax

    return recipe.build(MaskedTransformer, config[STEP].model)


def abstract(network) -> dict:
    """Shapes of the parameters."""
    import jax
    import jax.numpy as jnp

    codes = jnp.zeros((1, network.positions), jnp.int32)
    sigma = jnp.zeros((1,)) if network.sigma_conditioning else None
    label = jnp.zeros((1,), jnp.int32) if network.classes else None
    return jax.eval_shape(lambda: network.init(jax.random.key(0), codes, sigma, label)["params"])
