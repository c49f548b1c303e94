"""What import and export share: shapes of parameters, and files beside an imported encoder."""

from pathlib import Path

from dlc_jax.errors import UserError
from dlc_jax.interop import slots

STEP = "encoder"  # of a recipe: an encoder is taken from it or put in it
# beside the checkpoints of an imported encoder
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
