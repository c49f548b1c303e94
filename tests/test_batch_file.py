"""Drawn images on their way into one .npz: whole or not there, and taken up again."""

import errno

import numpy as np
import pytest

from dlc_jax.data import batch_file
from dlc_jax.data.batch_file import BatchFile, claim
from dlc_jax.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (25, 4, 4, 3), np.uint8)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(batch_file, "PART", 10)


def drawn(path, *, stop=None, about=None):
    file = BatchFile(path, len(IMAGES), about or {"seed": 0})
    for start, end in file.missing()[:stop]:
        file.write(start, IMAGES[start:end])
    return file


def test_all_images_in_order_as_adm_has_them(tmp_path):
    path = tmp_path / "samples.npz"
    drawn(path).finish()
    with np.load(path) as found:
        assert list(found) == ["arr_0"] and found["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(found["arr_0"], IMAGES)
    assert [each.name for each in tmp_path.iterdir()] == ["samples.npz"]


def test_an_interrupted_draw_goes_on_with_what_is_missing(tmp_path):
    path = tmp_path / "samples.npz"
    drawn(path, stop=1)
    (tmp_path / "samples.npz.partial" / "0000010-0000020.writing").write_bytes(b"half")
    again = BatchFile(path, len(IMAGES), {"seed": 0})
    assert again.missing() == [(10, 20), (20, 25)] and not path.exists()
    drawn(path).finish()
    np.testing.assert_array_equal(np.load(path)["arr_0"], IMAGES)


def test_parts_of_other_samples_are_refused(tmp_path):
    path = tmp_path / "samples.npz"
    drawn(path, stop=1)
    with pytest.raises(UserError, match=r"another seed.*move it away"):
        BatchFile(path, len(IMAGES), {"seed": 1})
    claim(tmp_path / "about", {"sampler": (1, 2)})
    claim(tmp_path / "about", {"sampler": [1, 2]})  # as JSON has it
    with pytest.raises(UserError, match="another sampler"):
        claim(tmp_path / "about", {"sampler": [2]})


@pytest.mark.parametrize("when", ["write", "finish"])
def test_a_full_disk_never_leaves_a_file_that_looks_complete(tmp_path, monkeypatch, when):
    path = tmp_path / "samples.npz"
    file = drawn(path, stop=None if when == "finish" else 2)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np.lib.format, "write_array_header_1_0", full)
        patch.setattr(np, "save", full)
        with pytest.raises(UserError, match="No space left on device.*is kept"):
            file.finish() if when == "finish" else file.write(20, IMAGES[20:])
    assert not path.exists()
    drawn(path).finish()
    np.testing.assert_array_equal(np.load(path)["arr_0"], IMAGES)
