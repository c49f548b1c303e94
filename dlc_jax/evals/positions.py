"""What single positions of codes say: of factors, of one another, and of the image.

Information is in bits, by counts. Every entropy is that of the frequencies plus (cells that occur -
1) / 2n nats (Miller and Madow, 1955): without it positions that are independent would seem to share
about (V - 1)^2 / 2n nats. Where many cells are too rare to occur the correction is too small, so
give more images than there are pairs of values.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

SAYS = 0.1  # of a factor's entropy, that a group's positions say on average to be named by it


def entropy(values: np.ndarray) -> float:
    """Of int [n], in bits; at least 0."""
    counts = np.unique(values, return_counts=True)[1]
    p = counts / len(values)
    nats = -(p * np.log(p)).sum() + (len(counts) - 1) / (2 * len(values))
    return float(nats / np.log(2))


def about(codes: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """What each position says of each factor, bits [l, f], of codes int [n, l], factors [n, f]."""
    return np.array([[_shared(a, b) for b in factors.T] for a in codes.T]).reshape(
        codes.shape[1], factors.shape[1]
    )


def among(codes: np.ndarray) -> np.ndarray:
    """What positions say of one another, bits [l, l]; the diagonal has their entropies."""
    length = codes.shape[1]
    found = np.diag([entropy(column) for column in codes.T])
    for i, j in zip(*np.triu_indices(length, k=1), strict=True):
        found[i, j] = found[j, i] = _shared(codes[:, i], codes[:, j])
    return found


def swaps(
    first: np.ndarray,
    second: np.ndarray,
    places: Sequence[Sequence[int]],
    decode: Callable,
    read: Callable | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """What some positions of A do that have the values of B, all else and the noise being A's.

    Args:
      first, second: codes of A and of B, int [n, l].
      places: s of the positions that are swapped, single ones or several at once.
      decode: codes to images uint8 [n, y, x, c], the n-th always with the n-th noise.
      read: images to factors int [n, f]; None of a data set without a judge.

    Returns:
      (rms, changed): rms [s], of the change of all pixels and channels, 0 to 255, over pairs whose
      values differ there; changed [s, f], the share of such pairs, of those whose images show
      another value of the factor, in which A's image then shows B's. nan where no pair is left.
    """
    before, other = decode(first), None
    if read is not None:
        shown, other = read(before), read(decode(second))
        open_ = shown != other
    rms, changed = [], []
    for place in map(list, places):
        codes = first.copy()
        codes[:, place] = second[:, place]
        differ = (codes != first).any(1)
        images = decode(codes)
        square = (images[differ].astype(np.float64) - before[differ]) ** 2
        rms.append(np.sqrt(square.mean()) if differ.any() else np.nan)
        if read is not None:
            asked = open_ & differ[:, None]
            won = (asked & (read(images) == other)).sum(0)
            changed.append(np.where(asked.any(0), won / np.maximum(asked.sum(0), 1), np.nan))
    return np.array(rms), np.array(changed) if changed else None


def clusters(information: np.ndarray, count: int | None = None) -> list[list[int]]:
    """Groups of positions that say the same, in the order of their first ones.

    By average linkage; two positions are 1 - I / min(H, H') apart, I being what they share.

    Args:
      information: as `among` gives it.
      count: at most so many. None cuts where the distance of groups that are joined rises most, to
        at most half as many groups as positions.
    """
    entropies = np.diag(information)
    least = np.minimum(entropies[:, None], entropies)
    apart = 1 - np.divide(information, least, out=np.zeros_like(information), where=least > 0)
    apart = np.clip(apart, 0, 1) * (1 - np.eye(len(apart)))
    if len(apart) == 1:
        return [[0]]
    tree = hierarchy.average(squareform(apart, checks=False))
    if count is None:
        rises = np.diff(tree[:, 2])[len(apart) // 2 - 1 :]  # the last is from two groups to one
        count = len(rises) + 1 - int(rises.argmax()) if len(rises) else 1
    of = hierarchy.fcluster(tree, count, criterion="maxclust")
    found = [np.flatnonzero(of == number).tolist() for number in np.unique(of)]
    return sorted(found)


def named(
    groups: Sequence[Sequence[int]], information: np.ndarray, factors: Mapping[str, float]
) -> dict[str, list[int]]:
    """{name: positions}: the factor that a group says most of, or c0, c1, … by the group's number.

    A factor that several groups say most of names none of them, nor does one of which the group
    says less than `SAYS`.

    Args:
      information: bits [l, f], see `about`.
      factors: {name: its entropy in bits}, by which what is said of it is divided.
    """
    found, names = {}, [*factors]
    shares = information / np.maximum(list(factors.values()), 1e-9)
    said = [shares[list(group)].mean(0) for group in groups]
    most = [int(each.argmax()) if len(each) and each.max() >= SAYS else None for each in said]
    for number, (group, top) in enumerate(zip(groups, most, strict=True)):
        is_its = top is not None and most.count(top) == 1
        found[names[top] if is_its else f"c{number}"] = list(group)
    return found


def _shared(a: np.ndarray, b: np.ndarray) -> float:
    """Mutual information of int [n] and int [n], bits, at least 0."""
    joint = a.astype(np.int64) * (int(b.max()) + 1) + b
    return max(0.0, entropy(a) + entropy(b) - entropy(joint))
