"""Where tokens are: tables of positions, rotary angles, bicubic resizes of learned positions."""

import math

import jax.numpy as jnp
import numpy as np

from dlc_jax.errors import UserError
from dlc_jax.typing import Array, Float


def sincos_2d(rows: int, cols: int, width: int, *, extent: int | None = None) -> np.ndarray:
    """Positions of a grid as constants, [rows * cols, width] float32.

    First of the column, then of the row, each [sin | cos] of width/4 frequencies. `extent` is the
    side of the grid that the model was made for; another grid is stretched over it.

    Raises:
      UserError: the width is not a multiple of 4.
    """
    if width % 4:
        raise UserError(f"width {width} is not a multiple of 4, which sine-cosine positions need")
    frequency = 1e4 ** (-np.arange(width // 4) / (width // 4))
    y, x = ((np.arange(size) + 0.5) * (extent or size) / size - 0.5 for size in (rows, cols))
    # [n, (column, row), frequency]
    grid = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2, 1) * frequency
    table = np.stack([np.sin(grid), np.cos(grid)], axis=2)
    return table.reshape(rows * cols, width).astype(np.float32)


def rotary(
    n: int, k: int, *, period: float = 1e4
) -> tuple[Float[Array, "n half"], Float[Array, "n half"]]:
    """Cosines and sines of the rotary angles of n tokens, [n, k/2] each (arXiv 2104.09864).

    k is the width of a head.

    Raises:
      UserError: k is odd.
    """
    if k % 2:
        raise UserError(
            f"heads of width {k} cannot be rotated in pairs; "
            "choose width and heads so that width / heads is even"
        )
    angle = np.arange(n)[:, None] * period ** (-np.arange(k // 2) / (k // 2))
    return jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32)


def axial_rotary(
    side: int, k: int, *, before: int = 0, period: float = 100.0
) -> tuple[Float[Array, "n half"], Float[Array, "n half"]]:
    """Cosines and sines of rotary angles of a square grid of patches (DINOv3, arXiv 2508.10104).

    They are [before + side^2, k/2] each, for heads of width k.
    A patch's center lies at y and x in -1..1, whatever the size of the image. The angles are 2 pi y
    and 2 pi x over k/4 periods each, which rise geometrically from 1 to nearly `period`.

    Args:
      before: tokens before the patches, which are not turned: class token and registers.

    Raises:
      UserError: k is not a multiple of 4.
    """
    if k % 4:
        raise UserError(
            f"heads of width {k} cannot be turned along two axes; "
            "make width / heads a multiple of 4"
        )
    place = 2 * (np.arange(side) + 0.5) / side - 1
    center = np.stack(np.meshgrid(place, place, indexing="ij"), axis=-1).reshape(-1, 2, 1)
    angle = (2 * np.pi * center * period ** (-np.arange(k // 4) / (k // 4))).reshape(-1, k // 2)
    angle = np.concatenate([np.zeros((before, k // 2)), angle])
    return jnp.asarray(np.cos(angle), jnp.float32), jnp.asarray(np.sin(angle), jnp.float32)


def cubic_matrix(target: int, source: int, *, antialias: bool, offset: float = 0.0) -> np.ndarray:
    """Weights [target, source], float64, that resize a row of numbers as torch's bicubic does.

    Number i of the target lies at s (i + 1/2) of the source, s = source / target, and the weight of
    number j is Keys' cubic kernel of its distance from there. With antialias a = -1/2, the kernel
    is s times as wide when s > 1, and weights beyond the edges are left out and the others grow to
    add up to 1. Without it a = -3/4, always four weights, and those beyond the edges go to the
    numbers there. With an offset, s = source / (target + offset).
    """
    step = source / (target + offset)
    center = step * (np.arange(target)[:, None] + 0.5) - 0.5
    if antialias:
        weight = _cubic((np.arange(source) - center) / max(step, 1.0), -0.5)
        return weight / weight.sum(axis=1, keepdims=True)
    near = np.floor(center).astype(int) + np.arange(-1, 3)
    weight = np.zeros((target, source))
    index = np.arange(target)[:, None], near.clip(0, source - 1)
    np.add.at(weight, index, _cubic(near - center, -0.75))
    return weight


def _cubic(x, a):
    """Keys' kernel: 1 at 0, 0 at other integers and beyond 2 (IEEE Trans. ASSP 29, 1981)."""
    x = np.abs(x)
    inner, outer = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))


def resize(
    table: Float[Array, "n d"], side: int, *, antialias: bool, offset: float = 0.0
) -> Float[Array, "m d"]:
    """Positions of a square grid, resized to one of `side` in float32; see `cubic_matrix`."""
    base = math.isqrt(len(table))
    weight = cubic_matrix(side, base, antialias=antialias, offset=offset).astype(np.float32)
    grid = table.astype(jnp.float32).reshape(base, base, -1)
    sized = jnp.einsum("yr,xc,rcd->yxd", weight, weight, grid, precision="highest")
    return sized.reshape(side * side, -1)
