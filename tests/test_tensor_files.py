"""Files of tensors: safetensors and PyTorch's own; what is damaged or foreign is refused."""

import json
import pickle
import sys

import ml_dtypes
import numpy as np
import pytest
from foreign_weights import official
from safetensors import numpy as safetensors_numpy

from dlc_jax.errors import UserError
from dlc_jax.interop import files


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(tmp_path, kept):
    files.save(tmp_path / "state.safetensors", official())
    whole = (tmp_path / "state.safetensors").read_bytes()
    (tmp_path / "state.safetensors").write_bytes(whole[:kept])
    with pytest.raises(UserError, match="state.safetensors is damaged, or not a safetensors file"):
        files.load(tmp_path / "state.safetensors")


def test_files_that_are_none(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="does not exist"):
        files.load(tmp_path / "nothing.safetensors")
    with pytest.raises(UserError, match="is a folder"):
        files.load(tmp_path)
    (tmp_path / "weights.npz").touch()
    with pytest.raises(UserError, match="neither .safetensors nor one of .pth"):
        files.load(tmp_path / "weights.npz")
    (tmp_path / "pickle.safetensors").write_bytes(pickle.dumps(official()))
    with pytest.raises(UserError, match="not a safetensors file"):
        files.load(tmp_path / "pickle.safetensors")
    safetensors_numpy.save_file({"two\nlines": np.zeros(3)}, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match=r"unprintable names \('two\\nlines'"):
        files.load(tmp_path / "odd.safetensors")
    (tmp_path / "weights.pth").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"install dlc_jax\[torch\], or convert it to safetensors"):
        files.load(tmp_path / "weights.pth")


def test_safetensors_of_every_type_come_back(tmp_path):
    random = np.random.default_rng(0)
    saved = {
        dtype.__name__: random.standard_normal((3, 5)).astype(dtype)
        for dtype in (np.float32, np.float16, ml_dtypes.bfloat16)
    }
    saved |= {"turned": saved["float32"].T, "nothing": np.zeros((0, 3), np.float32)}
    files.save(tmp_path / "x.safetensors", saved, {"L": "4"})
    found = files.load(tmp_path / "x.safetensors")
    assert found.metadata == {"L": "4"} and found.shapes == {
        name: tensor.shape for name, tensor in saved.items()
    }
    for name, tensor in saved.items():
        assert (
            found.read(name).dtype == tensor.dtype
            and found.read(name).tobytes() == tensor.tobytes()
        )
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    (tmp_path / "any").touch()
    assert (tmp_path / "x.safetensors").stat().st_mode == (
        tmp_path / "any"
    ).stat().st_mode  # others may read it too
    with pytest.raises(UserError, match="cannot write"):
        files.save(tmp_path / "nowhere" / "x.safetensors", saved)


def test_a_type_that_numpy_has_not(tmp_path):
    header = json.dumps(
        {"odd": {"dtype": "F8_E4M3", "shape": [3], "data_offsets": [0, 3]}}
    ).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    with pytest.raises(
        UserError, match="odd is of a type that is not read here .*; convert it to float32"
    ):
        files.load(tmp_path / "x.safetensors").read("odd")


class Evil:
    def __reduce__(self):
        return print, ("run by a pickle",)


@pytest.mark.torch
def test_files_of_pytorch(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(tensor) for name, tensor in official().items()}
    state["norm.weight"] = state["norm.weight"].to(torch.bfloat16)
    state["norm.bias"] = state["norm.bias"].to(torch.float16)
    path = tmp_path / "weights.pth"
    for saved, options in (
        (state, {}),
        ({"teacher": state}, {}),
        ({"state_dict": state, "best": 0.9}, {}),
        (state, {"_use_new_zipfile_serialization": False}),
    ):
        torch.save(saved, path, **options)
        found = files.load(path)
        assert list(found.shapes) == list(state)
        for name, tensor in state.items():
            assert (found.read(name).astype(np.float32) == tensor.float().numpy()).all()
        assert (found.read("norm.weight").dtype, found.read("norm.bias").dtype) == (
            ml_dtypes.bfloat16,
            np.float16,
        )
    for odd in (
        torch.eye(3).to_sparse(),
        torch.zeros(3, dtype=torch.float8_e4m3fn),
        torch.zeros(3, device="meta"),
    ):
        torch.save({"odd": odd}, path)
        with pytest.raises(
            UserError, match="odd is of a type that is not read here .*; convert it to float32"
        ):
            files.load(path).read("odd")
    torch.save({"model": state, "epoch": 3}, path)
    with pytest.raises(UserError, match="neither a dict of tensors.*'model', 'epoch'"):
        files.load(path)
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged"):
        files.load(path)
    for dangerous in (state | {"code": Evil()}, Evil()):
        torch.save(dangerous, path)
        with pytest.raises(UserError, match="pickle of more than tensors"):
            files.load(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="pickle of more than tensors|damaged"):
        files.load(path)
    assert "run by a pickle" not in capsys.readouterr().out
