"""Changes of color and sharpness on the host.

They take uint8 pixels [y, x, 3] and a NumPy generator, and return pixels of the same shape.

Those that act with a probability draw nothing when it is 0. All that is random is drawn before any
pixel is read, so what an image draws does not depend on what it shows. Written for small crops in
NumPy's vector units; benchmarks/crops.py compares with Pillow.
"""

import numpy as np
from PIL import Image, ImageFilter

from dlc_jax.errors import UserError

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's mode "L"
# Pixels turned in hue at once: what is computed on the way stays in the processor's cache.
STRIP = 16_384
REACH = 4  # pixels on each side of a narrow blur: 9 taps


class ColorJitter:
    """Changes brightness, contrast, saturation and hue, in random order.

    The first three are multiplied by a factor uniform in [max(0, 1 - s), 1 + s] for strength s; hue
    (of HSV) turns by up to `hue` of a full circle each way. A strength of 0 leaves its property
    alone. After each change values are cut off at 0 and 255; they are rounded once, at the end,
    where torchvision on Pillow images rounds after each, and counts hue in 256 steps.
    """

    def __init__(self, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, *, probability=0.8):
        if min(brightness, contrast, saturation, hue) < 0 or hue > 0.5:
            raise UserError(
                "jitter strengths must be >= 0 and hue <= 0.5, got "
                f"{(brightness, contrast, saturation, hue)}"
            )
        self.changes = [
            (change, s) for change, s in zip(_CHANGES, (brightness, contrast, saturation, hue)) if s
        ]
        self.probability = probability if self.changes else 0

    def __call__(self, pixels, rng):
        if self.probability and rng.random() < self.probability:
            draws = rng.random(len(self.changes)).tolist()
            order = rng.permutation(len(self.changes)).tolist()
            planes = _planes(pixels)
            for i in order:
                change, strength = self.changes[i]
                change(planes, strength, draws[i])
            return _pixels(planes)
        return pixels


def _planes(pixels):
    """float32 [3, y, x], 0 to 255: channels apart, each contiguous."""
    planes = np.empty((3, *pixels.shape[:2]), np.float32)
    for channel, plane in enumerate(planes):
        plane[...] = pixels[..., channel]
    return planes


def _pixels(planes):
    """Rounds, in place, to uint8 [y, x, 3]."""
    planes += 0.5
    pixels = np.empty((*planes.shape[1:], 3), np.uint8)
    for channel, plane in enumerate(planes):
        pixels[..., channel] = plane
    return pixels


def _luma(red, green, blue):
    return red * LUMA[0] + green * LUMA[1] + blue * LUMA[2]


def _cut_off(planes):
    np.clip(planes, 0.0, 255.0, out=planes)


def _factor(strength, draw):
    low = max(0.0, 1.0 - strength)
    return low + (1.0 + strength - low) * draw


# These change planes in place, so that no large array is made on the way.


def _brightness(planes, strength, draw):
    planes *= _factor(strength, draw)
    _cut_off(planes)


def _contrast(planes, strength, draw):
    factor = _factor(strength, draw)
    mean = _luma(*(float(plane.mean()) for plane in planes))
    planes *= factor
    planes += (1.0 - factor) * mean
    _cut_off(planes)


def _saturation(planes, strength, draw):
    factor = _factor(strength, draw)
    gray = _luma(*planes)
    gray *= 1.0 - factor
    planes *= factor
    planes += gray
    _cut_off(planes)


def _hue(planes, strength, draw):
    sextants = 6.0 * strength * (2.0 * draw - 1.0)
    rows = max(1, STRIP // planes.shape[2])
    for first in range(0, planes.shape[1], rows):
        _turn_hue(planes[:, first : first + rows], sextants)


def _turn_hue(strip, sextants):
    """Turns the hue of HSV by some sixths of the circle, without a branch; the rest stays.

    Red is at 0 and hues are signed, from -3 to 3, positive toward green. With M, m the greatest and
    the least channel, the distance of a color from red is (g + b - r + M - 2 m) / (M - m): (g - m)
    / (M - m) while red is greatest, and so on for the other sextants. Back, a channel is m + (M -
    m) t, with t a trapezoid of the distance between the hue and the channel's own: 1 within 1, 0
    from 2 on.
    """
    red, green, blue = strip
    low = np.minimum(red, green)
    np.minimum(low, blue, out=low)
    high = np.maximum(red, green)
    np.maximum(high, blue, out=high)
    chroma = high - low
    hue = green + blue
    hue -= red
    hue += high
    hue -= low
    hue -= low
    # A gray has no hue, and whatever it gets is multiplied by no chroma.
    hue /= np.maximum(chroma, 1e-3)
    # np.copysign(hue, green - blue), by its bits at a tenth of the cost.
    toward = (green - blue).view(np.uint32)
    toward &= 0x80000000
    signed = hue.view(np.uint32)
    signed |= toward
    hue += sextants
    hue -= 6.0 * np.rint(hue * (1 / 6))
    np.subtract(2.0, np.abs(hue), out=red)
    np.subtract(np.abs(hue + 1.0), 1.0, out=green)  # green is at 2, opposite to -1
    np.subtract(np.abs(hue - 1.0), 1.0, out=blue)
    np.clip(strip, 0.0, 1.0, out=strip)
    strip *= chroma
    strip += low


_CHANGES = (_brightness, _contrast, _saturation, _hue)


class Lightness:
    """Adds the same number to all channels, cut off at the ends of the range: the hue stays.

    It is uniform in plus or minus `strength` of the full range.
    """

    def __init__(self, strength=0.0):
        if not 0 <= strength <= 1:
            raise UserError(f"lightness must be in 0..1, got {strength}")
        self.strength, self.probability = strength, float(strength > 0)

    def __call__(self, pixels, rng):
        if not self.strength:
            return pixels
        offset = round(255 * self.strength * (2 * rng.random() - 1))
        return np.clip(pixels.astype(np.int16) + offset, 0, 255).astype(np.uint8)


class Gray:
    """Drops the color; three equal channels stay."""

    def __init__(self, probability=0.2):
        self.probability = probability

    def __call__(self, pixels, rng):
        if self.probability and rng.random() < self.probability:
            planes = _planes(pixels)
            planes[:] = _luma(*planes)
            return _pixels(planes)
        return pixels


class Blur:
    """Gaussian blur with a standard deviation uniform in `sigma`, in pixels.

    Up to 2 pixels it is the kernel of DINOv2: 9 taps exp(-x^2 / (2 sigma^2)) with sum 1 in each
    direction, the image mirrored at its edges. Taps are multiples of 1/256 here and values are
    rounded after each direction: at most 2 of 255 from the same in floating point, 0.3 on average.
    Wider ones, which 9 taps would cut short, are Pillow's three box passes, whose edges are those
    of a Gaussian to 1.2 % of the step.
    """

    def __init__(self, probability=0.5, *, sigma=(0.1, 2.0)):
        if not 0 < sigma[0] <= sigma[1]:
            raise UserError(f"a blur needs 0 < sigma, low before high, got {sigma=}")
        self.probability, self.sigma = probability, sigma

    def __call__(self, pixels, rng):
        if self.probability and rng.random() < self.probability:
            low, high = self.sigma
            sigma = low + (high - low) * rng.random()
            if 2 * sigma > REACH:
                return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(sigma)))
            taps = _taps(sigma)
            if len(taps) > 1:
                return _smooth(_smooth(pixels, taps, axis=0), taps, axis=1)
        return pixels


def _taps(sigma):
    """The center of the kernel and one side of it, uint16; 256 in all, both sides counted.

    Taps of 0 at the end are left out.
    """
    shape = np.exp(-0.5 * (np.arange(REACH + 1) / sigma) ** 2)
    taps = np.rint(256 * shape / (2 * shape.sum() - shape[0])).astype(np.uint16)
    taps[0] = 256 - 2 * taps[1:].sum()
    return taps[taps > 0]


def _smooth(pixels, taps, *, axis):
    reach, length = len(taps) - 1, pixels.shape[axis]
    around = [(0, 0)] * 3
    around[axis] = (reach, reach)
    padded = np.pad(pixels.astype(np.uint16), around, "reflect")

    def moved(by):
        return padded[by : by + length] if axis == 0 else padded[:, by : by + length]

    total = moved(reach) * taps[0]  # 255 times 256 and a half still fits 16 bits
    for distance, tap in enumerate(taps[1:], 1):
        pair = moved(reach - distance) + moved(reach + distance)
        pair *= tap
        total += pair
    total += 128
    total >>= 8
    return total.astype(np.uint8)


class Solarize:
    """Inverts the values from `threshold` upward."""

    def __init__(self, probability=0.2, *, threshold=128):
        self.probability, self.threshold = probability, threshold

    def __call__(self, pixels, rng):
        if self.probability and rng.random() < self.probability:
            return pixels ^ ((pixels >= self.threshold) * np.uint8(255))
        return pixels
