"""Votes of the nearest training examples, by Hamming distance of codes or cosine of features."""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse

NEIGHBORS = (10, 20, 100, 200)
TEMPERATURE = 0.07


def nearest_neighbors(
    codes_train: np.ndarray, codes_test: np.ndarray, *, neighbors: int
) -> np.ndarray:
    """Returns int [n_test, neighbors], the nearest training codes in Hamming distance.

    Nearest first, ties by lower index.
    """
    count, length = codes_train.shape
    neighbors = min(neighbors, count)
    values = 1 + int(max(codes_train.max(), codes_test.max(initial=0)))  # as int: uint8 would wrap
    train, test = _one_hot(codes_train, values), _one_hot(codes_test, values)
    chunk = max(1, 8_000_000 // count)
    found = []
    for start in range(0, len(codes_test), chunk):
        # Products of sparse rows look only at pairs that agree somewhere: V times less work than
        # comparing every position.
        distance = length - (test[start : start + chunk] @ train.T).toarray().astype(np.int64)
        # Distances tie often; with the index in the key, the neighbors do not depend on how a
        # partition orders equal ones.
        key = distance * count + np.arange(count)
        nearest = np.partition(key, neighbors - 1, axis=1)[:, :neighbors]
        found.append(np.sort(nearest, axis=1) % count)
    return np.concatenate(found) if found else np.zeros((0, neighbors), np.int64)


def vote(labels: np.ndarray, *, classes: int) -> np.ndarray:
    """Returns int [n], the most frequent of labels [n, neighbors], which come nearest first.

    Nearer ones decide between equals.
    """
    # Each vote counts 1, less a little for its rank: too little for all ranks together to outweigh
    # a vote.
    neighbors = labels.shape[1]
    weight = 1 - np.arange(neighbors) / (neighbors * (neighbors + 1))
    votes = np.einsum("nkc,k->nc", np.eye(classes)[labels], weight)
    return votes.argmax(axis=1)


def feature_knn(
    train: np.ndarray,
    labels_train: np.ndarray,
    unseen: np.ndarray,
    labels_unseen: np.ndarray,
    *,
    classes: Sequence[int],
    neighbors: Sequence[int] = NEIGHBORS,
    temperature: float = TEMPERATURE,
    chunk_bytes: int = 2**28,
) -> Mapping[int, np.ndarray]:
    """Accuracy of votes of the nearest features by cosine, weighted by exp(cosine / temperature).

    Source: DINO (arXiv 2104.14294).

    Args:
      train, unseen: float [n, d].
      labels_train, labels_unseen: int [n, f].
      classes: how many values each of the f factors has.
      neighbors: numbers of voters; those beyond the training set are left out.
      chunk_bytes: of similarities held at a time.

    Returns:
      {number of voters: accuracy of each factor, [f]}.
    """
    counts = tuple(sorted({number for number in neighbors if number <= len(train)}))
    if not counts:
        return {}
    bank, labels = _unit(jnp.asarray(train, jnp.float32)), jnp.asarray(labels_train, jnp.int32)
    chunk = min(len(unseen), max(1, chunk_bytes // (4 * len(train))))
    right = np.zeros((len(counts), len(classes)))
    for start in range(0, len(unseen), chunk):
        rows = np.minimum(np.arange(start, start + chunk), len(unseen) - 1)
        fresh = np.arange(start, start + chunk) < len(unseen)  # the last chunk is filled up
        asked = jnp.asarray(unseen[rows], jnp.float32)
        kinds = {"counts": counts, "classes": tuple(classes), "temperature": temperature}
        guess = _vote_by_cosine(bank, labels, asked, **kinds)
        right += ((np.asarray(guess) == labels_unseen[rows]) & fresh[:, None]).sum(axis=1)
    return dict(zip(counts, right / len(unseen), strict=True))


@functools.partial(jax.jit, static_argnames=("counts", "classes", "temperature"))
def _vote_by_cosine(bank, labels, unseen, *, counts, classes, temperature):
    """int [numbers of voters, b, f]."""
    cosine, nearest = jax.lax.top_k(_unit(unseen) @ bank.T, counts[-1])
    weight = jnp.exp((cosine - cosine[:, :1]) / temperature)

    def voted(number, column, kinds):
        rows, label = jnp.arange(len(unseen))[:, None], labels[nearest[:, :number], column]
        votes = jnp.zeros((len(unseen), kinds)).at[rows, label].add(weight[:, :number])
        return votes.argmax(-1)

    def of_all_factors(number):
        return [voted(number, column, kinds) for column, kinds in enumerate(classes)]

    return jnp.stack([jnp.stack(of_all_factors(number), -1) for number in counts])


def _unit(x):
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _one_hot(codes: np.ndarray, values: int) -> scipy.sparse.csr_array:
    codes = np.asarray(codes)
    count, length = codes.shape
    columns = codes.astype(np.int64) + np.arange(length) * values
    rows = np.arange(count + 1, dtype=np.int64) * length
    return scipy.sparse.csr_array(
        (np.ones(columns.size), columns.ravel(), rows), shape=(count, length * values)
    )
