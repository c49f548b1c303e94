"""Photographs in HEIC, read as those of every other format; skipped without the extra `heic`."""

import io
import multiprocessing
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dlc_jax.data import decoder, sources
from dlc_jax.data.convert import convert
from dlc_jax.data.decoder import Picture, decode_image
from dlc_jax.data.survey import survey

pillow_heif = pytest.importorskip(
    "pillow_heif", reason="photographs in HEIC are read with the extra `heic`"
)
pillow_heif.register_heif_opener()  # to write such files; the decoder does without
LOSSLESS = dict(quality=-1, chroma=444)


def encode(image, *, exif=None):
    """The bytes of a HEIC file of a Pillow image."""
    file = io.BytesIO()
    image.save(file, "HEIF", **LOSSLESS, **({} if exif is None else {"exif": exif.tobytes()}))
    return file.getvalue()


def scene(height=48, width=64):
    """Smooth colors, uint8 [y, x, 3]."""
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * x // width, 255 * y // height, np.full_like(x, 60)], -1).astype(np.uint8)


def test_colors_gray_transparency_and_ten_bits():
    colors = scene()
    np.testing.assert_allclose(decode_image(encode(Image.fromarray(colors))), colors, atol=2)
    gray = decode_image(encode(Image.fromarray(colors[..., 0])))
    np.testing.assert_allclose(gray, np.repeat(colors[..., :1], 3, -1), atol=2)
    half = np.dstack([colors, np.full((48, 64), 128, np.uint8)])
    np.testing.assert_allclose(
        decode_image(encode(Image.fromarray(half))), colors * (128 / 255), atol=2
    )
    values = np.linspace(0, 65535, 48 * 64 * 3).astype(np.uint16).reshape(48, 64, 3)
    file = io.BytesIO()
    pillow_heif.from_bytes("RGB;16", (64, 48), values.tobytes()).save(file, **LOSSLESS)
    assert pillow_heif.open_heif(file.getvalue()).info["bit_depth"] == 10
    np.testing.assert_allclose(decode_image(file.getvalue()), np.round(values / 257), atol=2)


@pytest.mark.parametrize("format", ["HEIC", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotation_of_the_camera_is_applied_once(orientation, format):
    """As of a PNG file that says the same."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    file, png = io.BytesIO(), io.BytesIO()
    Image.fromarray(scene()).save(png, "PNG", exif=exif)
    if format == "HEIC":
        data = encode(Image.fromarray(scene()), exif=exif)
        assert (b"irot" in data or b"imir" in data) == (orientation > 1)
    else:
        Image.fromarray(scene()).save(file, "AVIF", exif=exif, quality=100, subsampling="4:4:4")
        data = file.getvalue()
    want = decode_image(png.getvalue())
    np.testing.assert_allclose(decode_image(data), want, atol=4)
    picture = Picture(data)
    assert picture.size == want.shape[1::-1]
    np.testing.assert_array_equal(np.asarray(picture.decode(8)[0]), decode_image(data))


def test_of_several_images_the_primary_counts():
    several = pillow_heif.from_pillow(Image.new("RGB", (64, 64), "red"))
    several.add_from_pillow(Image.new("RGB", (32, 48), "blue"))
    for first, shape, color in ((0, (64, 64, 3), (255, 0, 0)), (1, (48, 32, 3), (0, 0, 255))):
        file = io.BytesIO()
        several.save(file, primary_index=first, **LOSSLESS)
        found = decode_image(file.getvalue())
        assert found.shape == shape
        np.testing.assert_allclose(found[8, 8], color, atol=3)


def test_damaged_files_raise():
    data = encode(Image.fromarray(scene()))
    for length in (0, 8, 12, 100, 300, len(data) // 2, len(data) - 5):
        with pytest.raises((OSError, ValueError, SyntaxError)):
            decode_image(data[:length])


def test_sizes_are_checked_before_decoding(monkeypatch):
    data = encode(Image.fromarray(scene(512, 512)))
    place = data.index(b"ispe") + 8  # what the container says of the size
    small = data[:place] + np.array([64, 64], ">u4").tobytes() + data[place + 8 :]
    # The decoder does not make more pixels than were said.
    with pytest.raises((ValueError, RuntimeError)):
        decode_image(small)
    monkeypatch.setattr(pillow_heif.HeifImageFile, "load", lambda self: pytest.fail("decoded"))
    for size in ((20000, 20000), (512, 3), (8192, 64)):
        with pytest.raises(ValueError, match=f"image of {size[0]} x {size[1]} pixels"):
            decode_image(data[:place] + np.array(size, ">u4").tobytes() + data[place + 8 :])


def test_a_folder_of_photographs(tmp_path):
    """Counted, converted, read in other processes; a file that only calls itself a JPEG is read
    too.
    """
    place = tmp_path / "photographs"
    for k, name in enumerate(("a/1.HEIC", "a/2.heif", "b/3.jpg", "b/4.heic")):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(encode(Image.fromarray(scene(48, 64 + k))))
    (place / "b" / "4.heic").write_bytes(encode(Image.fromarray(scene()))[:-9])
    found, _ = survey(place, workers=2)
    assert found.formats == {"HEIF": 4} and found.widths.tolist() == [64, 65, 66, 64]
    assert found.skipped == {}
    ((name, reason),) = found.broken
    assert name == "b/4.heic" and "Unexpected end of file" in reason and "\n" not in reason
    convert(place, tmp_path / "records", workers=2)
    want, copy = (
        sources.source("images", "train", path=p, image=16, validation=0)
        for p in (place, tmp_path / "records")
    )
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        there = pool.map(copy.source.__getitem__, range(3))
    for k in range(3):
        np.testing.assert_array_equal(want[k]["image"], there[k]["image"])


def test_it_is_imported_when_needed():
    code = """
import sys
from dlc_jax.data import decoder, files, survey
assert not decoder._is_heic(b"") and "pillow_heif" not in sys.modules
try: decoder.decode_image(b"\\0\\0\\0\\x18ftypheic\\0\\0\\0\\0mif1heic")
except Exception as error: print(type(error).__name__, "pillow_heif" in sys.modules)
"""
    root = pathlib.Path(decoder.__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert (done.stdout, done.stderr) == ("SyntaxError True\n", "")
