"""Which images are composed; how is in `dlc_jax.composition`."""

import numpy as np


def choose_parents(factors: np.ndarray, count: int, *, parents: int, seed: int) -> np.ndarray:
    """Chooses groups of rows of factors [n, f], any two of which differ in every factor.

    A factor with fewer values than there are parents cannot differ: leave its column out. An image
    may be in several groups.

    Returns:
      int [count, parents].

    Raises:
      ValueError: there is no such group, or too few were found.
    """
    factors = np.asarray(factors)
    for column in factors.T:
        if (kinds := len(np.unique(column))) < parents:
            raise ValueError(f"{parents} parents cannot all differ in a factor of {kinds} values")
    random = np.random.default_rng(seed)
    groups: list[list[int]] = []
    tries = 20 * count
    while len(groups) < count and tries:
        tries -= 1
        group = [int(random.integers(len(factors)))]
        while len(group) < parents:
            fits = np.flatnonzero(np.all(factors[:, None] != factors[None, group], axis=(1, 2)))
            if not len(fits):
                break  # this start has no company; another may
            group.append(int(random.choice(fits)))
        if len(group) == parents:
            groups.append(group)
    if len(groups) < count:
        raise ValueError(
            f"found {len(groups)} of {count} groups of {parents} images that differ in every factor"
        )
    return np.asarray(groups, np.int64).reshape(count, parents)
