"""What a code store says of itself: the manifest beside its shards."""

import json
import pathlib
from typing import NamedTuple

import ml_dtypes  # noqa: F401  makes "bfloat16" a NumPy type
import numpy as np

from dlc_jax import remote
from dlc_jax.errors import UserError

FORMAT = 1


def code_dtype(values: int) -> str:
    """The smallest unsigned type for codes in [0, values): "uint8" or "uint16"."""
    if not 1 <= values <= 2**16:
        raise UserError(f"codes of {values} values cannot be stored; use 1 to 65536")
    return "uint8" if values <= 2**8 else "uint16"


def record_dtype(manifest: dict) -> np.dtype:
    """NumPy type of the record that a manifest describes: `codes`, then the fields by name."""
    fields = [("codes", manifest["dtype"], (manifest["positions"],))]
    fields += [
        (name, np.dtype(dtype), tuple(shape))
        for name, (dtype, shape) in sorted(manifest["fields"].items())
    ]
    return np.dtype(fields)


class Facts(NamedTuple):
    """What a store says of itself, without its records."""

    directory: pathlib.Path
    manifest: dict


def facts(directory: str | pathlib.Path) -> Facts:
    """A store's manifest; of an object store nothing else is fetched.

    Raises:
      UserError: see `read_manifest`.
    """
    remote.fetch(directory)
    return Facts(pathlib.Path(directory), read_manifest(directory))


def read_manifest(directory: str | pathlib.Path) -> dict:
    """The manifest of a complete store.

    Raises:
      UserError: it is missing, damaged or of another format.
    """
    path = pathlib.Path(directory) / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] != FORMAT:
            raise UserError(
                f"code store {directory} has format {manifest['format']}, not {FORMAT}; export "
                "again"
            )
        record_dtype(manifest), manifest["shards"], manifest["shard_size"]
        return manifest
    except FileNotFoundError:
        raise UserError(
            f"no complete code store in {directory} (no manifest.json); run the codes step"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read code store {directory}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"damaged code store: {path} is not a manifest; export again") from error
