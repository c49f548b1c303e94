"""Image transforms on the host, one record at a time; every random one draws from the NumPy generator it is given.

An image is uint8 [y, x, 3]. Crop, flip, jitter, gray, blur and solarize work on Pillow images, (image, rng) -> image, and draw
nothing when their probability is 0. `MultiCrop` and `OnImage` work on records, (record, rng) -> record: the loader takes those.
"""

import functools
import math

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from dlc_jax.errors import UserError

INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def center_crop(image, *, size):
    """Scales the short side to `size` and crops the center, as the evaluation protocol of ADM does (Dhariwal and Nichol, 2021).

    The image is halved by box averages while its short side is at least twice `size`, then resized bicubically.

    Args:
      image: a Pillow image of any size.
      size: side of the result, in pixels.

    Returns:
      A Pillow image of size x size.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


class RandomResizedCrop:
    """Cuts a random box and scales it to size x size (Szegedy et al., 2015).

    Area is uniform in `scale` (shares of the image), width / height log-uniform in `ratio`. The box has sub-pixel edges: at 16
    pixels whole ones would leave few crops. A box that does not fit is drawn again, ten times, then clipped to the image.
    `shift` then moves the box by up to that share of the image's sides, also over its edges, whose pixels are repeated there.
    """

    def __init__(self, size, *, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), shift=0.0, interpolation="bicubic"):
        if interpolation not in INTERPOLATIONS:
            raise UserError(f"unknown interpolation {interpolation!r}; use one of {', '.join(INTERPOLATIONS)}")
        if not 0 < scale[0] <= scale[1] <= 1 or not 0 < ratio[0] <= ratio[1] or shift < 0:
            raise UserError(
                f"a crop needs 0 < scale <= 1, ratio > 0, shift >= 0, low before high; got {scale=} {ratio=} {shift=}"
            )
        self.size, self.scale, self.shift = (size, size), scale, shift
        self.log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
        self.resample = INTERPOLATIONS[interpolation]

    def box(self, width, height, rng):
        """Draws (left, top, right, bottom) inside width x height."""
        low, high = self.scale
        log_low, log_high = self.log_ratio
        for _ in range(10):
            share, aspect, across, down = rng.random(4).tolist()
            area = width * height * (low + (high - low) * share)
            root = math.exp(0.5 * (log_low + (log_high - log_low) * aspect))
            w, h = math.sqrt(area) * root, math.sqrt(area) / root
            if w <= width and h <= height:
                break
        w, h = min(w, width), min(h, height)
        left, top = across * (width - w), down * (height - h)
        return left, top, left + w, top + h

    def __call__(self, image, rng):
        width, height = image.size
        left, top, right, bottom = self.box(width, height, rng)
        if self.shift:
            pad_x, pad_y = math.ceil(self.shift * width), math.ceil(self.shift * height)
            across, down = ((2 * rng.random(2) - 1) * self.shift).tolist()
            across, down = pad_x + across * width, pad_y + down * height
            image = _extend(image, pad_x, pad_y)
            left, top, right, bottom = left + across, top + down, right + across, bottom + down
        # Rounding may put an edge a few ulp outside, which Pillow refuses.
        box = (max(left, 0.0), max(top, 0.0), min(right, image.width), min(bottom, image.height))
        return image.resize(self.size, self.resample, box)


@functools.lru_cache(maxsize=64)
def _clipped(length, pad):
    return np.clip(np.arange(-pad, length + pad), 0, length - 1)


def _extend(image, pad_x, pad_y):
    """Repeats the edge pixels outward; np.pad does the same at many times the cost."""
    pixels = np.asarray(image)
    return Image.fromarray(pixels.take(_clipped(image.height, pad_y), 0).take(_clipped(image.width, pad_x), 1))


class Flip:
    """Mirrors left and right."""

    def __init__(self, probability=0.5):
        self.probability = probability

    def __call__(self, image, rng):
        if self.probability and rng.random() < self.probability:
            return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image


class ColorJitter:
    """Changes brightness, contrast, saturation and hue, in random order.

    The first three are multiplied by a factor uniform in [max(0, 1 - s), 1 + s] for strength s; hue turns by up to `hue` of a
    full circle each way. A strength of 0 leaves its property alone.
    """

    def __init__(self, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, *, probability=0.8):
        if min(brightness, contrast, saturation, hue) < 0 or hue > 0.5:
            raise UserError(f"jitter strengths must be >= 0 and hue <= 0.5, got {(brightness, contrast, saturation, hue)}")
        self.changes = [(change, s) for change, s in zip(_CHANGES, (brightness, contrast, saturation, hue)) if s]
        self.probability = probability if self.changes else 0

    def __call__(self, image, rng):
        if self.probability and rng.random() < self.probability:
            draws = rng.random(len(self.changes)).tolist()
            for i in rng.permutation(len(self.changes)).tolist():
                change, strength = self.changes[i]
                image = change(image, strength, draws[i])
        return image


def _factor(strength, draw):
    low = max(0.0, 1.0 - strength)
    return low + (1.0 + strength - low) * draw


def _brightness(image, strength, draw):
    return ImageEnhance.Brightness(image).enhance(_factor(strength, draw))


def _contrast(image, strength, draw):
    mean = round(float(np.asarray(image.convert("L")).mean()))
    return Image.blend(Image.new("RGB", image.size, (mean, mean, mean)), image, _factor(strength, draw))


def _saturation(image, strength, draw):
    return ImageEnhance.Color(image).enhance(_factor(strength, draw))


def _hue(image, strength, draw):
    pixels = np.array(image.convert("HSV"))
    pixels[..., 0] += np.uint8(round(255 * strength * (2 * draw - 1)) % 256)  # uint8 wraps, as the circle of hues does
    return Image.frombytes("HSV", image.size, pixels.tobytes()).convert("RGB")


_CHANGES = (_brightness, _contrast, _saturation, _hue)


class Lightness:
    """Adds the same to all channels, uniform in plus or minus `strength` of the full range, cut off at its ends: the hue stays."""

    def __init__(self, strength=0.0):
        if not 0 <= strength <= 1:
            raise UserError(f"lightness must be in 0..1, got {strength}")
        self.strength, self.probability = strength, float(strength > 0)

    def __call__(self, image, rng):
        if not self.strength:
            return image
        offset = round(255 * self.strength * (2 * rng.random() - 1))
        return image.point([min(255, max(0, value + offset)) for value in range(256)] * 3)


class Gray:
    """Drops the color; three equal channels stay."""

    def __init__(self, probability=0.2):
        self.probability = probability

    def __call__(self, image, rng):
        if self.probability and rng.random() < self.probability:
            return image.convert("L").convert("RGB")
        return image


class Blur:
    """Gaussian blur with a standard deviation uniform in `sigma`, in pixels (Pillow's three box passes)."""

    def __init__(self, probability=0.5, *, sigma=(0.1, 2.0)):
        self.probability, self.sigma = probability, sigma

    def __call__(self, image, rng):
        if self.probability and rng.random() < self.probability:
            low, high = self.sigma
            return image.filter(ImageFilter.GaussianBlur(low + (high - low) * rng.random()))
        return image


class Solarize:
    """Inverts the values from `threshold` upward."""

    def __init__(self, probability=0.2, *, threshold=128):
        self.probability, self.threshold = probability, threshold

    def __call__(self, image, rng):
        if self.probability and rng.random() < self.probability:
            return ImageOps.solarize(image, self.threshold)
        return image


def _chain(*transforms):
    """The transforms that can act, in order."""
    return [transform for transform in transforms if getattr(transform, "probability", 1)]


def _pillow(pixels):
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3:
        raise ValueError(f"expected a uint8 image [y, x, 3], got {pixels.dtype} {list(pixels.shape)}")
    return Image.fromarray(pixels)


class OnImage:
    """Applies image transforms to a record's `image`: OnImage(RandomResizedCrop(32), Flip()) is a transform for the loader."""

    def __init__(self, *transforms):
        self.transforms = _chain(*transforms)

    def __call__(self, record, rng):
        if not self.transforms:
            return record
        image = _pillow(record["image"])
        for transform in self.transforms:
            image = transform(image, rng)
        return {**record, "image": np.asarray(image)}


class MultiCrop:
    """Several augmented crops of one image: global ones for teacher and student, local ones for the student alone.

    DINO's (Caron et al., 2021). A record's `image` is replaced by `global`, uint8 [g, y, x, 3], and `local`, uint8 [m, y, x, 3]
    (absent if there are none); its other fields stay. Each crop is cut, flipped, color-jittered, grayed, blurred and solarized,
    in that order.

    Args:
      global_crops, global_size, global_scale: number, side in pixels and range of area.
      local_crops, local_size, local_scale: the same for the local ones.
      ratio: range of width / height.
      flip: probability.
      jitter: strengths of brightness, contrast, saturation and hue.
      jitter_probability, gray: probabilities.
      lightness: strength of an addition to all channels, which DINO does not have.
      blur, solarize: probabilities for the first global crop, the other global ones, and the local ones. DINOv2's recipe says
        blur (1, 0.1, 0.5), but its code passed one minus that: its models were trained with (0, 0.9, 0.5).
      blur_sigma: range of the blur, in pixels.
      shift: how far a crop may leave the image, as a share of its side; the edge is repeated there.
      interpolation: "bicubic", "bilinear" or "lanczos".

    Raises:
      UserError: for a value that makes no sense.
    """

    def __init__(
        self,
        *,
        global_size,
        global_crops=2,
        global_scale=(0.32, 1.0),
        local_crops=0,
        local_size=None,
        local_scale=(0.05, 0.32),
        ratio=(3 / 4, 4 / 3),
        flip=0.5,
        jitter=(0.4, 0.4, 0.2, 0.1),
        jitter_probability=0.8,
        lightness=0.0,
        gray=0.2,
        blur=(0.0, 0.9, 0.5),
        solarize=(0.0, 0.2, 0.0),
        blur_sigma=(0.1, 2.0),
        shift=0.0,
        interpolation="bicubic",
    ):
        if global_crops < 1 or local_crops < 0 or (local_crops and not local_size):
            raise UserError("MultiCrop needs global_crops >= 1, and local_size if there are local crops")

        def crop(size, scale, kind):
            return _chain(
                RandomResizedCrop(size, scale=scale, ratio=ratio, shift=shift, interpolation=interpolation),
                Flip(flip),
                ColorJitter(*jitter, probability=jitter_probability),
                Lightness(lightness),
                Gray(gray),
                Blur(blur[kind], sigma=blur_sigma),
                Solarize(solarize[kind]),
            )

        self.global_crops = [crop(global_size, global_scale, min(i, 1)) for i in range(global_crops)]
        self.local_crops = [crop(local_size, local_scale, 2)] * local_crops if local_crops else []

    def __call__(self, record, rng):
        record = dict(record)
        image = _pillow(record.pop("image"))
        record["global"] = self._cut(image, self.global_crops, rng)
        if self.local_crops:
            record["local"] = self._cut(image, self.local_crops, rng)
        return record

    @staticmethod
    def _cut(image, crops, rng):
        out = []
        for crop in crops:
            cut = image
            for transform in crop:
                cut = transform(cut, rng)
            out.append(np.asarray(cut))
        return np.stack(out)


class Views:
    """Several kinds of crops of one image, each with its own augmentations: {kind: MultiCrop} gives the fields `kind/global`, `kind/local`."""

    def __init__(self, kinds):
        self.kinds = dict(sorted(kinds.items()))

    def __call__(self, record, rng):
        out = {name: value for name, value in record.items() if name != "image"}
        for kind, crop in self.kinds.items():
            out |= {f"{kind}/{name}": value for name, value in crop({"image": record["image"]}, rng).items()}
        return out
