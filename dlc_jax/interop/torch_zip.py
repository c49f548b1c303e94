"""PyTorch's own files without PyTorch: a zip of a pickle that names tensors, and of their bytes.

The pickle may make dicts, lists and tensors. Whatever else it asks for is refused and never run;
what only PyTorch has, such as sparse tensors, becomes an `Odd`.
"""

import collections
import functools
import math
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from dlc_jax.errors import UserError

DTYPES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_KINDS = {np.dtype(dtype): kind for kind, dtype in DTYPES.items()}


class Refused(pickle.UnpicklingError):
    """A pickle that asks for more than tensors."""


class Storage(NamedTuple):
    """A member of the archive: its key, and the name of its type."""

    key: str
    kind: str


class Tensor(NamedTuple):
    """A part of a storage; offset and stride count entries."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Odd:
    """What PyTorch would make here and nothing else can; it remembers only its name."""

    shape = ()

    def __init__(self, name: str):
        self.name = name

    def __call__(self, *_):
        return self

    def __setstate__(self, _):
        pass


def read(path: Path) -> tuple[Any, Any]:
    """(what the pickle holds, (Tensor) -> array); no tensor is read yet.

    Raises:
      Refused: a pickle of more than tensors.
      UserError: bytes in the other order.
      Exception: whatever a damaged archive brings about, here and when a tensor is read.
    """
    archive = zipfile.ZipFile(path)
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"an archive with {len(pickles)} data.pkl")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") == b"big":
        raise UserError(f"{path} was written by a big-endian machine; convert it to safetensors")
    with archive.open(pickles[0]) as file:
        found = _Unpickler(file).load()

    @functools.lru_cache(maxsize=1)  # tensors may share one
    def storage(key):
        return archive.read(f"{folder}data/{key}")  # its checksum is compared

    def tensor(found: Tensor) -> np.ndarray:
        if isinstance(found, Odd):
            raise TypeError(found.name)
        dtype = np.dtype(DTYPES[found.storage.kind])
        strides = [dtype.itemsize * step for step in found.stride]
        place = {"offset": dtype.itemsize * found.offset, "strides": strides}
        return np.ndarray(found.shape, dtype, storage(found.storage.key), **place)

    return found, tensor


def write(path: Path, tree: Any) -> None:
    """Writes dicts, lists, plain values and arrays as `torch.load` reads them: arrays are tensors.

    Raises:
      KeyError: an array of a type that PyTorch lacks.
      OSError: it cannot be written.
    """
    arrays: list[np.ndarray] = []

    def global_(module, name):
        return f"c{module}\n{name}\n".encode()

    def plain(value):
        return pickle.dumps(value, 2)[2:-1]  # without the protocol before and the stop after it

    def opcodes(value):
        if isinstance(value, dict):
            items = b"".join(plain(key) + opcodes(each) for key, each in value.items())
            return b"}(" + items + b"u"
        if isinstance(value, list):
            return b"](" + b"".join(map(opcodes, value)) + b"e"
        if not isinstance(value, np.ndarray):
            return plain(value)
        key, shape = str(len(arrays)), value.shape
        arrays.append(value)
        place = plain(key) + plain("cpu") + plain(value.size)
        storage = b"(" + plain("storage") + global_("torch", _KINDS[value.dtype]) + place + b"tQ"
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        hooks = global_("collections", "OrderedDict") + b")R"
        rest = plain(0) + plain(shape) + plain(strides) + plain(False) + hooks
        return global_("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + rest + b"tR"

    data = b"\x80\x02" + opcodes(tree) + b"."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", sys.byteorder)
        for key, array in enumerate(arrays):
            archive.writestr(f"archive/data/{key}", array.tobytes())
        archive.writestr("archive/version", "3\n")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module == "torch" and name.endswith("Storage"):
            return name
        if module.split(".")[0] == "torch":
            return Odd(f"{module}.{name}")
        raise Refused(f"{module}.{name}")

    def persistent_load(self, pid):
        match pid:
            case ("storage", str(kind), str(key), *_) if kind in DTYPES and key.isalnum():
                return Storage(key, kind)
            case ("storage", kind, *_):
                return Odd(kind if isinstance(kind, str) else getattr(kind, "name", "storage"))
        raise pickle.UnpicklingError("a persistent id that is no storage")


def _tensor(storage, offset, size, stride, *_):
    """Of `torch._utils._rebuild_tensor_v2`."""
    return storage if isinstance(storage, Odd) else Tensor(storage, offset, size, stride)


_KNOWN = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch", "Size"): tuple,
}
