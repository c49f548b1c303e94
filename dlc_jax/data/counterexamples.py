"""Bad images, made of those of the embedded data set: its judge is tried on them."""

from collections.abc import Mapping

import numpy as np

from dlc_jax.data import shapes

# Of the image's side. Its full width at half height, 2.355 sigma = 0.41, is the hole of the large
# ring: the widest detail that tells two shapes apart, so that a blob is left of every shape.
BLUR = 0.175


def bad(images: np.ndarray, factors: np.ndarray, *, seed: int) -> Mapping[str, np.ndarray]:
    """Makes bad images of good ones: kind -> uint8 [n, y, x, c].

    Kinds:
      blank: flat, in the set's own 10 colors, then any.
      blur: Gaussian of sigma `BLUR`.
      noise: uniform in pixels and channels.
      mixture: the average of two images that differ in every factor.
      halves: left or upper half of one, the rest of the other.
    """
    random = np.random.default_rng(seed)
    n, side = images.shape[:2]
    other = images[_partners(factors, random)]
    own = np.round(
        255 * np.concatenate([shapes.BACKGROUNDS, shapes.paint(np.arange(6), np.zeros(6))])
    ).astype(np.uint8)
    flat = np.concatenate([own, random.integers(0, 256, (n, 3), np.uint8)])[:n]
    first = np.arange(side) < side // 2
    upper = random.integers(0, 2, n).astype(bool)[:, None, None, None]
    return {
        "blank": np.broadcast_to(flat[:, None, None], images.shape),
        "blur": blurred(images, sigma=BLUR),
        "noise": random.integers(0, 256, images.shape, np.uint8),
        "mixture": ((images.astype(np.uint16) + other + 1) // 2).astype(np.uint8),
        "halves": np.where(
            np.where(upper, first[:, None, None], first[None, :, None]), images, other
        ),
    }


def blurred(images: np.ndarray, *, sigma: float) -> np.ndarray:
    """Gaussian blur of uint8 [n, y, x, c], sigma in units of the side; the border is repeated."""
    side = images.shape[1]
    offsets = np.arange(-int(np.ceil(3 * sigma * side)), int(np.ceil(3 * sigma * side)) + 1)
    kernel = np.exp(-0.5 * (offsets / (sigma * side)) ** 2)
    weights = np.zeros((side, side))
    for offset, weight in zip(offsets, kernel / kernel.sum()):
        np.add.at(
            weights, (np.arange(side), np.clip(np.arange(side) + offset, 0, side - 1)), weight
        )
    return np.round(np.einsum("uy,vx,nyxc->nuvc", weights, weights, images, optimize=True)).astype(
        np.uint8
    )


def _partners(factors, random):
    """For each row of factors another one that differs in every factor."""
    partner = random.integers(0, len(factors), len(factors))
    for _ in range(1000):
        again = np.flatnonzero(np.any(factors[partner] == factors, axis=1))
        if not len(again):
            return partner
        partner[again] = random.integers(0, len(factors), len(again))
    raise ValueError(
        f"among {len(factors)} images some have no other that differs in every factor; take more"
    )
