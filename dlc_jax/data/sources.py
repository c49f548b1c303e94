"""Sources of examples by name.

A source has a length and gives record i as a dict: `image`, uint8 [y, x, 3] or (`image="encoded"`)
the bytes of a file, `index`, and what else it knows.
"""

import inspect
import threading
from collections.abc import Sequence

import numpy as np

from dlc_jax.data.decoder import decode_image  # noqa: F401  part of this module's face
from dlc_jax.data.files import Place
from dlc_jax.data.images import Images
from dlc_jax.data.judge import Judge
from dlc_jax.data.resilient import Resilient
from dlc_jax.data.shapes import NAMES, Shapes
from dlc_jax.data.tfds import Tfds
from dlc_jax.errors import UserError

SOURCES = {"images": Images, "shapes": Shapes, "tfds": Tfds}
PLACE = ("path", "cache", "cache_gb", "field")  # options of `Images` that say what to open


class DataSet:
    """A data set, opened once: its splits and their views share what was found in its place.

    What is opened stays until `close`: keep a `DataSet` for one run, since it does not see images
    that are added later. A context closes it.

    Args:
      name: "images", "shapes" or "tfds".
      **options: keyword arguments of the source but `split`, a recipe's section `data`.

    Raises:
      UserError: for an unknown name or option.
    """

    def __init__(self, name: str, **options):
        if name not in SOURCES:
            known = ", ".join(sorted(SOURCES))
            raise UserError(f"unknown data source {name!r}; use one of {known}")
        self.name, self._options = name, options
        self._check(options)
        self._lock, self._sources, self._places = threading.Lock(), {}, {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def source(self, split: str, **view) -> Shapes | Resilient:
        """The source of a split.

        Args:
          split: "train", "validation", or another that the data set knows.
          **view: options that differ from those of the data set, such as `image`.

        Returns:
          The source. Files may be damaged: "images" and "tfds" come as `Resilient`, so that whoever
          reads them (the loader, the codes job, the samples) gets the same replacements.

        Raises:
          UserError: for an unknown split or option, or a place that cannot be read.
        """
        options = self._options | view
        self._check(options)
        key = split, *sorted(options.items())
        with self._lock:
            if key not in self._sources:
                self._sources[key] = self._open(split, options)
            return self._sources[key]

    def identity(self, split: str, **view) -> dict:
        """What defines the records of `source(split, **view)`: what is in the place, not where.

        Kept in code stores.
        """
        options = self._options | view
        about = {"name": self.name, "split": split}
        if self.name == "images":
            found = self.source(split, **view).source
            return about | {"image": found.image, "crop": found.crop, **found.content()}
        return about | {key: options[key] for key in sorted(options) if key != "data_dir"}

    def factors(self) -> dict[str, Sequence[str]]:
        """{factor: names of its values} of records with `factors`, in their order; {} without."""
        if self.name == "shapes":
            left_out = set() if self._options.get("positions") else {"position"}
            return {factor: values for factor, values in NAMES.items() if factor not in left_out}
        classes = self.source("train").source.classes
        return {"label": classes} if classes else {}

    def check_classes(self, classes: int, where: str) -> None:
        """Refuses data without classes, or with more than a model of the step `where` has.

        Args:
          classes: of the model; 0 reads none.

        Raises:
          UserError: the numbers are named.
        """
        found = len(self.factors().get("label", ())) if classes else 0
        if classes and not 0 < found <= classes:
            has = f"has {found} classes" if found else "is not in classes"
            raise UserError(
                f"{where}.model.classes={classes}, but the data {has}; set it to {found}, and to 0 "
                "for images without classes"
            )

    def judge(self) -> Judge | None:
        """The `judge.Judge` that reads factors off images; None for a data set that has none.

        Raises:
          UserError: the judge reads no images of this size.
        """
        if self.name != "shapes":
            return None
        known = ("image", "positions")
        return Judge(**{key: self._options[key] for key in known if key in self._options})

    def close(self) -> None:
        """Closes what is open, and forgets it. Whatever still reads opens its files again."""
        with self._lock:
            for found in self._sources.values():
                if self.name == "images":
                    found.source.close()
            self._sources, self._places = {}, {}

    def _check(self, options):
        parameters = inspect.signature(SOURCES[self.name]).parameters.values()
        known = {found.name for found in parameters if found.annotation is not found.empty}
        unknown = sorted(set(options) - known)
        if unknown:
            raise UserError(
                f"data source {self.name} has no option {', '.join(unknown)}; it has "
                f"{', '.join(sorted(known))}"
            )

    def _open(self, split, options):
        if self.name == "shapes":
            return Shapes(split=split, **options)
        if self.name == "tfds":
            return Resilient(Tfds(split=split, **options))
        place = {key: options[key] for key in PLACE if key in options}
        if "path" in place:
            key = tuple(sorted(place.items()))
            options = options | {"place": self._places.setdefault(key, Place(**place))}
        found = Images(split=split, **options)
        return Resilient(found, limit=found.limit)


def source(name: str, split: str, **options) -> Shapes | Resilient:
    """`DataSet(name, **options).source(split)`."""
    return DataSet(name, **options).source(split)


def identity(name: str, split: str, **options) -> dict:
    """`DataSet(name, **options).identity(split)`."""
    return DataSet(name, **options).identity(split)


def factors(name: str, **options) -> dict[str, Sequence[str]]:
    """`DataSet(name, **options).factors()`."""
    return DataSet(name, **options).factors()


def judge(name: str, **options) -> Judge | None:
    """`DataSet(name, **options).judge()`."""
    return DataSet(name, **options).judge()


def choose(source, count: int) -> np.ndarray:
    """Rows of `count` records that stand for all, increasing.

    They are evenly spaced, because files are sorted by class; of `Shapes` they are the first.
    """
    count = min(count, len(source))
    rows = np.arange(count)
    return rows if isinstance(source, Shapes) else rows * len(source) // count
