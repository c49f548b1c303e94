"""Pictures of samples, enlarged so that they can be looked at."""

import colorsys
import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping

import einops
import numpy as np
from PIL import Image, ImageDraw, ImageFont

_READABLE = 64  # pixels: small images are enlarged by a whole factor up to about this
_GAP = 2
PAPER = 225  # light, but not white: images on white keep their edges


def grid(images: np.ndarray, *, columns: int = 8, scale: int | None = None) -> np.ndarray:
    """Lays images out in rows on light gray.

    Args:
      images: uint8 [n, y, x, c], c is 1 or 3.
      columns: images in a row; the last row is filled with gray.
      scale: every pixel becomes scale x scale; None enlarges to about 64 pixels.

    Returns:
      uint8 [Y, X, 3].
    """
    images = enlarge(images, scale)
    columns = max(1, min(columns, len(images)))
    missing = -len(images) % columns
    images = np.concatenate([images, np.full((missing, *images.shape[1:]), PAPER, np.uint8)])
    framed = np.pad(images, ((0, 0), (0, _GAP), (0, _GAP), (0, 0)), constant_values=PAPER)
    laid = einops.rearrange(framed, "(r k) y x c -> (r y) (k x) c", k=columns)
    return np.pad(laid, ((_GAP, 0), (_GAP, 0), (0, 0)), constant_values=PAPER)


def labelled_rows(
    rows: Mapping[str, np.ndarray], *, columns: int = 8, scale: int | None = None
) -> np.ndarray:
    """Lays rows of images below each other, each with its label at the left.

    For "real", "codes decoded", or "parent A", "parent B", "child 1". Column j belongs together.
    More images than `columns` go on in a further band of all rows.

    Args:
      rows: label -> uint8 [n, y, x, c]; n and the size are the same in all.
      columns: images in a row.
      scale: as in `grid`.

    Returns:
      uint8 [Y, X, 3].

    Raises:
      ValueError: the rows have different numbers or sizes of images.
    """
    shapes = {images.shape for images in rows.values()}
    if len(shapes) != 1:
        raise ValueError(
            f"rows must hold the same number of images of one size; they are {sorted(shapes)}"
        )
    count = shapes.pop()[0]
    columns = max(1, min(columns, count))
    font = ImageFont.load_default(size=20)
    width = max(int(font.getlength(label)) for label in rows) + 8
    bands = []
    for start in range(0, count, columns):
        for label, images in rows.items():
            part = images[start : start + columns]
            blank = np.full((columns - len(part), *part.shape[1:]), PAPER, np.uint8)
            strip = grid(np.concatenate([part, blank]), columns=columns, scale=scale)
            margin = Image.new("RGB", (width, len(strip)), (PAPER,) * 3)
            ImageDraw.Draw(margin).text(
                (4, len(strip) // 2), label, fill=(0, 0, 0), font=font, anchor="lm"
            )
            bands.append(np.concatenate([np.asarray(margin), strip], axis=1))
        if start + columns < count:
            bands.append(np.full((4 * _GAP, bands[-1].shape[1], 3), PAPER, np.uint8))
    return np.concatenate(bands)


def code_cells(codes: np.ndarray, *, values: int, size: int) -> np.ndarray:
    """Shows codes as squares of cells, a cell a position, a color a value.

    Args:
      codes: int [n, l], each in 0..values-1.
      size: side of a square in pixels.

    Returns:
      uint8 [n, size, size, 3].
    """
    count, length = codes.shape
    side = math.isqrt(length - 1) + 1
    # Neighboring values get hues far apart, by the golden ratio; lightness tells more of them apart
    # than hue alone.
    hues, lightness = [value * 0.618034 % 1 for value in range(values)], (0.35, 0.5, 0.65)
    colors = [colorsys.hls_to_rgb(hue, lightness[k % 3], 0.75) for k, hue in enumerate(hues)]
    palette = np.array([*colors, (PAPER / 255,) * 3]) * 255
    cells = np.full((count, side * side), values)  # what is left of the last row is empty
    cells[:, :length] = codes
    inner = max(1, size - 2 * (size // 12))  # a frame, so that one code ends where the next begins
    at = np.arange(inner) * side // inner
    squares = palette.round().astype(np.uint8)[cells.reshape(count, side, side)[:, at][:, :, at]]
    frame = ((size - inner) // 2, (size - inner + 1) // 2)
    return np.pad(squares, ((0, 0), frame, frame, (0, 0)), constant_values=PAPER)


def save_png(path: str | os.PathLike, array: np.ndarray) -> None:
    """Writes uint8 [y, x, c] as PNG; makes the directory. A reader never finds half a file."""
    with _replacing(path) as partial:
        Image.fromarray(_rgb(array)).save(partial, format="PNG", optimize=True)


def save_captions(directory: str | os.PathLike, captions: Mapping[str, str]) -> None:
    """Writes `captions.json`, {picture's file: one sentence}, for the report; makes the folder."""
    path = os.path.join(directory, "captions.json")
    with _replacing(path) as partial, open(partial, "w", encoding="utf-8") as file:
        json.dump(dict(captions), file, indent=2, ensure_ascii=False)


@contextlib.contextmanager
def _replacing(path: str | os.PathLike) -> Iterator[str]:
    """Another name to write under, which becomes `path` at the end. Errors get the name `path`."""
    partial = f"{os.fspath(path)}.partial"
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), os.fspath(path)) from error


def enlarge(images: np.ndarray, scale: int | None = None) -> np.ndarray:
    """Images uint8 [n, y, x, c] to three channels, every pixel `scale` x `scale` of them.

    None enlarges to about 64 pixels.
    """
    images = _rgb(images)
    if images.ndim != 4 or not len(images):
        raise ValueError(f"a picture needs one or more images, [n, y, x, c]; got {images.shape}")
    if scale is None:
        scale = max(1, _READABLE // max(images.shape[1:3]))
    return einops.repeat(images, "n y x c -> n (y s) (x t) c", s=scale, t=scale)


def _rgb(array: np.ndarray) -> np.ndarray:
    array = np.asarray(array)
    if array.dtype != np.uint8 or array.shape[-1] not in (1, 3):
        raise ValueError(
            f"a picture is uint8 with 1 or 3 channels last; got {array.dtype} {array.shape}"
        )
    return np.repeat(array, 3, axis=-1) if array.shape[-1] == 1 else array
