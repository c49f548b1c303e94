"""Random crops on the host, one record at a time, drawn from the NumPy generator that is given.

Crop and flip work on Pillow images, (image, rng) -> image; what changes colors then works on the
pixels of the crop, see `colors`. `MultiCrop` and `Views` work on records, (record, rng) -> record:
the loader takes those. A record's `image` is uint8 [y, x, 3], or the bytes of an image file. Then
the boxes are drawn first, from the size in its header, and it is decoded once, as coarsely as they
allow.
"""

import functools
import math

import numpy as np
from PIL import Image

from dlc_jax.data.colors import Blur, ColorJitter, Gray, Lightness, Solarize
from dlc_jax.data.decoder import SHRINKS, Picture, center_crop
from dlc_jax.errors import UserError

INTERPOLATIONS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class RandomResizedCrop:
    """Cuts a random box and scales it to size x size (Szegedy et al., 2015).

    Area is uniform in `scale` (shares of the image), width / height log-uniform in `ratio`. A box
    that does not fit is drawn again, ten times; then it is the largest one of a ratio in the range,
    in the center. That is torchvision's rule, and so are the filters: Pillow's widen with the
    reduction, as torch's antialiased ones do, and its bicubic has a = -0.5 like torch's antialiased
    one. The box has sub-pixel edges where torchvision rounds them (by half a pixel at most): at 16
    pixels whole ones would leave few crops. And a filter reaches over the edges of the box where
    the image goes on, where torchvision cuts first.

    `shift` then moves the box by up to that share of the image's sides, also over its edges, whose
    pixels are repeated there.
    """

    def __init__(
        self, size, *, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), shift=0.0, interpolation="bicubic"
    ):
        if interpolation not in INTERPOLATIONS:
            raise UserError(
                f"unknown interpolation {interpolation!r}; use one of {', '.join(INTERPOLATIONS)}"
            )
        if not 0 < scale[0] <= scale[1] <= 1 or not 0 < ratio[0] <= ratio[1] or shift < 0:
            raise UserError(
                "a crop needs 0 < scale <= 1, ratio > 0, shift >= 0, low before high; got "
                f"{scale=} {ratio=} {shift=}"
            )
        self.size, self.scale, self.ratio, self.shift = size, scale, ratio, shift
        self.resample = INTERPOLATIONS[interpolation]

    def box(self, width, height, rng):
        """Draws (left, top, right, bottom) in an image of width x height.

        It lies inside, unless there is a shift.
        """
        low, high = self.scale
        log_low, log_high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(10):
            share, aspect, across, down = rng.random(4).tolist()
            area = width * height * (low + (high - low) * share)
            root = math.exp(0.5 * (log_low + (log_high - log_low) * aspect))
            w, h = math.sqrt(area) * root, math.sqrt(area) / root
            if w <= width and h <= height:
                break
        else:
            across = down = 0.5
            w, h = min(width, height * self.ratio[1]), min(height, width / self.ratio[0])
        left, top = across * (width - w), down * (height - h)
        if self.shift:
            across, down = ((2 * rng.random(2) - 1) * self.shift).tolist()
            left, top = left + across * width, top + down * height
        return left, top, left + w, top + h

    def cut(self, image, box):
        """The box of a Pillow image, size x size."""
        left, top, right, bottom = box
        if self.shift:
            pad_x = max(0, math.ceil(-left), math.ceil(right - image.width))
            pad_y = max(0, math.ceil(-top), math.ceil(bottom - image.height))
            image = _extend(image, pad_x, pad_y)
            left, top, right, bottom = left + pad_x, top + pad_y, right + pad_x, bottom + pad_y
        # Rounding may put an edge a few ulp outside, which Pillow refuses.
        box = (max(left, 0.0), max(top, 0.0), min(right, image.width), min(bottom, image.height))
        return image.resize((self.size, self.size), self.resample, box)

    def __call__(self, image, rng):
        return self.cut(image, self.box(*image.size, rng))


@functools.lru_cache(maxsize=64)
def _clipped(length, pad):
    return np.clip(np.arange(-pad, length + pad), 0, length - 1)


def _extend(image, pad_x, pad_y):
    """Repeats the edge pixels outward; np.pad does the same at many times the cost."""
    if not pad_x and not pad_y:
        return image
    pixels = np.asarray(image)
    return Image.fromarray(
        pixels.take(_clipped(image.height, pad_y), 0).take(_clipped(image.width, pad_x), 1)
    )


class Flip:
    """Mirrors left and right."""

    def __init__(self, probability=0.5):
        self.probability = probability

    def __call__(self, image, rng):
        if self.probability and rng.random() < self.probability:
            return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image


def _chain(*transforms):
    """The transforms that can act, in order."""
    return [transform for transform in transforms if transform.probability]


class MultiCrop:
    """Augmented crops of one image: global ones for both networks, local ones for the student.

    DINO's (Caron et al., 2021), with DINOv2's values by default. A record's `image` is replaced by
    `global`, uint8 [g, y, x, 3], and `local`, uint8 [m, y, x, 3] (absent if there are none); its
    other fields stay. Each crop is cut, flipped, color-jittered, changed in lightness,
    grayed, blurred and solarized, in that order.

    A JPEG is decoded at the coarsest of 1, 1/2, 1/4 and 1/8 of its size in which every box still
    has at least as many pixels as its crop: the decoder never costs a crop detail that the crop
    could show.

    Args:
      global_crops: number of global crops, at least 1.
      global_size: side of a global crop in pixels.
      global_scale: range of a global crop's area, as shares of the image.
      local_crops: number of local crops.
      local_size: side of a local crop in pixels.
      local_scale: range of a local crop's area, as shares of the image.
      ratio: range of a crop's width / height.
      flip: probability of mirroring left and right.
      jitter: strengths of brightness, contrast, saturation and hue.
      jitter_probability: probability of the color jitter.
      lightness: strength of a number added to all channels. DINO has none.
      gray: probability of dropping the color.
      blur: probabilities of the first global crop, the other global ones, and the local ones.
      blur_quirk: whether to blur with one minus those probabilities. DINOv2's code does so by
        mistake: its recipe says (1, 0.1, 0.5), its models were trained with (0, 0.9, 0.5).
      blur_sigma: range of the blur's standard deviation, in pixels.
      solarize: probabilities of the first global crop, the other global ones, and the local ones.
      shift: how far a crop may leave the image, as a share of its side. The edge is repeated there.
      interpolation: "bicubic", "bilinear" or "lanczos".
      share: of the code's positions, those that learn from these crops; 3 beside 2 and 1 of other
        kinds is half of them.

    Raises:
      UserError: for a value that makes no sense.
    """

    def __init__(
        self,
        *,
        global_crops: int = 2,
        global_size: int = 224,
        global_scale: tuple[float, float] = (0.32, 1.0),
        local_crops: int = 8,
        local_size: int = 98,
        local_scale: tuple[float, float] = (0.05, 0.32),
        ratio: tuple[float, float] = (0.75, 1.3333333333333333),
        flip: float = 0.5,
        jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1),
        jitter_probability: float = 0.8,
        lightness: float = 0.0,
        gray: float = 0.2,
        blur: tuple[float, float, float] = (1.0, 0.1, 0.5),
        blur_quirk: bool = True,
        blur_sigma: tuple[float, float] = (0.1, 2.0),
        solarize: tuple[float, float, float] = (0.0, 0.2, 0.0),
        shift: float = 0.0,
        interpolation: str = "bicubic",
        share: int = 1,
    ):
        if share < 1:
            raise UserError(f"share={share} of a kind of crops must be at least 1")
        if global_crops < 1 or local_crops < 0 or (local_crops and not local_size):
            raise UserError(
                "MultiCrop needs global_crops >= 1, and local_size if there are local crops"
            )
        if blur_quirk:
            blur = [1 - probability for probability in blur]

        def crop(size, scale, kind):
            colors = _chain(
                ColorJitter(*jitter, probability=jitter_probability),
                Lightness(lightness),
                Gray(gray),
                Blur(blur[kind], sigma=blur_sigma),
                Solarize(solarize[kind]),
            )
            cut = RandomResizedCrop(
                size, scale=scale, ratio=ratio, shift=shift, interpolation=interpolation
            )
            return cut, Flip(flip), colors

        self._crops = {
            "global": [crop(global_size, global_scale, min(i, 1)) for i in range(global_crops)]
        }
        if local_crops:
            self._crops["local"] = [crop(local_size, local_scale, 2)] * local_crops

    def __call__(self, record, rng):
        (crops,), _ = _augment(record["image"], [self], rng)
        return {name: value for name, value in record.items() if name != "image"} | crops

    def boxes(self, width, height, rng):
        """Draws {"global" or "local": a box for each crop} in an image of width x height."""
        return {
            name: [cut.box(width, height, rng) for cut, _, _ in crops]
            for name, crops in self._crops.items()
        }

    def shrink(self, boxes):
        """How coarsely the image may be decoded.

        The greatest of SHRINKS that leaves each box the pixels of its crop.
        """
        return _coarsest(
            min(right - left, bottom - top) / cut.size
            for name, crops in self._crops.items()
            for (cut, _, _), (left, top, right, bottom) in zip(crops, boxes[name])
        )

    def cut(self, image, boxes, rng):
        """{"global" or "local": uint8 [n, y, x, 3]} of boxes in the image's coordinates."""
        return {
            name: np.stack([_cut(image, *crop, box, rng) for crop, box in zip(crops, boxes[name])])
            for name, crops in self._crops.items()
        }


def _cut(image, cut, flip, colors, box, rng):
    pixels = np.asarray(flip(cut.cut(image, box), rng))
    for change in colors:
        pixels = change(pixels, rng)
    return pixels


def _coarsest(rooms):
    """The greatest of SHRINKS that leaves at least a pixel for each that is asked for."""
    room = min(rooms)
    return next((shrink for shrink in SHRINKS if shrink <= room), 1)


def _augment(image, kinds, rng, plain=0):
    """(the crops of several `MultiCrop`, the image itself), all from one decoding.

    The image is as `inputs.fit` has it, uint8 [plain, plain, 3]; None of 0.
    """
    picture = Picture(image)
    drawn = [kind.boxes(*picture.size, rng) for kind in kinds]
    shrinks = [kind.shrink(boxes) for kind, boxes in zip(kinds, drawn)]
    if plain:
        shrinks.append(_coarsest([min(picture.size) / plain]))
    image, shrink = picture.decode(min(shrinks))
    scaled = [
        {name: [[edge / shrink for edge in box] for box in boxes] for name, boxes in each.items()}
        for each in drawn
    ]
    crops = [kind.cut(image, boxes, rng) for kind, boxes in zip(kinds, scaled)]
    return crops, np.asarray(center_crop(image, size=plain)) if plain else None


class Views:
    """Several kinds of crops of one image, each with its own augmentations.

    {kind: MultiCrop} gives the fields `kind/global` and `kind/local`; a side in pixels, `plain`,
    also the field `plain`, the image itself, scaled and center-cropped to that side.
    """

    def __init__(self, kinds, *, plain=0):
        self.kinds, self.plain = dict(sorted(kinds.items())), plain

    def __call__(self, record, rng):
        out = {name: value for name, value in record.items() if name != "image"}
        kinds, plain = _augment(record["image"], self.kinds.values(), rng, self.plain)
        if plain is not None:
            out["plain"] = plain
        for kind, crops in zip(self.kinds, kinds):
            out |= {f"{kind}/{name}": value for name, value in crops.items()}
        return out
