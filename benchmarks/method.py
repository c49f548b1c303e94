"""The pictures of docs/method.md, from the embedded data and the code: python benchmarks/method.py

They need no trained network: what is drawn of one is in docs/pictures already. Two seconds.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax import command, recipe
from dlc_jax.composition.groups import shared_out
from dlc_jax.composition.operators import Blocks, Chosen, Coin, Infill
from dlc_jax.data.shapes import Shapes
from dlc_jax.data.transforms import MultiCrop
from dlc_jax.diffusion.linear import Linear
from dlc_jax.diffusion.masked import Masked
from dlc_jax.diffusion.process import noised
from dlc_jax.evals.pictures import code_cells, labelled_rows, save_png

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
SHOWN, LENGTH, VALUES = 6, 36, 16
INK, BOX, LINE = "#1f2937", "#eef2ff", "#4f46e5"


def svg(width: int, height: int, parts: Sequence[str]) -> str:
    style = "font-family='system-ui,sans-serif' font-size='15' text-anchor='middle'"
    arrow = (
        "<marker id='a' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' markerHeight='7' "
        f"orient='auto'><path d='M0 0L8 4L0 8z' fill='{INK}'/></marker>"
    )
    inside = "\n".join(parts)
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' {style}>"
        f"<defs>{arrow}</defs><rect width='{width}' height='{height}' fill='white'/>\n"
        f"{inside}\n</svg>\n"
    )


def box(x: int, y: int, title: str, below: str = "", *, trained: bool = True) -> str:
    """A box of 168 x 56 with its center at (x, y); what is trained has a frame."""
    frame = f"stroke='{LINE}' stroke-width='2'" if trained else "stroke='none'"
    fill = BOX if trained else "#f3f4f6"
    shift = 4 if below else -5
    lines = [
        f"<rect x='{x - 84}' y='{y - 28}' width='168' height='56' rx='8' fill='{fill}' {frame}/>",
        f"<text x='{x}' y='{y - shift}' fill='{INK}' font-weight='600'>{title}</text>",
    ]
    if below:
        lines.append(f"<text x='{x}' y='{y + 16}' fill='{INK}' font-size='12'>{below}</text>")
    return "".join(lines)


def arrow(x0: int, y0: int, x1: int, y1: int) -> str:
    ends = f"x1='{x0}' y1='{y0}' x2='{x1}' y2='{y1}'"
    return f"<line {ends} stroke='{INK}' stroke-width='1.6' marker-end='url(#a)'/>"


def pipeline() -> str:
    """Who hands what to whom: the trained networks have a frame."""
    return svg(
        860,
        230,
        [
            box(95, 60, "images", trained=False),
            box(305, 60, "encoder", "learns without labels"),
            box(530, 60, "codes", "36 positions, values 0..15", trained=False),
            box(530, 175, "prior", "which codes occur"),
            box(755, 60, "generator", "draws an image of a code"),
            box(755, 175, "new images", trained=False),
            arrow(179, 60, 219, 60),
            arrow(389, 60, 444, 60),
            arrow(614, 60, 669, 60),
            arrow(515, 88, 515, 145),
            arrow(545, 147, 545, 90),
            arrow(755, 88, 755, 145),
        ],
    )


def simplices() -> str:
    """One position's scores over its values, at two temperatures, and the value that is kept."""
    logits = np.random.default_rng(5).normal(size=VALUES) * 0.8
    parts = []
    for row, temperature in enumerate((1.0, 0.3)):
        chances = np.asarray(jax.nn.softmax(jnp.asarray(logits) / temperature))
        left, floor = 150, 130 + 150 * row
        label = f"temperature {temperature:g}"
        parts.append(f"<text x='75' y='{floor - 40}' fill='{INK}'>{label}</text>")
        for value, chance in enumerate(chances):
            x, tall = left + 38 * value, 100 * chance / chances.max()
            color = LINE if value == chances.argmax() else "#c7d2fe"
            parts.append(
                f"<rect x='{x}' y='{floor - tall:.1f}' width='28' height='{tall:.1f}' "
                f"fill='{color}'/><text x='{x + 14}' y='{floor + 18}' font-size='12' "
                f"fill='{INK}'>{value}</text>"
            )
    parts.append(f"<text x='440' y='322' fill='{INK}'>the code keeps {logits.argmax()}</text>")
    return svg(780, 330, parts)


def crops(images: np.ndarray) -> np.ndarray:
    """The quickstart's kinds of crops of some images."""
    _, lines = command.read(str(ROOT / "configs" / "quickstart.py"))
    kinds = recipe.expand(lines).encoder.crops
    rows: dict[str, np.ndarray] = {"image": images}
    for kind, section in kinds.items():
        cut, rng = MultiCrop(**section), np.random.default_rng(0)
        rows[kind] = np.stack([cut({"image": each}, rng)["global"][0] for each in images])
    return labelled_rows(rows, columns=SHOWN)


def masked() -> np.ndarray:
    """A code on its way to noise: every position is hidden by itself, and is drawn gray."""
    codes = jnp.asarray(np.random.default_rng(0).integers(0, VALUES, (1, LENGTH)), jnp.int32)
    times = jnp.linspace(0.0, 1.0, SHOWN)
    keys = jax.random.split(jax.random.key(0), 1)
    noisy = [Masked().corrupt(codes, t[None], keys, values=VALUES)[0] for t in times]
    cells = code_cells(np.stack(noisy), values=VALUES, size=96)
    return labelled_rows({"t = 0 to 1": cells}, columns=SHOWN, scale=1)


def noise(image: np.ndarray) -> np.ndarray:
    """An image on the linear path."""
    x = jnp.asarray(image, jnp.float32) / 127.5 - 1
    eps, times = jax.random.normal(jax.random.key(0), x.shape), jnp.linspace(0.0, 1.0, SHOWN)
    path = [noised(Linear(), x[None], eps[None], t[None])[0] for t in times]
    pixels = np.clip(np.asarray(path) * 127.5 + 127.5, 0, 255).round().astype(np.uint8)
    return labelled_rows({"t = 0 to 1": pixels}, columns=SHOWN)


class Blank:
    """A prior that leaves open what it is asked to draw."""

    def sample(self, count, *, prompt, known, **how):
        return np.where(known, prompt, 2)

    def surprise(self, codes, **how):
        return np.zeros(codes.shape)


def composed() -> np.ndarray:
    """Where an operator takes each position from: A, B, or (gray) the prior draws it."""
    parents = [np.full((SHOWN, LENGTH), parent) for parent in (0, 1)]
    shares = {"form": {"share": 3}, "ground": {"share": 2}, "tint": {"share": 1}}
    groups = shared_out(shares, LENGTH)
    operators = {"coin": Coin(), "blocks": Blocks(), "infill": Infill(share=0.25)}
    operators["chosen"] = Chosen(groups=("form+ground", "tint"))
    rows = {"A": parents[0], "B": parents[1]}
    for name, operator in operators.items():
        rows[name] = operator(parents, Blank(), seed=0, groups=groups).codes
    cells = {name: code_cells(codes, values=2, size=96) for name, codes in rows.items()}
    return labelled_rows(cells, columns=SHOWN, scale=1)


def main() -> None:
    source = Shapes(split="train", image=16, count=SHOWN, seed=0)
    images = np.stack([source[index]["image"] for index in range(SHOWN)])
    for name, text in {"pipeline": pipeline(), "simplex": simplices()}.items():
        (PICTURES / f"method_{name}.svg").write_text(text)
    made = {"crops": crops(images), "masked": masked(), "noise": noise(images[0])}
    for name, picture in (made | {"composed": composed()}).items():
        save_png(PICTURES / f"method_{name}.png", picture)


if __name__ == "__main__":
    main()
