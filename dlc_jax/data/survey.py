"""What is in a place of images: counts, classes, sizes, formats, damage, and a contact sheet."""

import collections
import dataclasses
import os
import pathlib

import numpy as np
from PIL import Image

from dlc_jax.data import decoder, files, naming, records
from dlc_jax.data.sweep import sweep
from dlc_jax.errors import UserError

SHEET, TILE, GAP = 8, 112, 4  # images in a row and in a column; pixels


@dataclasses.dataclass(frozen=True)
class Survey:
    """What `survey` found.

    Attributes:
      kind: "folder", "tar", "zip", "idx", "npz", "parquet", "records" or "tfds".
      count: images in all; bytes: of all of them as stored, None if not known.
      splits: {"train", "validation", "test": images}, {} if no folders say so; classes: {name:
        images}.
      looked: how many were decoded; the rest of the fields is of these.
      formats, modes: {"JPEG": images}, {"RGB": images}.
      widths, heights: int [m] in pixels, of those whose header can be read.
      broken: [(name, what is wrong)].
      skipped: {reason: count} of what lies there and was left out.
      damage: a line about the place as a whole, such as a shard that has changed, or None.
    """

    kind: str
    count: int
    bytes: int | None
    splits: dict[str, int]
    classes: dict[str, int]
    looked: int
    formats: dict[str, int]
    modes: dict[str, int]
    widths: np.ndarray
    heights: np.ndarray
    broken: list[tuple[str, str]]
    skipped: dict[str, int]
    damage: str | None


def survey(path, *, field="image", sample=None, workers=None, progress=None):
    """Looks at the images of a place, each decoded as for training.

    What would fail in training is found here.

    Args:
      path: as `files.open_files` takes it.
      field: image column of Parquet, image feature of TFDS, array of .npz.
      sample: how many to decode, spread evenly over the names; all if None.
      workers: threads; as many as there are cores if None.
      progress: called as progress(done, total), now and then.

    Returns:
      (Survey, contact sheet as a Pillow image: up to 64 images, spread evenly over the names,
      center-cropped).

    Raises:
      UserError: nothing there can be read as a set of images.
    """
    images = files.scan(path, field=field, cache_gb=files.UNPACKED_GB)
    names, labels, splits = images.names, images.labels, naming.split_of(images.names) or []
    order = range(len(images))
    if not images.sequential:
        order = sorted(order, key=names.__getitem__)
    rows = spread(order, len(order) if sample is None else sample)
    wanted = set(spread(rows, SHEET * SHEET))
    workers = 1 if images.sequential else workers or os.cpu_count() or 1
    formats, modes, sizes, broken, tiles = collections.Counter(), collections.Counter(), [], [], []
    check = images.kind == "records" and sample is None
    part = progress and (lambda done, total: progress(done, total + len(images) * check))
    looks = sweep(
        lambda row: _look(images, row, row in wanted), rows, workers=workers, progress=part
    )
    for row, (header, wrong, tile) in zip(rows, looks):
        if header:
            formats[header[0]] += 1
            modes[header[1]] += 1
            sizes.append(header[2:])
        if wrong:
            broken.append((names[row], wrong))
        elif tile is not None:
            tiles.append(tile)
    counts, damage = [], None
    if images.classes:
        counts = np.bincount(labels[labels >= 0], minlength=len(images.classes)).tolist()
    if check:
        second = progress and (lambda done, total: progress(done + total, 2 * total))
        damage = _damage(path, progress=second)
    found = Survey(
        kind=images.kind,
        count=len(images),
        bytes=images.size,
        splits={
            split: splits.count(split)
            for split in ("train", "validation", "test")
            if split in splits
        },
        classes=dict(zip(images.classes, counts)),
        looked=len(rows),
        formats=dict(formats.most_common()),
        modes=dict(modes.most_common()),
        widths=np.array([width for width, _ in sizes], np.int64),
        heights=np.array([height for _, height in sizes], np.int64),
        broken=broken,
        skipped=images.skipped,
        damage=damage,
    )
    return found, contact_sheet(tiles)


def spread(rows, count):
    """At most `count` of a sequence, evenly spread over it."""
    count = min(count, len(rows))
    return [rows[k * len(rows) // count] for k in range(count)]


def contact_sheet(tiles):
    """A Pillow image of square tiles [TILE, TILE, 3] in rows of eight; gray if there are none."""
    columns = min(SHEET, max(len(tiles), 1))
    across, down = columns, max(-(-len(tiles) // columns), 1)
    sheet = Image.new(
        "RGB", (GAP + across * (TILE + GAP), GAP + down * (TILE + GAP)), (238, 238, 238)
    )
    for k, tile in enumerate(tiles):
        sheet.paste(
            Image.fromarray(tile),
            (GAP + k % columns * (TILE + GAP), GAP + k // columns * (TILE + GAP)),
        )
    return sheet


def _look(images, row, wanted):
    """((format, mode, width, height) or None, what is wrong or None, tile or None) of one image."""
    header = None
    try:
        data = images.read(row)
        if not data:
            raise ValueError("no bytes")
        with decoder.identify(data) as file:
            header = (file.format, file.mode, *file.size)
        pixels = decoder.decode_image(data)
        return (
            header,
            None,
            np.asarray(decoder.center_crop(Image.fromarray(pixels), size=TILE)) if wanted else None,
        )
    except UserError:
        raise
    except Image.UnidentifiedImageError:
        return None, "not an image of a known format", None
    except Exception as error:  # Pillow raises many types, each about the file
        reason = (
            getattr(error, "strerror", None)
            or (str(error).strip() or type(error).__name__).splitlines()[0]
        )
        return header, reason, None


def _damage(path, *, progress):
    """Records know their checksums; what has changed may still decode."""
    try:
        records.verify(pathlib.Path(path).expanduser(), progress=progress)
    except UserError as error:
        return str(error)
    return None
