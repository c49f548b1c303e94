"""Files of tensors: safetensors, whole or in shards, and PyTorch's own.

Only those that PyTorch wrote before it wrote zips (1.6) need PyTorch. A pickle that holds more than
tensors is never run.
"""

import json
import os
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from dlc_jax.errors import UserError
from dlc_jax.interop import torch_zip

TORCH = (".pth", ".pt", ".bin", ".th")
INDEX = ".safetensors.index.json"  # of a model in shards: {"weight_map": {name: file}}
NAMES = ("model", "diffusion_pytorch_model", "pytorch_model")  # of the file in a folder


class Tensors(NamedTuple):
    """What a file holds.

    Attributes:
      shapes: {name: shape}.
      read: (name) -> the tensor; bfloat16 is that of ml_dtypes.
      metadata: text by name, that safetensors may have.
    """

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    metadata: Mapping[str, str]


def state(found: Any) -> Any:
    """The dict of a model in what a file of PyTorch holds.

    {"teacher": {name: tensor}} as DINOv2 writes it counts as its teacher, and {"state_dict": {name:
    tensor}} as training scripts write it as that.
    """
    for part in ("teacher", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(part), dict):
            found = found[part]
    return found


def inside(path: str | Path) -> Path:
    """The file of tensors in a folder, as transformers and diffusers name it; or the path itself.

    Safetensors come before shards of them, and those before PyTorch's own file.
    """
    path = Path(path)
    names = [f"{name}{end}" for end in (".safetensors", INDEX, ".bin") for name in NAMES]
    return next((path / name for name in names if (path / name).is_file()), path)


def load(path: str | Path, pick: Callable[[Any], Any] = state) -> Tensors:
    """A file's tensors, none of them read yet, if it is not one that PyTorch must read.

    Args:
      pick: (what a file of PyTorch holds) -> {name: tensor} in it.

    Raises:
      UserError: no such file, damaged, of another kind, in need of PyTorch where it is absent, or a
        pickle of more than tensors; shards that are missing or do not fit their index.
    """
    path = inside(path)
    if not path.is_file():
        what = "is a folder; give the file of tensors in it" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {what}")
    if path.name.endswith(INDEX):
        return _shards(path)
    if path.suffix not in (".safetensors", *TORCH):
        raise UserError(f"{path} is neither .safetensors nor one of {', '.join(TORCH)}")
    found = _safetensors(path) if path.suffix == ".safetensors" else _torch(path, pick)
    if odd := [name for name in found.shapes if not name.isprintable()]:
        raise UserError(
            f"{path} has tensors of unprintable names ({odd[0][:80]!r}, …); "
            "these are not weights that are known here"
        )
    return found


def _safetensors(path: Path) -> Tensors:
    try:
        file = safetensors.safe_open(path, framework="numpy")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is damaged, or not a safetensors file ({_first(error)}); fetch it again"
        ) from error
    # what a type that numpy lacks may raise
    lacking = (AttributeError, KeyError, TypeError, ValueError, safetensors.SafetensorError)

    def read(name):
        try:
            return file.get_tensor(name)
        except lacking as error:
            raise _untyped(path, name, error) from error

    return Tensors(shapes, read, dict(file.metadata() or {}))


def _shards(path: Path) -> Tensors:
    """The tensors of all files that an index names."""
    try:
        index = json.loads(path.read_text())["weight_map"]
        names = sorted(set(index.values()))
        plain = all(Path(name).name == name and name.endswith(".safetensors") for name in names)
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        index, plain = {}, False
    if not index or not plain:
        raise UserError(f"{path} is not an index of shards ({{weight_map: {{name: file}}}})")
    if missing := [name for name in names if not (path.parent / name).is_file()]:
        more = ", …" if len(missing) > 3 else ""
        raise UserError(
            f"{path}: {len(missing)} of {len(names)} shards are missing "
            f"({', '.join(missing[:3])}{more}); fetch them too"
        )
    parts = {name: load(path.parent / name) for name in names}
    shapes: dict[str, tuple[int, ...]] = {}
    for shard, part in parts.items():
        for name, shape in part.shapes.items():
            if (known := index.get(name)) != shard:
                said = f"in {known} by the index" if known else "not in the index"
                raise UserError(
                    f"{path.parent / shard}: {name} is {said}, yet it is in this file; "
                    "shards of two models are mixed: fetch them again"
                )
            shapes[name] = shape
    if lacking := [name for name in index if name not in shapes]:
        raise UserError(
            f"{path}: {lacking[0]} is not in {index[lacking[0]]}, where the index has it; "
            "fetch the shards again"
        )
    return Tensors(shapes, lambda name: parts[index[name]].read(name), parts[names[0]].metadata)


def _torch(path: Path, pick: Callable[[Any], Any]) -> Tensors:
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    try:
        found, array = torch_zip.read(path) if zipped else _legacy(path)
    except pickle.UnpicklingError as error:
        if zipped and not isinstance(error, torch_zip.Refused):
            raise _damaged(path, error) from error
        raise UserError(
            f"{path} is a pickle of more than tensors, which could run anything; "
            "convert it to safetensors"
        ) from error
    except UserError:
        raise
    except Exception as error:  # whatever a damaged archive brings about
        raise _damaged(path, error) from error
    found = pick(found)
    items = found.items() if isinstance(found, dict) else [(None, None)]
    if not all(isinstance(key, str) and hasattr(value, "shape") for key, value in items):
        names = ", ".join(map(ascii, list(found)[:5])) if isinstance(found, dict) else ""
        raise UserError(
            f'{path} is neither a dict of tensors nor {{"teacher": one}}'
            f"{'; it has ' if names else ''}{names}; save the dict of the model alone"
        )

    def read(name):
        try:
            return array(found[name])
        except (RuntimeError, TypeError, AttributeError) as error:  # sparse, without data
            raise _untyped(path, name, error) from error
        except Exception as error:
            raise _damaged(path, error) from error

    return Tensors({name: tuple(tensor.shape) for name, tensor in items}, read, {})


def _legacy(path: Path):
    """As `torch_zip.read`, of what PyTorch wrote before it wrote zips: PyTorch reads it."""
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} needs PyTorch to be read: install dlc_jax[torch], or convert it to safetensors"
        ) from None

    def array(tensor):
        tensor = tensor.detach().contiguous()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    with warnings.catch_warnings(action="ignore"):
        return torch.load(path, map_location="cpu", weights_only=True), array


def save(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes safetensors, the whole file or none of it.

    Raises:
      UserError: it cannot be written.
    """
    # Memory is written as it lies, so a transposed view would silently come out wrong.
    contiguous = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        safetensors_numpy.save_file(contiguous, partial, dict(metadata) if metadata else None)
        partial.chmod(mode)  # it makes a file for its owner alone
        os.replace(partial, path)
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or _first(error)
        raise UserError(f"cannot write {path}: {reason}; make room") from error


def _untyped(path: Path, name: str, error: Exception) -> UserError:
    return UserError(
        f"{path}: {name} is of a type that is not read here ({_first(error)}); "
        "convert it to float32"
    )


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} is damaged, or not a file of PyTorch ({_first(error)}); fetch it again"
    )


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
