"""Figures as PNG: values with error bars over a setting, a panel for each."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dlc_jax.report.chart import ticks

WIDTH, HEIGHT = 480, 300  # of a panel
LEFT, RIGHT, TOP, BOTTOM = 72, 456, 44, 250  # of its axes
APART = 34  # of labels below the axis
SCALE = 2  # pixels drawn for one
INK, FAINT, RULE, BLUE = (28, 28, 30), (107, 107, 112), (216, 216, 220), (31, 111, 209)
Point = tuple[float, float, float | None]  # setting, value, error or None


def panels(series: Mapping[str, Sequence[Point]], *, under: str, columns: int = 3) -> np.ndarray:
    """A panel for each of the series, on white.

    Args:
      series: title -> points in ascending order of the setting. Error bars are +- one error.
      under: what the setting is, written below each.
      columns: panels in a row.

    Returns:
      uint8 [y, x, 3].

    Raises:
      ValueError: a series without points.
    """
    columns = min(columns, len(series))
    size = columns * WIDTH, math.ceil(len(series) / columns) * HEIGHT
    image = Image.new("RGB", (SCALE * size[0], SCALE * size[1]), "white")
    for number, (title, points) in enumerate(series.items()):
        row, column = divmod(number, columns)
        _Panel(image, column * WIDTH, row * HEIGHT).draw(title, points, under)
    return np.asarray(image)


class _Panel:
    def __init__(self, image, left, top):
        self._draw, self._corner = ImageDraw.Draw(image), (left, top)

    def draw(self, title: str, points: Sequence[Point], under: str) -> None:
        low, high = _span([y + sign * (error or 0) for _, y, error in points for sign in (-1, 1)])
        first, last = _span([x for x, _, _ in points])

        def at(x, y):
            right, up = (x - first) / (last - first), (y - low) / (high - low)
            return LEFT + right * (RIGHT - LEFT), BOTTOM - up * (BOTTOM - TOP)

        self._text(LEFT, TOP - 16, title, "lm", INK, 16)
        for tick in ticks(low, high, 5):
            _, y = at(first, tick)
            self._line([(LEFT, y), (RIGHT, y)], RULE, 1)
            self._text(LEFT - 8, y, f"{tick:g}", "rm", FAINT, 13)
        right = 0.0
        for x, _, _ in points:
            if at(x, low)[0] >= right:  # labels do not overlap
                self._text(at(x, low)[0], BOTTOM + 14, f"{x:g}", "mm", FAINT, 13)
                right = at(x, low)[0] + APART
        self._text((LEFT + RIGHT) / 2, BOTTOM + 36, under, "mm", FAINT, 13)
        self._line([at(x, y) for x, y, _ in points], BLUE, 2)
        for x, y, error in points:
            right, up = at(x, y)
            if error:
                ends = [at(x, y - error)[1], at(x, y + error)[1]]
                self._line([(right, ends[0]), (right, ends[1])], BLUE, 2)
                for end in ends:
                    self._line([(right - 4, end), (right + 4, end)], BLUE, 2)
            box = [self._at(right - 3.5, up - 3.5), self._at(right + 3.5, up + 3.5)]
            self._draw.ellipse(box, fill=BLUE)

    def _at(self, x, y):
        return SCALE * (self._corner[0] + x), SCALE * (self._corner[1] + y)

    def _line(self, points, color, width):
        if len(points) > 1:
            self._draw.line([self._at(*point) for point in points], color, SCALE * width)

    def _text(self, x, y, words, anchor, color, size):
        font = ImageFont.load_default(size=SCALE * size)
        self._draw.text(self._at(x, y), words, color, font, anchor)


def _span(values: Sequence[float]) -> tuple[float, float]:
    """(low, high) with room around the values."""
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or abs(low) / 2 or 0.5
    return low - room, high + room
