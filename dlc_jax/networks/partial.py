"""Codes that ask for something at some positions, and null at the others."""

from collections.abc import Sequence

import numpy as np

from dlc_jax.errors import UserError


def partial(codes: np.ndarray, known: np.ndarray | None, *, values: int, where: str) -> np.ndarray:
    """Codes int32 [b, l], or float32 [b, l, v + 1], that are null where `known` is False.

    Args:
      codes: int32 [b, l] or float32 [b, l, v], checked.
      known: bool [l] or [b, l]; None leaves the codes as they are.
      values: V, the value of null.

    Raises:
      UserError: a mask that does not go with the codes.
    """
    if known is None:
        return codes
    known, shape = np.asarray(known), codes.shape[:2]
    if known.dtype != bool or known.shape not in (shape, shape[1:]):
        raise UserError(
            f"{where}: known is bool {list(shape[1:])} or {list(shape)}; got {known.dtype} "
            f"{list(known.shape)}"
        )
    if codes.ndim == 2:
        return np.where(known, codes, values).astype(np.int32)
    known = np.broadcast_to(known, shape)[..., None]
    return np.concatenate([codes * known, ~known], -1).astype(np.float32)


def together(
    parents: Sequence[np.ndarray],
    known: Sequence[np.ndarray | None] | None,
    scales: Sequence[float],
    *,
    values: int,
    where: str,
) -> np.ndarray:
    """Partial codes of p parents side by side, [b, p, l] or [b, p, l, v (+ 1)].

    Raises:
      UserError: parents, masks or scales that do not go together.
    """
    masks = [None] * len(parents) if known is None else list(known)
    if not len(parents) == len(masks) == len(scales) > 0 or not np.isfinite(scales).all():
        raise UserError(
            f"{where}: {len(parents)} parents need as many masks and finite scales; got "
            f"{len(masks)} masks and scales {list(scales)}"
        )
    if any(mask is not None for mask in masks):  # then all are masked, which widens soft codes
        full = np.ones(parents[0].shape[1], bool)
        masks = [full if mask is None else mask for mask in masks]
    each = zip(parents, masks, strict=True)
    codes = [partial(parent, mask, values=values, where=where) for parent, mask in each]
    if len(shapes := {(one.shape, one.dtype.name) for one in codes}) > 1:
        found = " and ".join(sorted(f"{dtype} {list(shape)}" for shape, dtype in shapes))
        raise UserError(f"{where}: parents are codes of one shape and type; got {found}")
    return np.stack(codes, 1)
