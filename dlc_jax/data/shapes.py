"""The embedded data set: a shape on a flat background, with known factors and nuisances.

An example is a pure function of (seed, split, index): a counter-based generator draws its factors
and its nuisances, and analytic coverage of the outline paints it, anti-aliased, at any size from 16
pixels. So the set is endless, needs no file, can be read in any order, and no two images are equal.
Lengths are in units of the image's side; x points right, y points down.

Factors: shape 6, color 6 (hues), background 4, size 2 and, if asked for, position 9 (a 3x3 grid;
otherwise the center). Nuisances: shift in x and y, hue, size and rotation, uniform in plus or minus
`SHIFT`, `HUE`, `SCALE`, `ROTATION`.
"""

import functools
import threading

import numpy as np

from dlc_jax.errors import UserError

NAMES = {
    "shape": ("disc", "ring", "square", "triangle", "cross", "bar"),
    "color": ("red", "yellow", "green", "cyan", "blue", "magenta"),
    "background": ("black", "gray", "white", "brown"),
    "size": ("small", "large"),
    "position": tuple(
        "top left,top,top right,left,center,right,bottom left,bottom,bottom right".split(",")
    ),
}

# (shape, color, background) that training never shows. Every shape is here 3 or 4 times, every
# color 3 or 4, every background 5 or 6, and no pair of two factors more than once: each pair is
# also seen in training, only the triple is new.
HELD_OUT = tuple(
    tuple(map(int, digits))
    for digits in (
        "000 011 023 052 101 120 133 142 202 210 241 321 332 343 350 412 431 440 453 503 522 551"
    ).split()
)

SHIFT = 1 / 32  # half a pixel at 16 pixels
HUE = 10.0  # degrees; neighboring colors are 60 apart
SCALE = 0.06  # of the radius; the two sizes differ by 1.42
ROTATION = 10.0  # degrees
NUISANCES = np.array([SHIFT, SHIFT, HUE, SCALE, ROTATION])

RADII = np.array([0.26, 0.37])
SPREAD = 0.10  # between neighbors of the position grid
BACKGROUNDS = np.array([[0.0, 0.0, 0.0], [0.5, 0.5, 0.5], [1.0, 1.0, 1.0], [0.36, 0.22, 0.10]])
DARK, BRIGHT = 0.05, 0.95  # least and greatest channel of an object's color

SPLITS = ("train", "validation", "held_out")
CACHE_BYTES = 2**30
_CHUNK = 256  # images painted at once: their pixels stay in the processor's cache
_LOCK = threading.Lock()  # of the module, so that a source stays picklable


def combinations(*, held_out: bool) -> np.ndarray:
    """(shape, color, background) triples: int32 [22, 3] if `held_out`, else the other [122, 3]."""
    everything = np.stack(np.unravel_index(np.arange(144), (6, 6, 4)), axis=-1).astype(np.int32)
    chosen = np.array([tuple(triple) in set(HELD_OUT) for triple in everything.tolist()])
    return everything[chosen == held_out]


def _mix(x):
    """SplitMix64's finalizer, uint64 -> uint64.

    Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _uniform(indices, *, split, seed, fields):
    """Draws [n, fields] in [0, 1), each a function of (seed, split, index, field) alone."""
    gamma = np.uint64(0x9E3779B97F4A7C15)
    # Arrays wrap silently.
    key = _mix(_mix(np.array([seed % 2**64], np.uint64)) + gamma * np.array([split + 1], np.uint64))
    example = _mix(key + gamma * np.asarray(indices).astype(np.uint64))
    bits = _mix(example[:, None] + gamma * np.arange(1, fields + 1, dtype=np.uint64))
    return (bits >> np.uint64(11)) * 2.0**-53


def draw(
    indices: np.ndarray, *, split: str, seed: int = 0, positions: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Factors and nuisances of examples by index; the same for any grouping of the indices.

    Args:
      indices: int [n], from 0 on, without upper end.
      split: "train" and "validation" have the same combinations and different draws; "held_out" has
        the others.
      seed: another seed, another data set.
      positions: draw a position of the 3x3 grid too.

    Returns:
      factors int32 [n, 4] (5 with positions) in the order of `NAMES`; nuisances float64 [n, 5]: x,
      y, hue, size, rotation.

    Raises:
      UserError: unknown split.
    """
    if split not in SPLITS:
        raise UserError(f"data shapes: unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    u = _uniform(indices, split=SPLITS.index(split), seed=seed, fields=8)
    triples = combinations(held_out=split == "held_out")
    columns = [triples[(u[:, 0] * len(triples)).astype(np.int64)], (u[:, 1:2] * 2).astype(np.int32)]
    if positions:
        columns.append((u[:, 2:3] * 9).astype(np.int32))
    return np.concatenate(columns, axis=1), (2 * u[:, 3:] - 1) * NUISANCES


def _distance(shape, x, y):
    """Signed distance to the outline of a shape of radius 1, negative inside.

    Exact along edges, a bound at corners.
    """
    if shape == 0:
        return np.hypot(x, y) - 1.0
    if shape == 1:
        return np.abs(np.hypot(x, y) - 0.775) - 0.225  # the hole has radius 0.55
    # Equilateral, circumradius 1.25, moved down by 0.2 so that its height is centered.
    if shape == 3:
        y = y - 0.2
        return np.maximum(y, np.abs(x) * (3**0.5 / 2) - y * 0.5) - 0.625
    x, y = np.abs(x), np.abs(y)
    if shape == 2:
        return np.maximum(x, y) - 0.88
    if shape == 4:
        return np.minimum(np.maximum(x - 1.0, y - 0.34), np.maximum(x - 0.34, y - 1.0))
    return np.maximum(x - 1.0, y - 0.36)


def coverage(factors: np.ndarray, nuisances: np.ndarray, *, image: int) -> np.ndarray:
    """The share of each pixel that the object covers, float32 [n, y, x]; colors are not read."""
    factors, nuisances = np.asarray(factors), np.asarray(nuisances, np.float32)
    shape, size = factors[:, 0], factors[:, 3]
    center = np.full((len(factors), 2), 0.5, np.float32) + nuisances[:, :2]
    if factors.shape[1] > 4:
        center += SPREAD * (np.stack([factors[:, 4] % 3, factors[:, 4] // 3], axis=-1) - 1)
    radius = (RADII[size] * (1 + nuisances[:, 3])).astype(np.float32)
    angle = np.deg2rad(nuisances[:, 4])
    cos, sin = (np.float32(f(angle) / radius)[:, None, None] for f in (np.cos, np.sin))
    grid = (np.arange(image, dtype=np.float32) + 0.5) / image
    out = np.empty((len(factors), image, image), np.float32)
    for s in np.unique(shape):
        i = np.flatnonzero(shape == s)
        x = grid[None, None, :] - center[i, 0, None, None]
        y = grid[None, :, None] - center[i, 1, None, None]
        d = _distance(s, cos[i] * x + sin[i] * y, cos[i] * y - sin[i] * x)
        d *= -image * radius[i, None, None]  # now in pixels, positive inside
        d += 0.5
        # A straight edge sweeps one pixel, as a box filter sees it.
        out[i] = np.clip(d, 0.0, 1.0, out=d)
    return out


def paint(color: np.ndarray, hue: np.ndarray) -> np.ndarray:
    """Colors in [0, 1], float64 [n, 3], of color indices [n] and hue nuisances [n] in degrees."""
    turn = (np.asarray(color) + np.asarray(hue) / 60)[:, None] - np.array([3.0, 2.0, 4.0])
    distance = np.abs((turn + 3) % 6 - 3)  # on the circle of 6, from cyan, green, blue
    distance[:, 0] = 3 - distance[:, 0]  # red's channel is farthest from cyan
    return DARK + (BRIGHT - DARK) * np.clip(2 - distance, 0, 1)


def render(factors: np.ndarray, nuisances: np.ndarray, *, image: int = 16) -> np.ndarray:
    """Paint examples.

    Args:
      factors: int [n, 4 or 5], nuisances: float [n, 5], as `draw` returns them.
      image: the side in pixels, at least 16.

    Returns:
      uint8 [n, y, x, c], RGB.

    Raises:
      UserError: image below 16 pixels, where shapes cannot be told apart.
    """
    if image < 16:
        raise UserError(
            f"data shapes: image={image} is too small to tell shapes apart; use 16 or more"
        )
    out = np.empty((len(factors), image, image, 3), np.uint8)
    chunk = max(1, _CHUNK * 256 // image**2)
    for start in range(0, len(factors), chunk):
        f = np.asarray(factors[start : start + chunk])
        z = np.asarray(nuisances[start : start + chunk])
        below = np.float32(255 * BACKGROUNDS[f[:, 2]])
        above = np.float32(255 * paint(f[:, 1], z[:, 2]))
        mask = coverage(f, z, image=image)
        for c in range(3):
            out[start : start + chunk, ..., c] = (
                below[:, c, None, None] + mask * (above - below)[:, c, None, None] + 0.5
            )
    return out


def caption(factors: np.ndarray) -> str:
    """One example's factors, int [4 or 5], in words: "a large red ring on a white background".

    The position comes last.
    """
    words = {name: values[i] for (name, values), i in zip(NAMES.items(), factors)}
    text = "a {size} {color} {shape} on a {background} background".format(**words)
    return f"{text}, {words['position']}" if "position" in words else text


class Shapes:
    """Random-access source of the first `count` examples of a split.

    An example is {"image": uint8 [y, x, c], "index": int, "factors": int32 [4 or 5]}; its arrays
    are read-only views. A set below 1 GB is rendered whole at its first use, so that reading is a
    look-up; a larger one is rendered example by example.

    Args:
      split: "train", "validation" or "held_out".
      image: side of the images in pixels, at least 16.
      count: how many examples there are. The first ones do not depend on it.
      seed: number of the data set: another seed, other examples.
      positions: whether each example also has a position on a 3x3 grid.

    Raises:
      UserError: unknown split, image below 16, no examples.
    """

    def __init__(
        self,
        *,
        split,
        image: int = 16,
        count: int = 20000,
        seed: int = 0,
        positions: bool = False,
    ):
        if count < 1:
            raise UserError(f"data shapes: count={count}; ask for at least one example")
        self.split, self.image, self.count, self.seed = split, image, count, seed
        self.positions = positions
        # A wrong split or size is reported here, not in the middle of a run.
        self._examples(np.arange(1))

    def _examples(self, indices):
        factors, nuisances = draw(
            indices, split=self.split, seed=self.seed, positions=self.positions
        )
        images = render(factors, nuisances, image=self.image)
        for array in (images, factors):
            array.setflags(write=False)
        return images, factors

    @functools.cached_property
    def _everything(self):
        return self._examples(np.arange(self.count))

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        index = int(index)
        if not 0 <= index < self.count:
            raise IndexError(f"index {index} of {self.count} examples")
        if self.count * self.image**2 * 3 >= CACHE_BYTES:
            images, factors = self._examples(np.array([index]))
            return {"image": images[0], "index": index, "factors": factors[0]}
        if "_everything" not in self.__dict__:
            with _LOCK:  # reader threads arrive together; one renders
                self._everything  # noqa: B018
        images, factors = self._everything
        return {"image": images[index], "index": index, "factors": factors[index]}

    def __getstate__(self):
        # A worker process renders its own.
        return {k: v for k, v in self.__dict__.items() if k != "_everything"}

    def __repr__(self):
        """Names the data, not the object: Grain's checkpoints hold it and compare it at restore."""
        names = ("split", "image", "count", "seed", "positions")
        return f"Shapes({', '.join(f'{n}={getattr(self, n)!r}' for n in names)})"
