"""The judge of the embedded data set: which factors an image shows, and whether it is of the set.

It compares with every rendering. A rendering is background + coverage * (color - background), so
for one coverage and one pair of background and color the squared distance is a polynomial in the
color, and the best hue within the nuisance range is found in closed form. Coverages lie on a grid
over shape, size, position and the nuisances shift, size and rotation; from the best one,
Gauss-Newton steps leave the grid. Nothing here is learned.

**Distance**: root mean square over pixels and channels to the nearest rendering, in units of [0, 1]
colors. A real image's is what rounding to 8 bits leaves, below 0.002.

**Validity**: nearer to the set than 99 % of each kind of bad image (`counterexamples.bad`). So
`THRESHOLD`, one number per image size, is the 1st percentile of the distance of the nearest kind,
which is blurs in which the shape is lost, rounded down. That real images fall below it is then not
arranged but checked. It was set from real and bad images before any model was trained, and is never
to be changed for one. `calibration` repeats how it was set, `Judge.proof` tries other images.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from dlc_jax.data import shapes
from dlc_jax.data.counterexamples import bad
from dlc_jax.errors import UserError

THRESHOLD = {16: 0.065, 32: 0.072}  # rms, units of [0, 1] colors

_SHIFTS, _SCALES, _ROTATIONS = 5, 3, 5  # points of the nuisance grid, ends included
_PAIRS = 4  # pairs of background and color, of 24, that are tried on the whole grid
_REFINEMENTS = 5  # Gauss-Newton steps
_DIFFERENCE = 0.05  # of a nuisance's range, for its slope
_CHUNK = 64  # images judged at once


class Reading(NamedTuple):
    """What the judge sees.

    Attributes:
      factors: int32 [n, 4 or 5], in the order of `shapes.NAMES`.
      distance: float32 [n], to the nearest rendering.
      valid: bool [n].
    """

    factors: np.ndarray
    distance: np.ndarray
    valid: np.ndarray


class Judge:
    """Reads images of one size.

    Args:
      image: the side in pixels; one of `THRESHOLD`.
      positions: look for the object at all 9 positions, and read which one; otherwise at the
        center.

    Attributes:
      held_out: the combinations (shape, color, background) that training never shows.

    Raises:
      UserError: no threshold was set for this size.
    """

    held_out = shapes.HELD_OUT

    def __init__(self, *, image: int = 16, positions: bool = False):
        if image not in THRESHOLD:
            raise UserError(
                f"judge: image={image} has no validity threshold; use one of "
                f"{', '.join(map(str, THRESHOLD))}"
            )
        self.image, self.positions, self.threshold = image, positions, THRESHOLD[image]
        kinds = [
            (shape, 0, 0, size) + ((position,) if positions else ())
            for shape in range(6)
            for size in range(2)
            for position in range(9 if positions else 1)
        ]
        factors, nuisances = [], []
        for kind in kinds:
            grid = _grid(turns=kind[0] > 1)  # a turned disc or ring is the same one
            factors.append(np.tile(np.array(kind, np.int32), (len(grid), 1)))
            nuisances.append(grid)
        self._factors = np.concatenate(factors)
        self._nuisances = np.concatenate(nuisances)
        masks = shapes.coverage(self._factors, self._nuisances, image=image).reshape(
            len(self._factors), -1
        )
        self._bank, self._coarse = _Bank(masks), _Bank(masks[np.all(self._nuisances == 0, axis=1)])

    def read(self, images: np.ndarray) -> Reading:
        """Reads images, uint8 [n, y, x, c]; ValueError if they are of another size or type."""
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.shape[1:] != (self.image, self.image, 3):
            raise ValueError(
                f"the judge reads uint8 [n, {self.image}, {self.image}, 3]; got {images.dtype} "
                f"{list(images.shape)}"
            )
        parts = [
            self._read(images[start : start + _CHUNK]) for start in range(0, len(images), _CHUNK)
        ]
        if not parts:
            return Reading(
                np.zeros((0, self._factors.shape[1]), np.int32),
                np.zeros(0, np.float32),
                np.zeros(0, bool),
            )
        factors, distance = (np.concatenate(column) for column in zip(*parts))
        return Reading(factors, distance, distance <= self.threshold)

    def proof(self, count: int = 500, *, seed: int = 2) -> Mapping[str, float]:
        """Tries the judge on images whose truth is known, and which `calibration` did not use.

        Returns:
          accepted_seen, accepted_held_out: share of real images judged valid.
          rejected_{kind}: share of bad images, made of held-out ones, judged not valid.
          read_seen_{factor}, read_held_out_{factor}: share whose factor is read right.
          told_{factor}: of images painted with this one factor altered, share in which it is read
            as another than the one claimed.
          count: images in each.
        """
        random = np.random.default_rng(seed)
        result: dict[str, float] = {}
        for name, split in (("seen", "validation"), ("held_out", "held_out")):
            factors, nuisances = shapes.draw(
                np.arange(count), split=split, seed=seed, positions=self.positions
            )
            images = shapes.render(factors, nuisances, image=self.image)
            reading = self.read(images)
            result[f"accepted_{name}"] = float(reading.valid.mean())
            for factor, right in zip(shapes.NAMES, (reading.factors == factors).mean(axis=0)):
                result[f"read_{name}_{factor}"] = float(right)
        for kind, wrong in bad(images, factors, seed=seed).items():
            result[f"rejected_{kind}"] = float(1 - self.read(wrong).valid.mean())
        for column, (factor, names) in zip(range(factors.shape[1]), shapes.NAMES.items()):
            changed = factors.copy()
            changed[:, column] = (changed[:, column] + random.integers(1, len(names), count)) % len(
                names
            )
            reading = self.read(shapes.render(changed, nuisances, image=self.image))
            result[f"told_{factor}"] = float(
                (reading.factors[:, column] != factors[:, column]).mean()
            )
        return result | {"count": count}

    def _read(self, images):
        pixels = np.float32(images.reshape(len(images), -1, 3)) / 255
        # The pairs are narrowed down on one nominal coverage of each kind: the nuisances change it
        # little, another pair much.
        products = self._coarse.products(pixels)
        coarse = [
            self._coarse.nearest(pixels, np.full(len(images), pair), products=products)[0]
            for pair in range(24)
        ]
        pairs = np.argsort(coarse, axis=0, kind="stable")[:_PAIRS]
        products = self._bank.products(pixels)
        square, mask, hue = map(
            np.stack, zip(*(self._bank.nearest(pixels, pair, products=products) for pair in pairs))
        )
        chosen = np.argmin(square, axis=0), np.arange(len(images))
        factors, nuisances = self._factors[mask[chosen]], self._nuisances[mask[chosen]]
        factors[:, 1], factors[:, 2] = np.divmod(pairs[chosen], 4)
        nuisances[:, 2] = hue[chosen]
        return factors, _refined(pixels, factors, nuisances, image=self.image)


def _grid(*, turns):
    """The nuisances [k, 5] at which coverage is laid out; hue is solved for instead."""
    shift = np.linspace(-1, 1, _SHIFTS)
    axes = (
        shift,
        shift,
        [0.0],
        np.linspace(-1, 1, _SCALES),
        np.linspace(-1, 1, _ROTATIONS) if turns else [0.0],
    )
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 5) * shapes.NUISANCES


class _Bank:
    """Coverages [k, pixels] and the squared distance of images to what can be painted with them."""

    def __init__(self, masks):
        self.masks = masks
        self.sum, self.square = masks.sum(axis=1), np.square(masks).sum(axis=1)

    def products(self, pixels):
        """Inner products [c, n, k] of images [n, pixels, c] with coverages."""
        # Strided is ten times slower.
        return np.stack([np.ascontiguousarray(pixels[..., c]) @ self.masks.T for c in range(3)])

    def nearest(self, pixels, pairs, *, products):
        """Nearest rendering, given each image's pair, color * 4 + background.

        Returns squared distance, coverage, and hue in degrees, each [n].
        """
        color, below = pairs // 4, np.float32(shapes.BACKGROUNDS[pairs % 4])
        pure = np.float32(shapes.paint(np.arange(6), np.zeros(6)))
        rise = pure[color] - below  # [n, c]
        # With r = image - background, m the coverage: |r - m rise|^2 = |r|^2 - 2 <r, m> rise +
        # |m|^2 |rise|^2.
        inner = (
            sum(products[c] * rise[:, c, None] for c in range(3))
            - np.sum(below * rise, axis=1)[:, None] * self.sum
        )
        base = self.square * np.sum(rise * rise, axis=1)[:, None] - 2 * inner
        rows = np.arange(len(pixels))
        best, mask, hue = np.full(len(rows), np.inf), np.zeros(len(rows), int), np.zeros(len(rows))
        for turn in (-1, 1):
            # Toward the neighboring hue one channel alone changes: rise + u step, u up to the hue
            # nuisance. Best u, clipped.
            step = pure[(color + turn) % 6] - pure[color]
            c = np.argmax(np.abs(step), axis=1)
            s = step[rows, c][:, None]
            slope = s * (
                products[c, rows]
                - below[rows, c][:, None] * self.sum
                - self.square * rise[rows, c][:, None]
            )
            curve = self.square * s * s
            u = np.clip(slope / curve, 0, np.float32(shapes.HUE / 60))
            value = base - u * (2 * slope - u * curve)
            k = np.argmin(value, axis=1)
            nearer = value[rows, k] < best
            best, mask = np.where(nearer, value[rows, k], best), np.where(nearer, k, mask)
            hue = np.where(nearer, 60 * turn * u[rows, k], hue)
        return best + np.square(pixels - below[:, None]).sum(axis=(1, 2)), mask, hue


def _refined(pixels, factors, nuisances, *, image):
    """Distance [n] after the nuisances have left the grid.

    Damped Gauss-Newton within their ranges; the distance never grows.
    """

    def error(z):
        below = shapes.BACKGROUNDS[factors[:, 2]]
        above = shapes.paint(factors[:, 1], z[:, 2] * shapes.HUE)
        mask = shapes.coverage(factors, z * shapes.NUISANCES, image=image).reshape(len(z), -1, 1)
        return (
            np.float32(below)[:, None] + mask * np.float32(above - below)[:, None] - pixels
        ).reshape(len(z), -1)

    z = nuisances / shapes.NUISANCES
    now = error(z)
    square = np.square(now).sum(axis=1)
    damping = np.full(len(z), 1e-3)
    for _ in range(_REFINEMENTS):
        slopes = np.stack(
            [(error(z + h) - error(z - h)) / (2 * _DIFFERENCE) for h in _DIFFERENCE * np.eye(5)],
            axis=-1,
        )
        normal = np.einsum("npi,npj->nij", slopes, slopes, optimize=True).astype(np.float64)
        diagonal = np.einsum("nii->ni", normal) + 1e-6  # a disc does not feel its rotation
        normal += np.eye(5) * (damping[:, None] * diagonal + 1e-6)[:, None]
        move = np.linalg.solve(normal, np.einsum("npi,np->ni", slopes, now)[..., None])[..., 0]
        there = np.clip(z - move, -1, 1)
        then = error(there)
        less = np.square(then).sum(axis=1)
        better = less < square
        z[better], now[better], square[better] = there[better], then[better], less[better]
        damping *= np.where(better, 0.2, 10.0)
    return np.sqrt(square / now.shape[1])


def calibration(*, image: int, count: int = 1000, seed: int = 1) -> Mapping[str, float]:
    """Repeats how `THRESHOLD` was set: percentiles of distances of real and of bad images.

    `count` images of seen combinations and as many of held-out ones, each by itself, since contrast
    differs with the combination.

    Returns:
      `real_99`, the greater, `{kind}_1` for each kind, the lesser, and `threshold`, the least
      `{kind}_1`; units of [0, 1] colors.
    """
    judge = Judge(image=image)
    high, low = [], []
    for split in ("validation", "held_out"):
        factors, nuisances = shapes.draw(np.arange(count), split=split, seed=seed)
        images = shapes.render(factors, nuisances, image=image)
        high.append(np.percentile(judge.read(images).distance, 99))
        low.append(
            {
                kind: np.percentile(judge.read(x).distance, 1)
                for kind, x in bad(images, factors, seed=seed).items()
            }
        )
    least = {f"{kind}_1": float(min(part[kind] for part in low)) for kind in low[0]}
    return {"real_99": float(max(high)), **least, "threshold": min(least.values())}
