"""Image files to pixels: whatever Pillow reads, as 8-bit RGB, with the size checked before anything is decoded."""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dlc_jax.data.transforms import center_crop
from dlc_jax.errors import UserError

MAX_PIXELS = 64_000_000  # a few kilobytes of a hostile file can decode to gigabytes
MIN_SIDE, MAX_ASPECT = 4, 32  # a thinner image is no picture, and scaling its short side up would take gigabytes
# Only these are tried: Pillow hands some other formats, such as EPS, to programs of their own.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA")
CROPS = ("center", "stretch")

# What Pillow warns of (large images, odd metadata) is either refused below or does not change pixels. Here and not around each
# call, because `warnings.catch_warnings` is not for threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


def check_crop(crop):
    """UserError for an unknown crop policy."""
    if crop not in CROPS:
        raise UserError(f"unknown crop {crop!r}; use one of {', '.join(CROPS)}")


def decode_image(data, *, image=None, crop="center"):
    """Decodes an image file.

    Args:
      data: bytes of any format of FORMATS; of an animation, the first frame counts.
      image: side of the result, or None to keep the size.
      crop: "center" scales the short side and crops (see `transforms.center_crop`), "stretch" scales both sides.

    Returns:
      uint8 [y, x, 3]. It is turned as its EXIF data says; gray is repeated; 16 bits become 8 by scaling; transparency is laid on
      black; color profiles are ignored.

    Raises:
      ValueError, OSError, or one of Pillow's own: for data that is not an image, is cut off, has more than 64 million pixels, a side
        below 4 pixels, or one side longer than 32 times the other.
    """
    if not data:
        raise ValueError("empty file")
    try:
        file = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:  # whose own text has an address in memory
        raise UnidentifiedImageError("not an image of a known format") from None
    with file:
        short, long = sorted(file.size)  # known from the header, before anything is decoded
        if short * long > MAX_PIXELS or short < MIN_SIDE or long > MAX_ASPECT * short:
            raise ValueError(f"image of {file.width} x {file.height} pixels")
        return to_pixels(file, image=image, crop=crop)


def to_pixels(file, *, image=None, crop="center"):
    """uint8 [y, x, 3] of a Pillow image, see `decode_image`."""
    file.load()
    _turn(file)
    if file.mode.startswith("I"):  # 16 bits; Pillow's own conversion cuts off above 255
        values = np.clip(np.asarray(file).astype(np.int64), 0, 2**16 - 1)
        file = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif file.mode == "F":
        raise ValueError("an image of floating-point numbers, whose range is not known")
    elif file.has_transparency_data:
        file = file.convert("RGBA")
        file = Image.alpha_composite(Image.new("RGBA", file.size, (0, 0, 0, 255)), file)
    file = file.convert("RGB")
    if image is not None:
        file = center_crop(file, size=image) if crop == "center" else file.resize((image, image), Image.Resampling.BICUBIC)
    return np.asarray(file)


def _turn(file):
    try:
        ImageOps.exif_transpose(file, in_place=True)
    except Exception:  # broken EXIF data raises anything; the picture is still good
        return
