"""What import and export share: shapes of parameters, checkpoints, and files beside them."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np

from dlc_jax.errors import UserError
from dlc_jax.interop import slots

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
