"""Image files to pixels: whatever Pillow reads, as 8-bit RGB, its size checked before decoding."""

import functools
import io
import struct
import warnings

import numpy as np
from PIL import ExifTags, Image, JpegImagePlugin, UnidentifiedImageError

from dlc_jax.data.naming import GET_HEIC
from dlc_jax.errors import UserError

MAX_PIXELS = 64_000_000  # a few kilobytes of a hostile file can decode to gigabytes
# Of a thinner image, scaling the short side up would take gigabytes.
MIN_SIDE, MAX_ASPECT = (
    4,
    32,
)
# Only these are tried: Pillow hands some other formats, such as EPS, to programs of their own.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "TGA")
# What HEIC files call themselves.
HEVC = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"))
CROPS = ("center", "stretch")
SHRINKS = (8, 4, 2, 1)  # a JPEG is decoded at one over these without its full size ever being there

# What to do with the pixels by the value of EXIF's Orientation; those from 5 on also exchange width
# and height.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What Pillow warns of (large images, odd metadata) is either refused below or does not change
# pixels. Here and not around each call, because `warnings.catch_warnings` is not for threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


def check_crop(crop: str) -> None:
    """UserError for an unknown crop policy."""
    if crop not in CROPS:
        raise UserError(f"unknown crop {crop!r}; use one of {', '.join(CROPS)}")


def check_image(image: int | str | None) -> None:
    """UserError for an unknown size of images."""
    if not (image in (None, "encoded") or (isinstance(image, int) and image > 0)):
        raise UserError(
            f"invalid size of images: image={image!r}; use a number of pixels, None for their own, "
            'or "encoded" for files'
        )


def decode_image(data: bytes, *, image: int | None = None, crop: str = "center") -> np.ndarray:
    """Decodes an image file.

    Args:
      data: bytes of any format of FORMATS, or HEIC; of an animation, the first frame counts, of
        HEIC the primary image.
      image: side of the result, or None to keep the size.
      crop: "center" scales the short side and crops (see `transforms.center_crop`), "stretch"
        scales both sides.

    Returns:
      uint8 [y, x, 3]. It is turned as its EXIF data says; gray is repeated; 16 bits become 8 by
      scaling; transparency is laid on black; color profiles are ignored.

    Raises:
      ValueError, OSError, or one of Pillow's own: for data that is not an image, is cut off, has
      more than 64 million pixels, a side
        below 4 pixels, or one side longer than 32 times the other.
    """
    with _open(data) as file:
        return to_pixels(file, image=image, crop=crop)


def _open(data):
    """A Pillow file of which only the header has been read. Raises as `decode_image` does."""
    file = identify(data)
    short, long = sorted(file.size)
    if short * long > MAX_PIXELS or short < MIN_SIDE or long > MAX_ASPECT * short:
        raise ValueError(f"image of {file.width} x {file.height} pixels")
    return file


def identify(data: bytes) -> Image.Image:
    """A Pillow file of any size, of which only the header has been read.

    Raises:
      ValueError, SyntaxError, or one of Pillow's own: for data that is not an image, or HEIC
      without the extra that reads it.
    """
    if not data:
        raise ValueError("empty file")
    if _is_heic(data):
        return _heic_file()(io.BytesIO(data))
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:  # whose own text has an address in memory
        raise UnidentifiedImageError("not an image of a known format") from None


def _is_heic(data):
    """By the brands at its beginning (ISO 14496-12): AVIF has the same container."""
    if data[4:8] != b"ftyp":
        return False
    end = min(struct.unpack(">I", data[:4])[0], 256)
    return bool(HEVC & {data[8:12], *(data[at : at + 4] for at in range(16, end, 4))})


@functools.cache
def _heic_file():
    """pillow_heif's class of Pillow files, imported when first needed, in whichever process.

    Nothing is registered.

    It turns the pixels as the container says, and its EXIF data then says 1.
    """
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        raise ValueError(f"a photograph in HEIC: {GET_HEIC}") from None
    return HeifImageFile


def to_pixels(file, *, image=None, crop="center"):
    """uint8 [y, x, 3] of a Pillow image, see `decode_image`."""
    file.load()
    file = _to_rgb(file, _orientation(file))
    if image is not None:
        if crop == "center":
            file = center_crop(file, size=image)
        else:
            file = file.resize((image, image), Image.Resampling.BICUBIC)
    return np.asarray(file)


def _orientation(file):
    """Of EXIF, 1 to 8. Most formats must be loaded first; a JPEG has it in its header."""
    try:
        return file.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # broken EXIF data raises anything; the picture is still good
        return 1


def _to_rgb(file, orientation):
    if orientation in TURNS:
        file = file.transpose(TURNS[orientation])
    if file.mode.startswith("I"):  # 16 bits; Pillow's own conversion cuts off above 255
        values = np.clip(np.asarray(file).astype(np.int64), 0, 2**16 - 1)
        file = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif file.mode == "F":
        raise ValueError("an image of floating-point numbers, whose range is not known")
    elif file.has_transparency_data:
        file = file.convert("RGBA")
        file = Image.alpha_composite(Image.new("RGBA", file.size, (0, 0, 0, 255)), file)
    return file.convert("RGB")


def center_crop(image: Image.Image, *, size: int) -> Image.Image:
    """Scales the short side to `size` and crops the center, as ADM's evaluation protocol does.

    Source: Dhariwal and Nichol, 2021.

    The image is halved by box averages while its short side is at least twice `size`, then resized
    bicubically.

    Args:
      image: a Pillow image of any size.
      size: side of the result, in pixels.

    Returns:
      A Pillow image of size x size.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


class Picture:
    """An image whose size is known while it is still open how finely it is decoded. Decoded once.

    Args:
      data: bytes of an image file, or its pixels, uint8 [y, x, 3].

    Attributes:
      size: (width, height) as it is seen, turned as EXIF says.

    Raises:
      ValueError, OSError, or one of Pillow's own: see `decode_image`; what is wrong beyond the
      header of a JPEG shows in `decode`.
    """

    def __init__(self, data):
        self._orientation = 1
        if not isinstance(data, bytes):
            if data.dtype != np.uint8 or data.ndim != 3 or data.shape[-1] != 3:
                raise ValueError(
                    f"expected a uint8 image [y, x, 3], got {data.dtype} {list(data.shape)}"
                )
            self._file = Image.fromarray(data)
        else:
            self._file = _open(data)
            if not isinstance(self._file, JpegImagePlugin.JpegImageFile):
                self._file.load()
            self._orientation = _orientation(self._file)
        self.size = self._file.size[::-1] if self._orientation >= 5 else self._file.size

    def decode(self, shrink: int = 1) -> tuple[Image.Image, int]:
        """(RGB Pillow image, how many pixels of `size` a side of one of its own stands for).

        The latter is `shrink`, of SHRINKS, for a JPEG, or 1.

        The decoder completes the last row and column of a JPEG whose sides `shrink` does not
        divide. Turned, these would come first and move everything: such a file is decoded in full.
        """
        if not isinstance(self._file, JpegImagePlugin.JpegImageFile) or (
            self._orientation in TURNS and any(side % shrink for side in self.size)
        ):
            shrink = 1
        if shrink > 1:
            self._file.draft(None, tuple(side // shrink for side in self._file.size))
        self._file.load()
        return _to_rgb(self._file, self._orientation), shrink
