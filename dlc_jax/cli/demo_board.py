"""What the page of `dlc demo` does, without the page: children of images, and their codes."""

import html
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dlc_jax.cli import compose
from dlc_jax.composition import OPERATORS
from dlc_jax.data import inputs
from dlc_jax.errors import UserError
from dlc_jax.evals import pictures

COUNT = 8  # children
PICKED = 16  # images to pick from
SLOTS = ("first", "second", "third")
COLORS = ("#4c78a8", "#f58518", "#54a24b")  # of positions, by the parent they agree with
NEITHER = "#e45756"
LEAST = 1e-3  # weight of an image at 0


def images(config) -> list[np.ndarray]:
    """Unseen images of the run's data to pick from; none where the data is not here."""
    try:
        return [image for image, _ in compose.unseen(config, range(PICKED))]
    except UserError as error:
        print(f"nothing to pick from, drop images of your own: {error}", flush=True)
        return []


class Children(NamedTuple):
    """What is shown of one composition.

    Attributes:
      images: [(uint8 [y, x, c], its caption)].
      table: HTML of the codes, a row for each parent and child.
    """

    images: list[tuple[np.ndarray, str]]
    table: str


class Board:
    """What the page does, without the page.

    Attributes:
      loaded: the run's pipeline.
      images: to pick from.
    """

    def __init__(self, loaded, images: Sequence[np.ndarray]):
        self.loaded, self.images = loaded, list(images)

    @property
    def operators(self) -> list[str]:
        """The run's own, as its recipe has it, and those that need only images and weights."""
        has_prior = self.loaded.prior in self.loaded.config
        able = [name for name, kind in OPERATORS.items() if has_prior or not kind.needs_prior]
        unable = {"chosen"} if self.loaded.groups else {"chosen", "blocks"}
        return [self.own, *(name for name in able if name not in {*unable, self.own})]

    @property
    def own(self) -> str:
        """The name of the run's operator."""
        return next(name for name, kind in OPERATORS.items() if type(self.loaded.operator) is kind)

    def picks(self) -> list[np.ndarray]:
        """`images` as large as they are shown."""
        return list(pictures.enlarge(np.stack(self.images))) if self.images else []

    def children(
        self,
        parents: Sequence[np.ndarray | None],
        weights: Sequence[float],
        operator: str,
        keep: Sequence[str],
        seed: int,
    ) -> Children:
        """Composes images.

        Args:
          parents: uint8 [y, x, c] of any size, or None for a slot that is empty.
          weights: of each slot.
          operator: a name of `operators`.
          keep: groups, numbers and ranges "0-11" of positions of the first parent.

        Raises:
          UserError: fewer than two parents, positions that are not there.
        """
        filled = [number for number, parent in enumerate(parents) if parent is not None]
        how = self.loaded.operator if operator == self.own else OPERATORS[operator]()
        if len(filled) < (1 if how.needs_prior else 2):
            raise UserError(f"give two images or more; {operator} mixes codes of several")
        shares = [max(float(weights[number]), LEAST) for number in filled]
        own = inputs.fit([parents[number] for number in filled], size=self.loaded.size)
        codes = self.loaded.encode(own)
        given = codes
        if hasattr(how, "temperature"):  # of simplices
            given = self.loaded.simplices(own, temperature=how.temperature)
        rows = [np.repeat(each[None], COUNT, 0) for each in given]
        settings = {"weights": shares, "keep": list(keep), "seed": int(seed)}
        found, bits = self.loaded.compose(rows, operator=how, **settings)
        drawn = pictures.enlarge(self.loaded.decode(found, seed=int(seed) + 1))
        said = [""] * COUNT if bits is None else [f"{each:.2f} bits a position" for each in bits]
        names = [SLOTS[number] for number in filled]
        colors = [COLORS[number] for number in filled]
        return Children(list(zip(drawn, said)), table(codes, names, colors, found))


def table(
    parents: np.ndarray, names: Sequence[str], colors: Sequence[str], children: np.ndarray
) -> str:
    """HTML: a child's positions have the color of the first parent that has the same value there.

    Args:
      parents: codes int [p, l].
      names: of the parents.
      colors: of the parents.
      children: codes int [n, l].
    """
    lines = []
    for name, color, code in zip(names, colors, parents, strict=True):
        lines.append(_row(name, code, [color] * len(code)))
    for number, code in enumerate(children, start=1):
        same = parents == code
        cells = np.where(same.any(0), same.argmax(0), -1)
        lines.append(_row(f"child {number}", code, [[*colors, NEITHER][each] for each in cells]))
    return f'<table class="codes">{"".join(lines)}</table>'


def _row(name: str, code: np.ndarray, colors: Sequence[str]) -> str:
    cell = "color:white;background:{};padding:1px 4px;text-align:right"
    cells = [f'<td style="{cell.format(color)}">{value}</td>' for value, color in zip(code, colors)]
    return f"<tr><th>{html.escape(name)}</th>{''.join(cells)}</tr>"
