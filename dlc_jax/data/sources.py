"""Sources of examples by name.

A source has a length and gives record i as a dict: `image`, uint8 [y, x, 3] or (`image="encoded"`)
the bytes of a file, `index`, and what else it knows.
"""

import inspect

import numpy as np

from dlc_jax.data.decoder import decode_image  # noqa: F401  part of this module's face
from dlc_jax.data.images import Images
from dlc_jax.data.judge import Judge
from dlc_jax.data.loader import Resilient
from dlc_jax.data.shapes import NAMES, Shapes
from dlc_jax.data.tfds import Tfds
from dlc_jax.errors import UserError

SOURCES = {"images": Images, "shapes": Shapes, "tfds": Tfds}


def source(name, split, **options):
    """Opens a source by its name in SOURCES.

    Args:
      name: "images", "shapes" or "tfds".
      split: "train", "validation", or another that the source knows.
      **options: keyword arguments of the source.

    Returns:
      The source. Files may be damaged: "images" and "tfds" come as `Resilient`, so that whoever
      reads them (the loader, the codes
      job, the samples) gets the same replacements.

    Raises:
      UserError: for an unknown name or option.
    """
    if name not in SOURCES:
        raise UserError(f"unknown data source {name!r}; use one of {', '.join(sorted(SOURCES))}")
    known = set(inspect.signature(SOURCES[name]).parameters) - {"split"}
    unknown = sorted(set(options) - known)
    if unknown:
        raise UserError(
            f"data source {name} has no option {', '.join(unknown)}; it has "
            f"{', '.join(sorted(known))}"
        )
    found = SOURCES[name](split=split, **options)
    if name == "shapes":
        return found
    return Resilient(found, limit=found.limit) if name == "images" else Resilient(found)


def identity(name, split, **options):
    """What defines the records of `source(name, split, **options)`: the place on disk does not,
    what is there does. Kept in code stores.
    """
    if name == "images":
        found = source(name, split, **options).source
        return {
            "name": name,
            "split": split,
            "image": found.image,
            "crop": found.crop,
            **found.content(),
        }
    return {
        "name": name,
        "split": split,
        **{k: v for k, v in sorted(options.items()) if k != "data_dir"},
    }


def factors(name, **options):
    """{factor: names of its values} of a data set whose records have `factors`, in their order; {}
    for one that knows none.
    """
    if name in ("images", "tfds"):
        classes = source(name, "train", **options).source.classes
        return {"label": classes} if classes else {}
    if name != "shapes":
        return {}
    return {
        factor: values
        for factor, values in NAMES.items()
        if factor != "position" or options.get("positions")
    }


def judge(name, **options):
    """The `judge.Judge` of a data set, which reads factors off images; None for one that has none.

    Args:
      name, **options: as of `source`.

    Raises:
      UserError: the data set's judge reads no images of this size.
    """
    if name != "shapes":
        return None
    return Judge(**{key: options[key] for key in ("image", "positions") if key in options})


def choose(source, count):
    """Rows of `count` records that stand for all, increasing: evenly spaced, because files are
    sorted by class; of `Shapes` the first.
    """
    count = min(count, len(source))
    return (
        np.arange(count) if isinstance(source, Shapes) else np.arange(count) * len(source) // count
    )
