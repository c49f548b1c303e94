"""TFDS data sets that were prepared as ArrayRecord, read without tensorflow."""

import functools
import io
import os

import numpy as np
from PIL import Image

from dlc_jax.data.decoder import check_image, decode_image, to_pixels
from dlc_jax.data.listing import Listing, digest
from dlc_jax.data.naming import SPLITS
from dlc_jax.errors import UserError


class Tfds:
    """A TFDS data set that was prepared as ArrayRecord, read without tensorflow.

    Images are decoded here, by Pillow.

    Args:
      split: "train" or "validation", read from the options of that name; anything else is a TFDS
        split itself.
      dataset: TFDS name, or the folder of a prepared version. Such as "my_set/config:1.0.0".
      train: TFDS split to train on, such as "train[:99%]".
      validation: TFDS split to validate on.
      image: side of the center crop in pixels. None leaves images as they are; "encoded" gives the
        bytes of the files, see `Images`.
      field: image feature of the data set. A record has it as `image`.
      data_dir: where the data set was prepared, TFDS's default if None.

    Raises:
      UserError: if the data set is unknown, not prepared, not in ArrayRecord, or has no such split
        or field.
    """

    def __init__(
        self,
        *,
        split,
        dataset: str = "imagenet2012",
        train: str = "train",
        validation: str = "validation",
        image: int | str | None = 256,
        field: str = "image",
        data_dir: str | None = None,
    ):
        import tensorflow_datasets as tfds

        check_image(image)
        self.image, self.field = image, field
        split = {"train": train, "validation": validation}.get(split, split)
        try:
            builder = _builder(dataset, data_dir)
            features = builder.info.features
            self._encoded = field in features and isinstance(features[field], tfds.features.Image)
            decoders = {field: tfds.decode.SkipDecoding()} if self._encoded else None
            records = builder.as_data_source(split=split, decoders=decoders)
        # TFDS raises a dozen types here; each is a matter of name, path, split or format.
        except Exception as error:
            raise _refusal(
                error,
                f"split {split} of TFDS data set {dataset} in {data_dir or 'the default place'}",
            ) from error
        if field not in features:
            raise UserError(
                f"TFDS data set {dataset} has no field {field}; it has "
                f"{', '.join(sorted(features))}"
            )
        self._records = records
        self.classes = _classes(builder.info.features)

    def __len__(self):
        return len(self._records)

    def __getitem__(self, index):
        if self.image == "encoded":
            data, record = self.encoded(index)
            return {**record, "image": data, "index": index}
        record = dict(self._records[index])
        pixels = record.pop(self.field)
        if self._encoded:
            pixels = decode_image(bytes(pixels), image=self.image)
        elif self.image is not None:
            pixels = to_pixels(Image.fromarray(np.asarray(pixels, np.uint8)), image=self.image)
        if self.classes:
            record["factors"] = np.array([record["label"]], np.int32)
        return {**record, "image": pixels, "index": index}

    def encoded(self, index):
        """(bytes of the image file, the other fields); pixels become a PNG file."""
        record = dict(self._records[index])
        pixels = record.pop(self.field)
        if self._encoded:
            return bytes(pixels), record
        file, pixels = io.BytesIO(), np.asarray(pixels, np.uint8)
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(
            file, "PNG", compress_level=1
        )
        return file.getvalue(), record


def open_tfds(dataset, *, field):
    """The `Listing` of all splits of a TFDS data set; arguments and errors as of `Tfds`.

    Images are named by split and number.

    Classes are those of a feature `label`, if it is a ClassLabel.
    """
    try:
        info = _builder(dataset, None).info
    except Exception as error:
        raise _refusal(error, f"TFDS data set {dataset}") from error
    sizes = {name: found.num_examples for name, found in info.splits.items()}
    used = [name for name in sorted(sizes) if name in SPLITS and sizes[name]]
    skipped = {f"split {name} of TFDS": sizes[name] for name in sorted(set(sizes) - set(used))}
    parts = [
        Tfds(split=name, dataset=dataset, train="train", validation="validation", field=field)
        for name in used
    ]
    names = [f"{name}/{k:08d}" for name in used for k in range(sizes[name])]
    classes = _classes(info.features)
    labels = functools.partial(_label, parts) if classes else None
    seals = [
        f"{name} {info.splits[name].shard_lengths} {info.splits[name].num_bytes}" for name in used
    ]
    content = digest([info.full_name, field, *seals])
    return Listing(
        "tfds",
        names,
        functools.partial(_read, parts),
        content=content,
        labels=labels,
        classes=classes,
        skipped=skipped,
    )


def _classes(features):
    """Names of the classes of a feature `label`, if it is a ClassLabel; else []."""
    import tensorflow_datasets as tfds

    label = features["label"] if "label" in features else None
    if not isinstance(label, tfds.features.ClassLabel):
        return []
    return label.names or [str(k) for k in range(label.num_classes or 0)]


def _builder(dataset, data_dir):
    import tensorflow_datasets as tfds

    if os.path.exists(os.path.join(dataset, "dataset_info.json")):
        return tfds.builder_from_directory(dataset)
    return tfds.builder(dataset, data_dir=data_dir)


def _refusal(error, where):
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(f"cannot read {where}: {reason}")


def _find(parts, index):
    for part in parts:
        if index < len(part):
            return part.encoded(index)
        index -= len(part)
    raise IndexError(index)


def _read(parts, index):
    return _find(parts, index)[0]


def _label(parts, index):
    return int(_find(parts, index)[1]["label"])
