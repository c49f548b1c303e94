"""A set of images that is scored: all of one size, RGB, known by a hash of its content."""

import collections
import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from dlc_jax.data.decoder import decode_image, identify
from dlc_jax.data.files import Place
from dlc_jax.data.sweep import sweep
from dlc_jax.errors import UserError
from dlc_jax.hosts import agreement

WORKERS = min(16, os.cpu_count() or 1)
PART = 1024  # images of one hash: of several processes each looks at other parts
SHOWN = 3  # sizes that a message lists
GRAY = ("1", "L", "LA", "I", "F")  # modes of Pillow, before a ";"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images to read by number, from several threads.

    Attributes:
      name: of the place, for messages.
      read: number -> uint8 [y, x, 3].
      count: how many.
      size: (y, x) of all of them.
      sha256: of the content, in this order: of encoded files, or of pixels that are in memory.
      gray: how many are gray in their files; the gray is repeated.
      skipped: {reason: count} of what is in the place and is not an image.
    """

    name: str
    read: Callable[[int], np.ndarray]
    count: int
    size: tuple[int, int]
    sha256: str
    gray: int = 0
    skipped: dict = dataclasses.field(default_factory=dict)


def open_set(
    path: str | Path,
    *,
    count: int | None = None,
    image: int | None = None,
    gray: bool = False,
    cache: str | None = None,
    cache_gb: float = 20.0,
    field: str = "image",
) -> ImageSet:
    """The images of a place, each of which is looked at: its bytes and its header.

    Args:
      path: whatever `data.files.scan` opens: a folder, an archive, an .npz such as ADM's, IDX,
        Parquet, records of `dlc data convert`.
      count: of them, evenly spaced in the order of their names, since files are sorted by class;
        None takes all.
      image: side to which images are brought, the short side scaled and the center cropped as ADM
        does. None takes them as they are, and they must be of one size.
      gray: whether all images may be gray.
      cache, cache_gb, field: see `Place`.

    Raises:
      UserError: no images; fewer than `count`; several sizes; all gray; an image that cannot be
        read.
    """
    listing = Place(path, cache=cache, cache_gb=cache_gb, field=field).images()
    rows = _spaced(len(listing), count, path)
    decode = functools.partial(decode_image, image=image)
    read = functools.partial(_named, listing, path, rows, decode)
    look = functools.partial(_named, listing, path, rows, _look)
    found = _survey(look, len(rows))
    if image is None and len(found["sizes"]) > 1:
        raise UserError(f"{path}: {_several(found['sizes'])}")
    if found["gray"] == len(rows) and not gray:
        raise UserError(
            f"{path}: all {len(rows)} images are gray, and features are of color images; give "
            "--gray to score them with the gray repeated"
        )
    size = (image, image) if image else found["sizes"].most_common(1)[0][0]
    about = hashlib.sha256(f"{found['sha256']} {image}".encode()).hexdigest()
    sha256 = found["sha256"] if image is None else about
    skipped = dict(listing.skipped)
    counts = {"count": len(rows), "gray": found["gray"], "skipped": skipped}
    return ImageSet(name=str(path), read=read, size=size, sha256=sha256, **counts)


def of_pixels(name: str, read: Callable[[int], np.ndarray], count: int) -> ImageSet:
    """Images uint8 [y, x, 1 or 3] that are in memory or drawn, such as an array's __getitem__.

    Raises:
      UserError: there are none, or they are of several sizes.
    """
    if count < 1:
        raise UserError(f"{name}: there are no images")

    def look(number):
        pixels = np.ascontiguousarray(read(number))
        return pixels.shape[:2], pixels.shape[-1] == 1, hashlib.sha256(pixels).digest()

    def rgb(number):
        return np.broadcast_to(pixels := read(number), (*pixels.shape[:2], 3))

    found = _survey(look, count)
    if len(found["sizes"]) > 1:
        raise UserError(f"{name}: {_several(found['sizes'])}")
    (size,) = found["sizes"]
    about = {"size": size, "sha256": found["sha256"], "gray": found["gray"]}
    return ImageSet(name=name, read=rgb, count=count, **about)


def spaced(found: ImageSet, count: int) -> np.ndarray:
    """Numbers of at most `count` images that stand for all: evenly spaced, increasing."""
    count = min(count, found.count)
    return np.arange(count) * found.count // count


def _spaced(there: int, count: int | None, path) -> Sequence[int]:
    count = there if count is None else count
    if count > there:
        raise UserError(f"{path} has {there} images, not {count}; give a --count that is there")
    return (np.arange(count) * there // count).tolist()


def _named(listing, path, rows, use, number):
    """use(bytes of an image); what is wrong with it names it."""
    name = listing.names[rows[number]]
    try:
        return use(listing.read(rows[number]))
    except UserError:
        raise
    except Exception as error:  # Pillow raises many types, each about the file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path}: {name} cannot be read: {reason}; a set is scored whole or not at all"
        ) from error


def _look(data: bytes):
    """(size, whether it is gray, hash) of an encoded image, from its header."""
    file = identify(data)
    width, height = file.size
    if file.getexif().get(0x0112, 1) > 4:  # turned by a quarter
        width, height = height, width
    return (height, width), file.mode.partition(";")[0] in GRAY, hashlib.sha256(data).digest()


def _survey(look, count: int) -> dict:
    """Sizes {(y, x): images}, number of gray ones and SHA-256 of all; processes share the work."""
    parts = range(jax.process_index(), -(-count // PART), jax.process_count())
    numbers = [n for part in parts for n in range(part * PART, min(count, (part + 1) * PART))]
    sizes, gray, hashes = collections.Counter(), 0, {}
    for number, (size, is_gray, sha256) in zip(numbers, sweep(look, numbers, workers=WORKERS)):
        sizes[size] += 1
        gray += is_gray
        hashes.setdefault(number // PART, hashlib.sha256()).update(sha256)
    own = {part: found.hexdigest() for part, found in hashes.items()}
    told = agreement.gather("images", [[[*key, n] for key, n in sizes.items()], gray, own])
    total = collections.Counter()
    for listed, _, _ in told:
        for rows, columns, n in listed:
            total[rows, columns] += n
    every = {int(part): text for _, _, texts in told for part, text in texts.items()}
    whole = hashlib.sha256("".join(every[part] for part in sorted(every)).encode()).hexdigest()
    return {"sizes": total, "gray": sum(gray for _, gray, _ in told), "sha256": whole}


def _several(sizes: collections.Counter) -> str:
    listed = [f"{n} of {rows} x {columns}" for (rows, columns), n in sizes.most_common(SHOWN)]
    more = f" and {len(sizes) - SHOWN} more sizes" if len(sizes) > SHOWN else ""
    return (
        f"images of {len(sizes)} sizes, {', '.join(listed)}{more}; give images of one size, or "
        "--image=N to scale the short side and crop the center"
    )
