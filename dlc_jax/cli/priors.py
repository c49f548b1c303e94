"""dlc import sedd FILE --out DIR, dlc export sedd W --out FILE: priors in the files of others."""

import os
import shlex
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from dlc_jax import command, recipe
from dlc_jax import workdir as home
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
    found = Weights(arguments.file, sedd_names.clean, sedd_names.load)
    heads = arguments.heads or found.number("heads")
    model = sedd_names.section(found.shapes, found.where, heads)
    out, name = Path(arguments.out), sedd_names.BUFFER
    directory = weights.absent(out / STEP)
    if (out / "config.json").exists():
        if rest:
            raise UserError(f"{out} is a run already, whose recipe {rest[0]} cannot change")
        config = recipe.of_run(out)
    else:
        config, _ = command.parse([*command.given(arguments), *rest])
    lines = flat({"model": model}) | PROCESS
    config = _fitted(config, lines)
    section, network = config[STEP].model, _built(config)
    raw = [key for key in found.shapes if key.startswith(sedd_names.RAW)]
    aside = {found.names[key]: found.read(key) for key in raw}
    if name in found.shapes:
        aside[found.names[name]] = found.read(name)
        head = network.width // network.heads
        sedd_names.check_buffer(aside[found.names[name]], head, found.where)
    shapes = slots.shapes_of(abstract(network))
    params = found.params(sedd_names.table(shapes), shapes, unused=[*raw, name])
    said = ", ".join([weights.count(params), *(f"{key} {value}" for key, value in model.items())])
    steps = config[STEP].train.steps
    facts = {"file": arguments.file, "metadata": found.metadata, "aside": list(aside)}
    facts["layout"] = "local" if raw else "hf"
    # in the order of the file, which JSON keeps of lists alone
    facts["average"] = [
        (given, found.dtypes[given]) for given in found.names.values() if given not in aside
    ]
    prepare(out, out)
    with home.lock(out):
        home.remember(out, config.to_dict(), present=recipe.read_back)
        weights.save(directory, params, step=steps, model=section.to_dict())
        if aside:
            files.save(directory / weights.ASIDE, aside)
        home.write(directory / weights.RECORD, facts)
        home.mark_done(directory, {"steps": steps, "after": {}, "settings": {}})
    print(f"wrote {out}: {said}\nto start from it:")
    lines["train.init_from"] = str(directory)
    print(shlex.join(f"--config.{STEP}.{key}={value}" for key, value in lines.items()))


def give(arguments) -> None:
    """dlc export sedd."""
    config, out = recipe.of_run(arguments.workdir), Path(arguments.out)
    if STEP not in config:
        raise UserError(f"{arguments.workdir} is a run whose recipe has no step {STEP!r}")
    process = config[STEP].process
    if process.name != "masked" or process.objective != "score":
        raise UserError(
            f"{arguments.workdir}: SEDD's outputs are scores of masked codes, which only a prior "
            "with process.name=masked and process.objective=score gives"
        )
    from dlc_jax import checkpoint

    network, directory = _built(config), recipe.trained(config, arguments.workdir, STEP)
    facts = weights.record(directory) or {}
    layout = arguments.layout or facts.get("layout", "hf")
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
    print(f"wrote {out}: {len(raw | found)} tensors, layout {layout}")


def _as_it_came(found, directory: Path, facts: dict) -> tuple[dict, dict, dict]:
    """(the average by the file's names and dtypes, what lay beside it, metadata)."""
    average = {
        name: found[sedd_names.clean(name)].astype(weights.dtype(dtype), copy=False)
        for name, dtype in facts["average"]
    }
    kept = files.load(directory / weights.ASIDE) if facts["aside"] else None
    raw = {name.removeprefix(sedd_names.RAW): kept.read(name) for name in facts["aside"]}
    return average, raw, facts["metadata"]


def _fitted(config: ConfigDict, lines: dict) -> ConfigDict:
    """The recipe with these fields of its prior, and with the sizes of its codes everywhere.

    Raises:
      UserError: it has no prior.
    """
    if STEP not in config or config[STEP].stage != "prior":
        raise UserError(
            f"dlc import sedd: the recipe has no step {STEP!r} that is a prior; "
            "give another --config"
        )
    sizes = {name: lines[f"model.{name}"] for name in ("positions", "values")}
    changes = {f"{STEP}.{name}": value for name, value in lines.items()}
    for step, section in config.items():
        if not isinstance(section, ConfigDict) or "model" not in section:
            continue
        if "positions" in section.model and section.model.positions:
            changes |= {f"{step}.model.{name}": value for name, value in sizes.items()}
        if "simplicial" in section.model:
            changes |= {f"{step}.model.simplicial.{name}": value for name, value in sizes.items()}
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
