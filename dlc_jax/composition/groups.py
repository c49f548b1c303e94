"""Positions by the name of what they say.

A group is of a kind of crops, since an encoder that learns from several shares its positions out
among them, or of a cluster that `dlc positions W` found, in the `positions.json` of the run.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dlc_jax.errors import UserError

FILE = "positions.json"  # of a run: {"length": l, "groups": {name: positions}, …}


def shared_out(crops: Mapping[str, Mapping[str, Any]], length: int) -> dict[str, range]:
    """{kind: its positions}: runs in the order of the kinds' names, as long as their shares say.

    Args:
      crops: {kind: arguments of `MultiCrop`}; one without a `share` has 1.

    Raises:
      UserError: a kind would have none.
    """
    shares = {kind: crops[kind].get("share", 1) for kind in sorted(crops)}
    ends = list(itertools.accumulate(shares.values(), initial=0))
    ends = [length * end // ends[-1] for end in ends]
    if any(start == stop for start, stop in itertools.pairwise(ends)):
        given = ", ".join(f"{kind} {share}" for kind, share in shares.items())
        raise UserError(f"{length} positions are too few for the shares of its crops ({given})")
    return {kind: range(*ends[n : n + 2]) for n, kind in enumerate(shares)}


def known(encoder: Any, found: Mapping | None) -> dict[str, tuple[int, ...]]:
    """{name: positions} of a run: its kinds of crops if there are several, and its clusters.

    Args:
      encoder: the section of an encoder in an expanded recipe; None without one.
      found: what the run's `positions.json` holds, None without one. A kind keeps its name.

    Raises:
      UserError: the file is of other codes.
    """
    groups: dict[str, Sequence[int]] = {}
    if encoder is not None and len(encoder.crops) > 1:
        groups |= shared_out(encoder.crops, encoder.model.simplicial["positions"])
    if found is not None:
        length, own = found.get("length"), found.get("groups")
        is_other = encoder is not None and length != encoder.model.simplicial["positions"]
        if is_other or not isinstance(own, Mapping):
            raise UserError(f"{FILE} is not of the codes of this run; run dlc positions W again")
        groups |= {name: own[name] for name in own if name not in groups}
    return {name: tuple(map(int, positions)) for name, positions in groups.items()}


def positions(
    given: Sequence[int | str], groups: Mapping[str, Sequence[int]], length: int, where: str
) -> list[int]:
    """Positions of numbers, ranges "0-11" and names of groups.

    Args:
      where: they are given, for messages.

    Raises:
      UserError: an unknown name, with those that are known, or a position that no code has.
    """
    found: list[int] = []
    for each in given:
        low, dash, high = str(each).partition("-")
        if each in groups:
            found += groups[each]
        elif low.isdecimal() and (high.isdecimal() if dash else True):
            if int(high or low) < int(low):
                raise UserError(f"{where}: {each} is not a range of positions such as 0-11")
            if int(high or low) >= length:
                raise UserError(f"{where}: positions lie in 0..{length - 1}; got {each}")
            found += range(int(low), int(high or low) + 1)
        elif groups:
            raise UserError(f"{where}: no group of positions {each!r}; known: {', '.join(groups)}")
        else:
            raise UserError(
                f"{where}: {each!r} names a group, and this run has none; run dlc positions W, or "
                "give positions such as 0-11"
            )
    return found


def blocks(groups: Mapping[str, Sequence[int]], length: int) -> np.ndarray:
    """The number of the group of every position, int [l]; of several the first counts.

    A position in none is a block by itself.
    """
    found = np.full(length, -1)
    for number, positions in enumerate(groups.values()):
        at = np.asarray(positions, int)
        found[at[found[at] < 0]] = number
    free = found < 0
    found[free] = len(groups) + np.arange(free.sum())
    return np.unique(found, return_inverse=True)[1]
