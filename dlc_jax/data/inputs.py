"""What users hand over, images, codes and embeddings, as networks take them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dlc_jax.data.decoder import center_crop, decode_image
from dlc_jax.data.naming import check_name
from dlc_jax.errors import UserError


def files(paths: Iterable[str | Path]) -> tuple[list[Path], list[Path]]:
    """(files named themselves, files found in folders named), each in order.

    Of a folder, files with the ending of an image count, sorted.

    Raises:
      UserError: a path does not exist, or a folder holds no image.
    """
    named, found = [], []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path} does not exist")
        if not path.is_dir():
            named.append(path)
            continue
        inside = sorted(
            file for file in path.rglob("*") if _counts(file.relative_to(path)) and file.is_file()
        )
        if not inside:
            raise UserError(f"{path} is a folder without images")
        found += inside
    return named, found


def _counts(name: Path) -> bool:
    """Whether a file in a folder is an image: not hidden, not a thumbnail, of a known format."""
    return check_name(name.as_posix())[1] is None


def read(path: Path) -> np.ndarray:
    """The image of a file, uint8 [y, x, 3], in its own size.

    Raises:
      UserError: it cannot be read, or is not an image.
    """
    try:
        return decode_image(path.read_bytes())
    except Exception as error:  # Pillow raises many types, each about the file
        reason = (
            getattr(error, "strerror", None)
            or (str(error).strip() or type(error).__name__).splitlines()[0]
        )
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "no format that Pillow knows"
        raise UserError(f"{path} cannot be read as an image: {reason}") from error


def fit(images: np.ndarray | Sequence[np.ndarray], *, size: int) -> np.ndarray:
    """Images uint8 [b, y, x, c], or a list of [y, x, c] of any sizes, as [b, size, size, 3].

    Another size is scaled and center-cropped as ADM does; gray, c=1, is repeated.

    Raises:
      UserError: other images.
    """
    fitted = np.empty((len(images), size, size, 3), np.uint8)
    for place, image in zip(fitted, map(np.asarray, images), strict=True):
        if (
            image.dtype != np.uint8
            or image.ndim != 3
            or image.shape[-1] not in (1, 3)
            or not image.size
        ):
            raise UserError(
                f"images are uint8 [b, y, x, c] with 1 or 3 channels; one of them is {image.dtype} "
                f"{image.shape}"
            )
        if image.shape[:2] != (size, size):
            colors = np.repeat(image, 3, -1) if image.shape[-1] == 1 else image
            image = np.asarray(center_crop(Image.fromarray(colors), size=size))
        place[:] = image
    return fitted


def check_codes(codes: np.ndarray, *, length: int, values: int, where: str) -> np.ndarray:
    """Codes as networks take them: hard int32 [b, length], or soft float32 [b, length, values].

    Raises:
      UserError: another shape or type, codes outside of [0, values), or soft codes that are no
        points of simplices.
    """
    codes = np.asarray(codes)
    if np.issubdtype(codes.dtype, np.integer) and codes.shape[1:] == (length,):
        if codes.size and (codes.min() < 0 or codes.max() >= values):
            raise UserError(
                f"{where}: codes must lie in 0..{values - 1}; found {codes.min()}..{codes.max()}"
            )
        return codes.astype(np.int32)
    if np.issubdtype(codes.dtype, np.floating) and codes.shape[1:] == (length, values):
        if not (codes >= 0).all() or (abs(codes.sum(-1, dtype=np.float64) - 1) > 1e-3).any():
            raise UserError(
                f"{where}: soft codes are points of simplices: at each position none below 0, and "
                "1 in all"
            )
        return codes.astype(np.float32)
    kinds = f"integers [b, {length}], or floats [b, {length}, {values}]"
    raise UserError(f"{where}: codes of this run are {kinds}; got {codes.dtype} {codes.shape}")


def check_embeddings(
    embeddings: np.ndarray | None, *, width: int, count: int | None, where: str
) -> np.ndarray:
    """Embeddings as networks take them, float32 [b, width].

    Args:
      width: 0 of a network that reads none.
      count: b, where something else says it.

    Raises:
      UserError: none, another shape or type, values that are not finite, or a network without.
    """
    if not width:
        raise UserError(f"{where} was trained without embeddings; give none")
    if embeddings is None:
        raise UserError(f"{where} was trained with embeddings; give some, as from embed")
    found = np.asarray(embeddings)
    fits = found.ndim == 2 and found.shape[1] == width and count in (None, len(found))
    if not fits or found.dtype.kind != "f" or not np.isfinite(found).all():
        raise UserError(
            f"{where}: embeddings are finite floats [{count or 'b'}, {width}]; got {found.dtype} "
            f"{list(found.shape)}"
        )
    return found.astype(np.float32)
