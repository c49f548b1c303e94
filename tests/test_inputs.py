"""Images and codes that people hand over: what is taken, how, and what is refused in one line."""

import numpy as np
import pytest
from PIL import Image

from dlc_jax.data import inputs
from dlc_jax.data.decoder import center_crop
from dlc_jax.errors import UserError


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Two images, one of them deeper, and two files that are none."""
    (tmp_path / "deep").mkdir()
    for name in ("b.png", "deep/a.PNG"):
        Image.fromarray(pixels(8, 9, 3)).save(tmp_path / name, format="PNG")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "text.jpg").write_text("no image either")
    return tmp_path


def test_files_of_folders_and_named_ones(folder):
    named, found = inputs.files([folder / "notes.txt", folder])
    assert named == [folder / "notes.txt"]
    assert found == [folder / "b.png", folder / "deep" / "a.PNG", folder / "text.jpg"]


@pytest.mark.parametrize(
    "make", [lambda path: path / "nowhere", lambda path: (path / "empty").mkdir() or path / "empty"]
)
def test_paths_without_images_are_refused(tmp_path, make):
    path = make(tmp_path)
    with pytest.raises(UserError, match=path.name):
        inputs.files([path])


def test_read(folder):
    np.testing.assert_array_equal(inputs.read(folder / "b.png"), pixels(8, 9, 3))
    (folder / "zero.png").touch()
    (folder / "cut.png").write_bytes((folder / "b.png").read_bytes()[:120])
    for name in ("text.jpg", "zero.png", "cut.png", "deep", "nowhere.png"):
        with pytest.raises(UserError, match=name) as refused:
            inputs.read(folder / name)
        assert "\n" not in str(refused.value) and "object at" not in str(refused.value)


def test_fit_scales_crops_and_colors():
    same, wide, gray = pixels(16, 16, 3), pixels(40, 90, 3), pixels(16, 16, 1)
    fitted = inputs.fit([same, wide, gray], size=16)
    assert fitted.dtype == np.uint8 and fitted.shape == (3, 16, 16, 3)
    np.testing.assert_array_equal(fitted[0], same)
    np.testing.assert_array_equal(
        fitted[1], np.asarray(center_crop(Image.fromarray(wide), size=16))
    )
    np.testing.assert_array_equal(fitted[2], np.repeat(gray, 3, -1))
    np.testing.assert_array_equal(
        inputs.fit(pixels(2, 30, 30, 1), size=16)[..., 0],
        inputs.fit(pixels(2, 30, 30, 1), size=16)[..., 2],
    )
    assert inputs.fit([], size=16).shape == (0, 16, 16, 3)


@pytest.mark.parametrize(
    "images",
    [
        pixels(16, 16, 3),
        pixels(2, 16, 16, 3) / 255,
        pixels(2, 16, 16, 4),
        pixels(2, 16, 16),
        pixels(2, 0, 16, 3),
        [1, 2],
    ],
    ids="single floats alpha no_channels no_pixels numbers".split(),
)
def test_what_is_no_image_is_refused(images):
    with pytest.raises(UserError, match="uint8"):
        inputs.fit(images, size=16)


def test_codes_hard_and_soft():
    hard = inputs.check_codes(
        np.array([[0, 1, 2], [2, 2, 0]], np.uint8), length=3, values=3, where="here"
    )
    assert hard.dtype == np.int32
    soft = inputs.check_codes(np.eye(3)[hard], length=3, values=3, where="here")
    assert soft.dtype == np.float32 and soft.shape == (2, 3, 3)


@pytest.mark.parametrize(
    ("codes", "words"),
    [
        ([[0, 1, 3]], "0..2; found 0..3"),
        ([[0, 1, -1]], "found -1..1"),
        ([[0, 1]], "1, 2"),
        ([0, 1, 2], "floats"),
        ([[0.0, 1.0, 2.0]], "float64"),
        (np.eye(3)[None, :2], "1, 2, 3"),
        (np.eye(3, dtype=int)[None], "int64"),
        (np.eye(3)[None] * 2, "simplices"),
        (np.array([[[2.0, -1.0, 0.0]] * 3]), "simplices"),
        (np.full((1, 3, 3), np.nan), "simplices"),
    ],
    ids="above below length dimension type soft_length soft_type sum negative nan".split(),
)
def test_other_codes_are_refused(codes, words):
    with pytest.raises(UserError, match="here") as refused:
        inputs.check_codes(codes, length=3, values=3, where="here")
    assert words in str(refused.value)
