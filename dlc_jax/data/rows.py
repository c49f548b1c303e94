"""Rows of features: read in blocks, and refused where no metric can use them."""

from collections.abc import Iterator

import numpy as np

from dlc_jax.errors import UserError

READ = 4096  # rows held at a time


def blocks(features: np.ndarray, size: int = READ) -> Iterator[tuple[int, np.ndarray]]:
    """Pairs (first row, rows [<= size, d]) of features [n, d], which may be a memory map.

    They are float32, or float64 where the features are.
    """
    kind = np.result_type(features.dtype, np.float32)
    for start in range(0, len(features), size):
        yield start, np.asarray(features[start : start + size], kind)


def check(
    features: np.ndarray,
    name: str,
    *,
    least: int = 1,
    varied: bool = False,
    first: int = 0,
    width: int | None = None,
) -> None:
    """Refuses features [n, d] that a metric cannot use; `name` says whose they are.

    Args:
      least: rows that the metric needs.
      varied: whether the metric is undefined when all rows are equal.
      first: the number of the first row, in the stream of which these are a part.
      width: d, if it is given by others.

    Raises:
      UserError: not a matrix; another width; fewer rows; NaN or infinite rows; all rows equal.
    """
    shape = np.shape(features)
    if len(shape) != 2 or width not in (None, shape[1]):
        raise UserError(
            f"{name} must be [images, {width or 'width'}], not {list(shape)}; "
            "compute all with one feature network"
        )
    if len(features) < least:
        raise UserError(f"{name}: {len(features)} rows, the metric needs {least}; give more images")
    wrong, equal = [np.zeros(0, int)], varied
    for start, block in blocks(features):
        wrong.append(start + np.flatnonzero(~np.isfinite(block).all(axis=1)))
        equal = equal and bool((block == features[:1]).all())
    wrong = np.concatenate(wrong)
    if len(wrong):
        raise UserError(
            f"{name}: {len(wrong)} of {len(features)} rows are NaN or infinite, the first is row "
            f"{first + wrong[0]}; look at that image and at the weights of the feature network"
        )
    if equal:
        raise UserError(
            f"{name}: all {len(features)} rows are equal, the metric is undefined; "
            "look at the images and at the weights of the feature network"
        )


def check_pair(samples: np.ndarray, reference: np.ndarray, **needs) -> None:
    """`check` of two sets, which must also have one width.

    Raises:
      UserError: as `check`; or the widths differ.
    """
    check(samples, "samples", **needs)
    check(reference, "reference", width=np.shape(samples)[1], **needs)
