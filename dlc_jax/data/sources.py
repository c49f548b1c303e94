"""Sources of examples by name.

A source has a length and gives record i as a dict: `image`, uint8 [y, x, 3], `index`, and what else it knows.
"""

import inspect
import io

import numpy as np
from PIL import Image

from dlc_jax.data.shapes import NAMES, Shapes
from dlc_jax.data.transforms import center_crop
from dlc_jax.errors import UserError

MAX_PIXELS = 64_000_000  # a few kilobytes of a hostile file can decode to gigabytes


def decode_image(data, *, image=None):
    """Decodes an image file.

    Args:
      data: bytes of any format that Pillow reads.
      image: side of the center crop (see `transforms.center_crop`), or None to keep the size.

    Returns:
      uint8 [y, x, 3]; gray is repeated, transparency is laid on black.

    Raises:
      ValueError, OSError, or one of Pillow's own: for data that is not an image, is cut off, or has more than 64 million pixels.
    """
    with Image.open(io.BytesIO(data)) as file:
        if file.width * file.height > MAX_PIXELS:  # known from the header, before anything is decoded
            raise ValueError(f"image of {file.width} x {file.height} pixels")
        return _pixels(file, image)


def _pixels(file, image):
    if file.has_transparency_data:
        file = file.convert("RGBA")
        file = Image.alpha_composite(Image.new("RGBA", file.size, (0, 0, 0, 255)), file)
    file = file.convert("RGB")
    return np.asarray(file if image is None else center_crop(file, size=image))


class Tfds:
    """A TFDS data set that was prepared as ArrayRecord, read without tensorflow. Images are decoded here, by Pillow.

    Args:
      split: "train" or "validation", read from the options of that name; anything else is a TFDS split itself.
      dataset: TFDS name, such as "imagenet2012" or "my_set/config:1.0.0".
      train, validation: TFDS splits, such as "train[:99%]".
      image: side of the center crop, or None for images as they are.
      field: name of the image feature; a record has it as `image`.
      data_dir: where it was prepared; TFDS's default if None.

    Raises:
      UserError: if the data set is unknown, not prepared, not in ArrayRecord, or has no such split or field.
    """

    def __init__(self, *, split, dataset, train="train", validation="validation", image=None, field="image", data_dir=None):
        import tensorflow_datasets as tfds

        self.image, self.field = image, field
        split = {"train": train, "validation": validation}.get(split, split)
        try:
            builder = tfds.builder(dataset, data_dir=data_dir)
            features = builder.info.features
            self._encoded = field in features and isinstance(features[field], tfds.features.Image)
            decoders = {field: tfds.decode.SkipDecoding()} if self._encoded else None
            records = builder.as_data_source(split=split, decoders=decoders)
        except Exception as error:  # TFDS raises a dozen types here; each is a matter of name, path, split or format
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            where = f"split {split} of TFDS data set {dataset} in {data_dir or 'the default place'}"
            raise UserError(f"cannot read {where}: {reason}") from error
        if field not in features:
            raise UserError(f"TFDS data set {dataset} has no field {field}; it has {', '.join(sorted(features))}")
        self._records = records

    def __len__(self):
        return len(self._records)

    def __getitem__(self, index):
        record = dict(self._records[index])
        pixels = record.pop(self.field)
        if self._encoded:
            pixels = decode_image(bytes(pixels), image=self.image)
        elif self.image is not None:
            pixels = _pixels(Image.fromarray(np.asarray(pixels, np.uint8)), self.image)
        return {**record, "image": pixels, "index": index}


SOURCES = {"shapes": Shapes, "tfds": Tfds}


def source(name, split, **options):
    """Opens a source by its name in SOURCES.

    Args:
      name: "shapes" or "tfds".
      split: "train", "validation", or another that the source knows.
      **options: keyword arguments of the source.

    Raises:
      UserError: for an unknown name or option.
    """
    if name not in SOURCES:
        raise UserError(f"unknown data source {name!r}; use one of {', '.join(sorted(SOURCES))}")
    known = set(inspect.signature(SOURCES[name]).parameters) - {"split"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise UserError(f"data source {name} has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    return SOURCES[name](split=split, **options)


def identity(name, split, **options):
    """What defines the records of `source(name, split, **options)`: the place on disk does not. Kept in code stores."""
    return {"name": name, "split": split, **{k: v for k, v in sorted(options.items()) if k != "data_dir"}}


def factors(name, **options):
    """{factor: names of its values} of a data set whose records have `factors`, in their order; {} for one that knows none."""
    if name != "shapes":
        return {}
    return {factor: values for factor, values in NAMES.items() if factor != "position" or options.get("positions")}
