"""Numbers as colors, with the numbers written in: tables and square matrices, as PNG."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL, ROW, MATRIX = (64, 20), 20, 12  # pixels of a table's cell, of a line, of a matrix's cell
INK, DEEP = (28, 28, 30), np.array((31, 111, 209))
SCALE = 2  # pixels drawn for one


def table(
    rows: Sequence[str],
    columns: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    first: int | None = None,
    form: str = ".2f",
) -> np.ndarray:
    """A table whose columns stand in groups; a group has one scale, from 0 to its largest number.

    Args:
      rows: their labels.
      columns: {group: {column: a number for each row}}; nan is left empty.
      first: so many rows have one scale, and those below another; None is all.
      form: of the numbers.

    Returns:
      uint8 [y, x, 3], on white.
    """
    first = len(rows) if first is None else first
    left = 8 + max(_width(label) for label in rows)
    names = [name for group in columns.values() for name in group]
    wide = max(CELL[0], 12 + max(_width(name) for name in names))
    gap, top = 16, 2 * ROW + 8
    widths = {
        title: gap + max(wide * len(group), _width(title)) for title, group in columns.items()
    }
    page = _Page(left + sum(widths.values()) + 8, top + CELL[1] * len(rows) + 8)
    for number, label in enumerate(rows):
        page.text(left - 4, top + CELL[1] * (number + 0.5), label, "rm")
    for number, (title, group) in enumerate(columns.items()):
        x = left + gap + sum(list(widths.values())[:number])
        page.text(x, ROW / 2 + 2, title, "lm")
        numbers = np.array([*group.values()], float)
        largest = [np.nanmax([0.0, *part.ravel()]) for part in np.split(numbers, [first], axis=1)]
        for name, values in group.items():
            page.text(x + wide / 2, 1.5 * ROW + 4, name, "mm")
            for number, value in enumerate(values):
                box = (x, top + CELL[1] * number, x + wide - 1, top + CELL[1] * (number + 1) - 1)
                page.cell(box, value, largest[number >= first], f"{value:{form}}")
            x += wide
    return page.pixels()


def matrix(values: np.ndarray, title: str, *, every: int = 6) -> np.ndarray:
    """A square matrix as colors alone, from 0 to its largest entry off the diagonal.

    Args:
      every: so many rows and columns a number is written.
    """
    off = values[~np.eye(len(values), dtype=bool)]
    largest, left, top = max(off.max(), 0.0) if len(off) else 0.0, 32, 2 * ROW + 8
    size = MATRIX * len(values)
    title = f"{title}; darkest {largest:.2f}"
    page = _Page(max(left + size + 8, left + _width(title) + 8), top + size + 8)
    page.text(left, ROW / 2 + 2, title, "lm")
    for i, row in enumerate(values):
        if i % every == 0:
            page.text(left - 4, top + MATRIX * (i + 0.5), str(i), "rm")
            page.text(left + MATRIX * (i + 0.5), top - 10, str(i), "mm")
        for j, value in enumerate(row):
            x, y = left + MATRIX * j, top + MATRIX * i
            box = (x, y, x + MATRIX - 1, y + MATRIX - 1)
            page.cell(box, np.nan if i == j else value, largest, "")
    return page.pixels()


def beside(*pictures: np.ndarray) -> np.ndarray:
    """Pictures in a row, on white."""
    height = max(len(picture) for picture in pictures)
    padded = [
        np.pad(picture, ((0, height - len(picture)), (0, 0), (0, 0)), constant_values=255)
        for picture in pictures
    ]
    return np.concatenate(padded, axis=1)


class _Page:
    def __init__(self, width: float, height: float):
        self._image = Image.new("RGB", (int(SCALE * width), int(SCALE * height)), "white")
        self._draw = ImageDraw.Draw(self._image)

    def cell(self, box, value: float, largest: float, words: str) -> None:
        if np.isnan(value):
            return
        share = min(1.0, max(0.0, value / largest)) if largest else 0.0
        color = tuple((255 + share * (DEEP - 255)).astype(int).tolist())
        self._draw.rectangle([SCALE * edge for edge in box], fill=color)
        ink = (255, 255, 255) if share > 0.6 else INK
        self.text((box[0] + box[2]) / 2, (box[1] + box[3]) / 2, words, "mm", ink)

    def text(self, x: float, y: float, words: str, anchor: str, ink=INK) -> None:
        self._draw.text((SCALE * x, SCALE * y), words, ink, _font(), anchor)

    def pixels(self) -> np.ndarray:
        return np.asarray(self._image)


def _font():
    return ImageFont.load_default(size=13 * SCALE)


def _width(words: str) -> float:
    return _font().getlength(words) / SCALE
