"""What import and export share: the parameters of a model before it has any, and what is written down of a file that was imported."""

from pathlib import Path

from dlc_jax.errors import UserError
from dlc_jax.interop import slots

STEP = "encoder"  # of a recipe, that an encoder is taken from or put in
RECORD = "imported.json"  # beside the checkpoints of an imported encoder: the file, its metadata, names and dtypes
ASIDE = "aside.safetensors"  # beside it: the tensors that nothing here reads


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
    """A folder that nothing is in yet."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} is there already; move it away, or give another --out")
    return path
