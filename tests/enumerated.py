"""Codes so short that their joint distribution can be written down, and its exact network."""

import itertools

import jax.numpy as jnp
import numpy as np

LENGTH, VALUES = 3, 3
CODES = np.array(list(itertools.product(range(VALUES), repeat=LENGTH)))  # [27, 3]
MASKS = np.array(list(itertools.product([False, True], repeat=LENGTH)))  # [8, 3]


def joint(seed=0, *, floor=0.0):
    """Chances of the codes; `floor` of it is spread evenly."""
    p = np.random.default_rng(seed).dirichlet(np.full(len(CODES), 0.4))
    return (1 - floor) * p + floor / len(CODES)


def conditionals(p):
    """[4 4 4 l v], log p(value of a position | visible values), by noisy code; 3 is the mask."""
    table = np.zeros((VALUES + 1,) * LENGTH + (LENGTH, VALUES))
    for noisy in itertools.product(range(VALUES + 1), repeat=LENGTH):
        fits = np.all((CODES == noisy) | (np.array(noisy) == VALUES), axis=1)
        for position in range(LENGTH):
            for value in range(VALUES):
                table[noisy][position, value] = p[fits & (CODES[:, position] == value)].sum()
    return np.log(table / table.sum(-1, keepdims=True) + 1e-30)


def lookup(table):
    """noisy codes [b, l], and anything else, to rows of the table."""
    table = jnp.asarray(table, jnp.float32)
    return lambda noisy, *_: table[tuple(noisy[:, i] for i in range(LENGTH))]


def counts(codes):
    """How often each of CODES is among these."""
    index = np.ravel_multi_index(np.asarray(codes).T, (VALUES,) * LENGTH)
    return np.bincount(index, minlength=len(CODES))


def variation(codes, p):
    """Total variation distance of drawn codes from chances p."""
    return 0.5 * np.abs(counts(codes) / len(codes) - p).sum()
