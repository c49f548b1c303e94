"""Pictures show what they are given."""

import json

import numpy as np
import pytest
from PIL import Image

from dlc_jax.evals import pictures


def _images(count, size=3, channels=3):
    return np.random.default_rng(0).integers(0, 200, (count, size, size, channels), dtype=np.uint8)


def test_grid_holds_every_image_enlarged_by_whole_pixels():
    images = _images(5)
    laid = pictures.grid(images, columns=3, scale=4)
    gap, step = 2, 3 * 4 + 2
    assert laid.shape == (2 * step + gap, 3 * step + gap, 3) and laid.dtype == np.uint8
    for i, image in enumerate(images):
        y, x = gap + i // 3 * step, gap + i % 3 * step
        cell = laid[y : y + 12, x : x + 12]
        np.testing.assert_array_equal(cell[::4, ::4], image)
        np.testing.assert_array_equal(cell, cell[::4, ::4].repeat(4, 0).repeat(4, 1))
    assert np.all(laid[gap + step :, gap + 2 * step :] == 225)  # the sixth place is empty
    assert np.all(laid[:gap] == 225) and np.all(laid[:, -gap:] == 225)


@pytest.mark.parametrize(("size", "shown"), [(16, 64), (28, 56), (32, 64), (100, 100)])
def test_small_images_are_enlarged_to_be_seen(size, shown):
    assert pictures.grid(_images(1, size), columns=8).shape == (shown + 4, shown + 4, 3)


def test_gray_images_become_three_equal_channels():
    laid = pictures.grid(_images(2, channels=1))
    assert laid.shape[2] == 3 and np.all(laid == laid[..., :1])


def test_rows_stand_below_each_other_with_labels_and_go_on_in_bands():
    rows = {"real": _images(5), "decoded": 255 - _images(5)}
    laid = pictures.labelled_rows(rows, columns=3, scale=8)
    height, width = 3 * 8 + 4, 3 * (3 * 8 + 2) + 2
    margin = laid.shape[1] - width
    assert laid.shape[0] == 4 * height + 8 and margin > 30
    for row, images in enumerate([rows["real"][:3], rows["decoded"][:3]]):
        strip = laid[row * height : (row + 1) * height]
        np.testing.assert_array_equal(strip[:, margin:], pictures.grid(images, columns=3, scale=8))
        assert strip[:, :margin].min() < 100  # the label
    second = laid[2 * height + 8 : 3 * height + 8, margin:]
    expected = pictures.grid(rows["real"][3:], columns=2, scale=8)
    np.testing.assert_array_equal(second[:, : 2 * 26 + 2], expected)


def test_rows_of_different_length_and_wrong_arrays_are_refused():
    with pytest.raises(ValueError, match="same number"):
        pictures.labelled_rows({"a": _images(2), "b": _images(3)})
    with pytest.raises(ValueError, match="uint8"):
        pictures.grid(_images(2).astype(np.float32))
    with pytest.raises(ValueError, match="one or more"):
        pictures.grid(_images(0))


def test_png_is_written_whole_and_read_back(tmp_path):
    laid = pictures.grid(_images(4))
    pictures.save_png(tmp_path / "new" / "a.png", laid)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "new" / "a.png")), laid)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


def test_captions_are_written(tmp_path):
    pictures.save_captions(tmp_path / "pictures", {"a.png": "Codes → images."})
    found = json.loads((tmp_path / "pictures" / "captions.json").read_text())
    assert found == {"a.png": "Codes → images."}
    assert len(list((tmp_path / "pictures").iterdir())) == 1


def test_codes_are_shown_as_cells_a_color_a_value():
    codes = np.array([[0, 1, 2, 0, 1], [7, 7, 7, 7, 7]])
    cells = pictures.code_cells(codes, values=8, size=36)
    assert cells.shape == (2, 36, 36, 3) and cells.dtype == np.uint8
    # within the frame, three cells of ten pixels a side for five positions
    inner = cells[:, 3:-3, 3:-3]
    assert np.all(cells[:, :3] == 225) and np.all(cells[:, :, -3:] == 225)
    colors = inner[0, 5::10, 5::10].reshape(9, 3)
    assert np.array_equal(colors[0], colors[3]) and np.array_equal(colors[1], colors[4])
    assert len(np.unique(colors[:3], axis=0)) == 3
    assert np.all(colors[5:] == 225)  # the last four cells are empty
    assert np.ptp(inner[1, :10].reshape(-1, 3), axis=0).max() == 0
    many = pictures.code_cells(np.arange(256)[None], values=256, size=32)[0, 2:-2, 2:-2]
    assert len(np.unique(many.reshape(-1, 3), axis=0)) > 200


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as caught:
        pictures.save_png(tmp_path / "file" / "a.png", pictures.grid(_images(1)))
    assert caught.value.filename == str(tmp_path / "file" / "a.png")
