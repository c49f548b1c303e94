"""What import and export share: shapes of parameters, checkpoints, and files beside them."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from ml_collections import ConfigDict

from dlc_jax import recipe
from dlc_jax import workdir as home
from dlc_jax.cli.networks import prepare, writing
from dlc_jax.errors import UserError
from dlc_jax.interop import files, slots
from dlc_jax.interop.weights import Weights

STEP = "encoder"  # of a recipe: an encoder is taken from it or put in it
# beside the checkpoints of what was imported
RECORD = "imported.json"  # the file it came from, its metadata, names and dtypes
ASIDE = "aside.safetensors"  # tensors of the file that nothing here reads


def abstract(model, *arguments: tuple[int, ...]) -> dict:
    """A model's parameters as nested shapes, from the shapes of its inputs."""
    import jax
    import jax.numpy as jnp

    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in arguments]
    return jax.eval_shape(lambda *inputs: model.init(jax.random.key(0), *inputs)["params"], *inputs)


def shapes(model, *arguments: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """{path: shape} of a model's parameters."""
    return slots.shapes_of(abstract(model, *arguments))


def absent(path: str | Path) -> Path:
    """The path of a folder, if it does not exist or is empty.

    Raises:
      UserError: it is there.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} is there already; move it away, or give another --out")
    return path


def save(directory: Path, params: dict[str, np.ndarray], *, step: int, model: dict) -> None:
    """Writes a checkpoint of an average alone: the part that is loaded, and started from.

    Empties `params`: they are freed once copied, since writing needs as much again.
    """
    from dlc_jax.checkpoint import Checkpoints

    tree = slots.nested(params)
    params.clear()
    checkpoints = Checkpoints(directory / "checkpoints")
    checkpoints.save(step, {"ema": tree}, None, {"identity": {"model": model}})
    del tree
    checkpoints.close()


@contextlib.contextmanager
def run(out: Path, config: ConfigDict) -> Iterator[None]:
    """Holds the folder of a run of this config, new or there already, while steps are put in it.

    Raises:
      UserError: it cannot be written, is in use, or is a run of another config.
    """
    prepare(out, out)
    with home.lock(out):
        home.remember(out, config.to_dict(), present=recipe.read_back)
        yield


def step(
    directory: Path,
    params: dict[str, np.ndarray],
    section: ConfigDict,
    *,
    facts: Mapping,
    aside: Mapping[str, np.ndarray],
) -> None:
    """Writes a step of a run as if it had been trained to its end; empties `params`.

    Args:
      section: of the step.
      facts: what `record` gives back.
      aside: tensors of the file that nothing here reads.
    """
    steps = section.train.steps
    save(directory, params, step=steps, model=section.model.to_dict())
    keep(directory, facts, aside)
    home.mark_done(directory, {"steps": steps, "after": {}, "settings": {}})


def keep(directory: Path, facts: Mapping, aside: Mapping[str, np.ndarray]) -> None:
    """Writes down where parameters came from, and what else was there."""
    if aside:
        files.save(directory / ASIDE, aside)
    home.write(directory / RECORD, facts)


def sizes(config: ConfigDict, positions: int, values: int) -> dict[str, int]:
    """{field: number} of codes of these sizes in all steps that read or make some."""
    changes = {}
    for name, section in config.items():
        if not isinstance(section, ConfigDict) or "model" not in section:
            continue
        if "positions" in section.model and section.model.positions:
            changes |= {f"{name}.model.positions": positions, f"{name}.model.values": values}
        if "simplicial" in section.model:
            inner = f"{name}.model.simplicial"
            changes |= {f"{inner}.positions": positions, f"{inner}.values": values}
    return changes


def check_complete(config: ConfigDict, workdir: Path, name: str) -> None:
    """Refuses a step of a run that is not there, or not trained to its end.

    Raises:
      UserError: see above.
    """
    if name not in config:
        raise UserError(f"{workdir} is a run whose recipe has no step {name!r}")
    directory = recipe.trained(config, workdir, name)
    if home.done(directory) is None:
        raise UserError(
            f"{directory} is not complete, and half a training is not exported; finish it by dlc "
            f"train --config={workdir}/config.json"
        )


@contextlib.contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A folder to write in that becomes `out` at the end, or is removed if anything fails.

    Raises:
      UserError: it cannot be written.
    """
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    prepare(partial, partial)
    try:
        yield partial
        with writing(out):
            os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def made(folder: Path) -> Path:
    """The folder, which is made."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def told(found: Weights, aside: Mapping[str, np.ndarray]) -> str:
    """How many tensors of a file became what, in words."""
    text = f"{len(found.shapes)} tensors, {len(found.shapes) - len(aside)} of them parameters"
    if not aside:
        return text
    shown = [*aside][: slots.LISTED]
    more = ", …" if len(aside) > len(shown) else ""
    return f"{text}; {len(aside)} kept aside, since nothing reads them: {', '.join(shown)}{more}"


def settings(path: Path) -> dict:
    """A JSON file of settings such as transformers and diffusers write, or {} if there is none.

    Raises:
      UserError: it is damaged.
    """
    try:
        found = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); move it away, or mend it") from error
    return found if isinstance(found, dict) else {}


def number(settings: Mapping, name: str) -> int | None:
    """A whole number above 0 in such settings, if it is there."""
    value = settings.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def record(directory: Path) -> dict | None:
    """What import wrote down, or None of an encoder that was trained here."""
    path = directory / RECORD
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); put a copy back, or import it again"
        ) from error


def count(params: dict[str, np.ndarray]) -> str:
    """The number of parameters, in words."""
    return f"{sum(array.size for array in params.values()):,} parameters"


def dtype(name: str) -> np.dtype:
    """NumPy's type of a name that `Weights.dtypes` has."""
    return ml_dtypes.bfloat16 if name == "bfloat16" else np.dtype(name)
