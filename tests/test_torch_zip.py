"""PyTorch's zips without PyTorch: tensors as they lie there, and nothing that is run."""

import collections
import io
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest

from dlc_jax.errors import UserError
from dlc_jax.interop import files, tiny_names


def rebuilt(*arguments):
    """Stands for PyTorch's function of a module that is not installed here."""


class HalfStorage:
    pass


class Stored:
    """What a tensor is pickled as."""

    def __init__(self, key, *place, function=rebuilt):
        self.key, self.place, self.function = key, place, function

    def __reduce__(self):
        return self.function, (Key(self.key), *self.place, False, collections.OrderedDict())


class Key(str):
    pass


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return ("storage", HalfStorage, str(value), "cpu", 0) if type(value) is Key else None


def sparse(*arguments):
    """Likewise, of one that nothing else can make."""


STANDS_FOR = {
    rebuilt: ("torch._utils", "_rebuild_tensor_v2"),
    sparse: ("torch._utils", "_rebuild_sparse_tensor"),
    HalfStorage: ("torch", "HalfStorage"),
}
for _ours, _names in STANDS_FOR.items():
    _ours.__module__, _ours.__qualname__ = _names


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(what, {key: array}) -> path of a zip as torch.save writes it, which is then absent."""
    monkeypatch.setitem(sys.modules, "torch", None)

    def written(what, storages, compression=zipfile.ZIP_STORED):
        buffer = io.BytesIO()
        with monkeypatch.context() as patch:
            for name in ("torch", "torch._utils"):
                patch.setitem(sys.modules, name, types.ModuleType(name))
            for ours, (module, name) in STANDS_FOR.items():
                setattr(sys.modules[module], name, ours)
            Pickler(buffer, protocol=2).dump(what)
        with zipfile.ZipFile(tmp_path / "x.pth", "w", compression) as archive:
            archive.writestr("x/data.pkl", buffer.getvalue())
            archive.writestr("x/byteorder", "little")
            for key, array in storages.items():
                archive.writestr(f"x/data/{key}", array.tobytes())
        return tmp_path / "x.pth"

    return written


ENTRIES = np.arange(24, dtype=np.float16)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_parts_of_storages_and_turned_ones(write, compression):
    state = {
        "whole": Stored("0", 0, (4, 6), (6, 1)),
        "turned": Stored("0", 0, (6, 4), (1, 6)),
        "part": Stored("0", 8, (2, 3), (6, 1)),
        "number": Stored("1", 0, (), ()),
        "nothing": Stored("1", 0, (0, 3), (3, 1)),
    }
    path = write({"state_dict": state, "best": 0.9}, {"0": ENTRIES, "1": ENTRIES[7:8]}, compression)
    found, table = files.load(path), ENTRIES.reshape(4, 6)
    want = {"whole": table, "turned": table.T, "part": table[1:3, 2:5], "number": np.float16(7)}
    want["nothing"] = np.zeros((0, 3), np.float16)
    assert found.shapes == {name: array.shape for name, array in want.items()}
    for name, array in want.items():
        assert found.read(name).dtype == np.float16
        np.testing.assert_array_equal(found.read(name), array)


@pytest.mark.parametrize(
    "place", [(20, (2, 6), (6, 1)), (0, (4, 6), (7, 1)), (-3, (2,), (1,)), (0, (3,), (-1,))]
)
def test_a_tensor_that_leaves_its_storage_is_refused(write, place):
    path = write({"x": Stored("0", *place)}, {"0": ENTRIES})
    with pytest.raises(UserError, match="x.pth is damaged"):
        files.load(path).read("x")


def test_damage_is_seen(write):
    path = write({"x": Stored("0", 0, (24,), (1,))}, {"0": ENTRIES})
    whole = path.read_bytes()
    assert (files.load(path).read("x") == ENTRIES).all()
    for at in (whole.index(ENTRIES.tobytes()) + 9, whole.index(b"storage")):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(UserError, match="x.pth is damaged"):
            files.load(path).read("x")
    for kept in (4, 100, len(whole) - 30):
        path.write_bytes(whole[:kept])
        with pytest.raises(UserError, match="x.pth is damaged"):
            files.load(path)


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "evil", [Evil(print, "run"), Evil(getattr, dict, "get"), Evil(eval, "print('run')")]
)
def test_a_pickle_of_more_than_tensors_is_refused_and_not_run(evil, write, capsys):
    for what in (evil, {"x": Stored("0", 0, (24,), (1,)), "y": evil}):
        with pytest.raises(UserError, match="pickle of more than tensors"):
            files.load(write(what, {"0": ENTRIES}))
    assert "run" not in capsys.readouterr().out


def test_what_only_pytorch_has_is_named_when_it_is_read(write):
    state = {
        "x": Stored("0", 0, (24,), (1,)),
        "odd": Stored("0", 0, (24,), (1,), function=sparse),
    }
    found = files.load(write(state, {"0": ENTRIES}))
    assert (found.read("x") == ENTRIES).all()
    said = "odd is of a type that is not read here .*_rebuild_sparse_tensor.; convert it"
    with pytest.raises(UserError, match=said):
        found.read("odd")


def test_real_files_without_pytorch(shared_data, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    folder = shared_data / "weights"
    found = tiny_names.both([folder / f"taef2_{half}.pth" for half in tiny_names.HALVES])
    assert len(found.shapes) == 158
    tensor = found.read("encoder.11.pool.0.weight")
    assert tensor.dtype == np.float16 and tensor.shape == (256, 64, 1, 1) and tensor.std() > 0.01
