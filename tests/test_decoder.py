"""Image files to pixels: every mode right, nothing hostile decoded."""

import io
import pathlib
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from dlc_jax.data import decoder
from dlc_jax.data.decoder import Picture, center_crop, decode_image
from dlc_jax.errors import UserError


def encode(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def scene(height, width):
    """A smooth picture, which JPEG keeps well, as uint8 [y, x, 3]."""
    y, x = np.mgrid[:height, :width].astype(float)
    waves = [
        np.sin(x / (11 + c) + c) * np.cos(y / (17 - 3 * c)) + x / width - y / height
        for c in range(3)
    ]
    return np.clip(128 + 50 * np.stack(waves, -1), 0, 255).astype(np.uint8)


@pytest.fixture
def colors():
    return np.random.default_rng(0).integers(0, 256, (12, 18, 3), dtype=np.uint8)


def test_colors_stay_and_crops_are_as_said(colors):
    image = Image.fromarray(colors)
    np.testing.assert_array_equal(decode_image(encode(image)), colors)
    np.testing.assert_array_equal(
        decode_image(encode(image), image=8), np.asarray(center_crop(image, size=8))
    )
    whole = Image.fromarray(np.repeat(np.repeat(colors, 2, 0), 3, 1))
    stretched = decode_image(encode(whole), image=12, crop="stretch")
    np.testing.assert_array_equal(
        stretched, np.asarray(whole.resize((12, 12), Image.Resampling.BICUBIC))
    )


@pytest.mark.parametrize(
    ("mode", "format"),
    [
        ("L", "PNG"),
        ("1", "PNG"),
        ("P", "PNG"),
        ("P", "GIF"),
        ("LA", "PNG"),
        ("CMYK", "TIFF"),
        ("YCbCr", "JPEG"),
    ],
)
def test_other_modes_become_three_channels(mode, format, colors):
    image = (
        Image.fromarray(colors).convert("L").convert(mode)
        if mode == "LA"
        else Image.fromarray(colors).convert(mode)
    )
    found = decode_image(encode(image, format))
    assert found.shape == (12, 18, 3) and found.dtype == np.uint8
    if format != "JPEG":
        np.testing.assert_array_equal(found, np.asarray(image.convert("RGB")))


def test_cmyk_jpeg_is_not_inverted():
    for color in [(250, 250, 250), (200, 40, 30), (5, 5, 5)]:
        data = encode(Image.new("RGB", (16, 16), color).convert("CMYK"), "JPEG", quality=95)
        np.testing.assert_allclose(decode_image(data)[8, 8], color, atol=6)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled(format):
    values = np.linspace(0, 65535, 16 * 16).astype(np.uint16).reshape(16, 16)
    found = decode_image(encode(Image.fromarray(values), format))
    np.testing.assert_array_equal(found, np.repeat(np.round(values / 257)[..., None], 3, -1))
    wide = Image.fromarray(values.astype(np.int32))  # mode I
    np.testing.assert_array_equal(decode_image(encode(wide, "TIFF")), found)


def test_transparency_is_laid_on_black(colors):
    alpha = np.concatenate([colors, np.zeros((12, 18, 1), np.uint8)], -1)
    assert decode_image(encode(Image.fromarray(alpha))).max() == 0
    alpha[..., 3] = 128
    half = decode_image(encode(Image.fromarray(alpha)))
    np.testing.assert_allclose(half, colors * (128 / 255), atol=1)
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((0, 0), 1)
    found = decode_image(encode(palette, transparency=0))
    assert found[0, 0].tolist() == [0, 255, 0] and found[4, 4].tolist() == [0, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotation_of_the_camera(orientation):
    image = Image.new("RGB", (32, 16), "white")
    image.paste("black", (0, 0, 16, 8))  # dark where the stored rows and columns begin
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode_image(encode(image, "JPEG", exif=exif, quality=95))
    # EXIF 2.3: where the stored first row and first column are seen
    down, right = {
        1: (0, 0),
        2: (0, 1),
        3: (1, 1),
        4: (1, 0),
        5: (0, 0),
        6: (0, 1),
        7: (1, 1),
        8: (1, 0),
    }[orientation]
    assert found.shape[:2] == ((16, 32) if orientation < 5 else (32, 16))
    corners = found[[2, -3]][:, [2, -3], 0]
    assert (corners < 128).tolist() == [[(y, x) == (down, right) for x in (0, 1)] for y in (0, 1)]


def test_broken_exif_does_not_cost_the_picture(colors):
    entry = b"\0\x03\x01\x01\0\x02\0\0\0\x06\0\0\0\x32\x01\x12\0\x03\0\0\0\x01\0\x06\0\0" + bytes(
        40
    )
    for start, shape in [
        (b"XX\0*\0\0\0\x08", (12, 18, 3)),
        (b"MM\0*\0", (12, 18, 3)),
        (b"MM\0*\0\0\0\x08", (18, 12, 3)),
    ]:
        # The last says which way is up, and then nonsense.
        exif = b"Exif\0\0" + start + entry * (len(start) == 8)
        assert decode_image(encode(Image.fromarray(colors), "PNG", exif=exif)).shape == shape


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    found = decode_image(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert found[0, 0].tolist() == [255, 0, 0]


def test_damaged_files_raise(colors):
    data = encode(Image.fromarray(colors))
    noisy = encode(
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)),
        "JPEG",
    )
    for bad in (b"", b"not an image", data[:60], noisy[: len(noisy) // 2]):
        with pytest.raises((OSError, ValueError, SyntaxError)):
            decode_image(bad)


@pytest.mark.parametrize(
    "size", [(12000, 12000), (64001, 1000), (1, 1), (1, 10000), (3, 3), (4, 129)]
)
def test_size_is_checked_before_decoding(size, monkeypatch):
    width, height = size
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    data = (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    )
    data += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=f"{width} x {height}"):
        decode_image(data)


@pytest.mark.parametrize("size", [(4, 4), (4, 128), (128, 4)])
def test_small_and_thin_ones_that_still_count(size):
    assert decode_image(encode(Image.new("L", size)), image=16).shape == (16, 16, 3)


def test_formats_that_start_other_programs_are_not_tried():
    with pytest.raises(Image.UnidentifiedImageError):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n")
    assert set(decoder.FORMATS) <= {format for format in Image.OPEN} | {"AVIF", "JPEG2000"}


@pytest.mark.parametrize(
    "data", [b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", b"\0\0\0\x18ftypmif1\0\0\0\0mif1heix"]
)
def test_heic_without_the_extra_names_it(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    decoder._heic_file.cache_clear()
    with pytest.raises(ValueError, match=r"in HEIC: pip install 'dlc_jax\[heic\]' reads them"):
        decode_image(data)


def test_pillow_is_silent():
    code = """
import io
import pathlib
from PIL import Image
from dlc_jax.data.decoder import decode_image
palette = Image.new("P", (8, 8)); palette.putpalette([9] * 768)
file = io.BytesIO(); palette.save(file, "PNG", transparency=bytes(range(256)))
decode_image(file.getvalue())
file = io.BytesIO(); Image.new("1", (10000, 10000)).save(file, "PNG")
try: decode_image(file.getvalue())
except ValueError as error: print(error)
"""
    root = pathlib.Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert (done.stdout, done.stderr) == ("image of 10000 x 10000 pixels\n", "")


def test_center_crop_scales_the_short_side_and_keeps_the_center():
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, 20:60] = 255
    out = np.asarray(center_crop(Image.fromarray(image), size=10))
    assert out.shape == (10, 10, 3)
    assert (out == 255).all()
    odd = center_crop(Image.fromarray(noise(7, 300)), size=16)
    assert odd.size == (16, 16)
    same = noise(16, 16)
    np.testing.assert_array_equal(center_crop(Image.fromarray(same), size=16), same)


def test_center_crop_halves_by_box_averages():
    image = noise(64, 64)
    boxes = image.astype(np.float64)
    for _ in range(2):
        boxes = boxes.reshape(boxes.shape[0] // 2, 2, boxes.shape[1] // 2, 2, 3).mean((1, 3))
    out = np.asarray(center_crop(Image.fromarray(image), size=16)).astype(float)
    assert np.abs(out - boxes).max() <= 2.5  # Pillow rounds after each of four passes


def exif(orientation):
    made = Image.Exif()
    made[0x0112] = orientation
    return made


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_a_picture_knows_its_size_and_is_what_decode_image_gives(format, orientation):
    data = encode(Image.fromarray(scene(32, 48)), format, exif=exif(orientation))
    picture, want = Picture(data), decode_image(data)
    assert picture.size == want.shape[1::-1] == ((48, 32) if orientation < 5 else (32, 48))
    found, shrink = picture.decode()
    assert shrink == 1
    np.testing.assert_array_equal(np.asarray(found), want)


def test_a_jpeg_is_not_decoded_before_its_scale_is_known():
    data = encode(Image.fromarray(scene(256, 256)), "JPEG")
    assert Picture(data[: len(data) // 2]).size == (256, 256)
    with pytest.raises(OSError, match="truncated"):
        Picture(data[: len(data) // 2]).decode(2)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("shrink", [2, 4, 8])
def test_a_coarse_picture_is_the_mean_of_its_pixels(mode, shrink):
    data = encode(Image.fromarray(scene(128, 192)).convert(mode), "JPEG", quality=95)
    found, scale = Picture(data).decode(shrink)
    assert scale == shrink and found.mode == "RGB" and found.size == (192 // shrink, 128 // shrink)
    whole = decode_image(data).astype(float)
    want = whole.reshape(128 // shrink, shrink, 192 // shrink, shrink, 3).mean((1, 3))
    assert np.abs(np.asarray(found) - want).mean() < 1.5


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_turned_picture_is_coarse_only_where_that_moves_nothing(orientation):
    for side, scale in ((64, 4), (66, 1)):
        data = encode(Image.fromarray(scene(64, side)), "JPEG", quality=95, exif=exif(orientation))
        found, shrink = Picture(data).decode(4)
        assert shrink == scale
        want = Image.fromarray(decode_image(data)).resize(found.size, Image.Resampling.BOX)
        assert np.abs(np.asarray(found).astype(float) - np.asarray(want)).mean() < 3


def test_pictures_of_pixels_and_of_other_formats_come_whole(colors):
    for data in (colors, encode(Image.fromarray(colors))):
        found, shrink = Picture(data).decode(8)
        assert shrink == 1 and found.size == (18, 12)
        np.testing.assert_array_equal(np.asarray(found), colors)
    with pytest.raises(ValueError, match="uint8"):
        Picture(colors / 255.0)


@pytest.mark.parametrize("image", [0, -8, "whole", 3.5])
def test_nonsense_sizes_are_refused(image):
    with pytest.raises(UserError, match="invalid size of images"):
        decoder.check_image(image)
