"""What the codes know: ridge regression on one-hot codes, and nearest neighbors in Hamming distance."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import scipy.linalg
import scipy.sparse

# Up to this width (L * V) the normal equations are solved directly; beyond, by conjugate gradients, without ever forming them.
DIRECT_WIDTH = 4096
RIDGE = (0.1, 1.0, 10.0, 100.0)


def probe(
    codes_train: np.ndarray,
    factors_train: np.ndarray,
    codes_test: np.ndarray,
    factors_test: np.ndarray,
    *,
    names: Sequence[str],
    values: int,
    classes: Sequence[int],
    ridge: float | Sequence[float] = RIDGE,
    neighbors: int = 5,
) -> Mapping[str, float]:
    """Measures how well each factor can be read from the codes.

    Args:
      codes_train, codes_test: int [n, l], each in 0..values-1.
      factors_train, factors_test: int [n, f].
      names: the f factors' names.
      values: V.
      classes: how many values each factor has.
      ridge: the strength, or candidates to choose from on a part of the training set.
      neighbors: how many vote in `probe_knn`.

    Returns:
      `probe/{name}` and `probe_knn/{name}`, shares of right answers on the test set, with `probe/count` and `probe_knn/count`.
    """
    linear = _linear_probes(codes_train, factors_train, codes_test, factors_test, values=values, classes=classes, ridge=ridge)
    results: dict[str, float] = {f"probe/{name}": accuracy for name, accuracy in zip(names, linear, strict=True)}
    results["probe/count"] = len(codes_test)
    nearest = nearest_neighbors(codes_train, codes_test, neighbors=neighbors)
    for column, name in enumerate(names):
        guess = vote(factors_train[:, column][nearest], classes=classes[column])
        results[f"probe_knn/{name}"] = float(np.mean(guess == factors_test[:, column]))
    return results | {"probe_knn/count": len(codes_test)}


def linear_probe(
    codes_train: np.ndarray,
    labels_train: np.ndarray,
    codes_test: np.ndarray,
    labels_test: np.ndarray,
    *,
    values: int,
    classes: int,
    ridge: float | Sequence[float] = RIDGE,
) -> float:
    """Returns the test accuracy of ridge regression from one-hot codes to one-hot labels.

    Logits are `b + sum_i W[i, c_i]`, an embedding bag: one-hot codes exist only as sparse rows with l ones, and the normal
    equations are counts of values and of pairs of values. Given several strengths, the one that does best on a fifth of the
    training set is used on all of it; the test set is only ever scored.

    Args:
      codes_train, codes_test: int [n, l], each in 0..values-1.
      labels_train, labels_test: int [n], each in 0..classes-1.
      values: V.
      classes: how many labels there are.
      ridge: the strength, or candidates.

    Raises:
      ValueError: a code is outside 0..values-1, where it would be taken for a value of the next position.
    """
    labels = labels_train[:, None], labels_test[:, None]
    return _linear_probes(codes_train, labels[0], codes_test, labels[1], values=values, classes=[classes], ridge=ridge)[0]


def knn(
    codes_train: np.ndarray,
    labels_train: np.ndarray,
    codes_test: np.ndarray,
    labels_test: np.ndarray,
    *,
    classes: int,
    neighbors: int = 5,
) -> float:
    """Returns the test accuracy of the vote of the `neighbors` codes nearest in Hamming distance."""
    nearest = nearest_neighbors(codes_train, codes_test, neighbors=neighbors)
    return float(np.mean(vote(labels_train[nearest], classes=classes) == labels_test))


def nearest_neighbors(codes_train: np.ndarray, codes_test: np.ndarray, *, neighbors: int) -> np.ndarray:
    """Returns int [n_test, neighbors], the nearest training codes in Hamming distance, nearest first, ties by lower index."""
    count, length = codes_train.shape
    neighbors = min(neighbors, count)
    values = 1 + int(max(codes_train.max(), codes_test.max(initial=0)))  # as int: uint8 would wrap
    train, test = _one_hot(codes_train, values), _one_hot(codes_test, values)
    chunk = max(1, 8_000_000 // count)
    found = []
    for start in range(0, len(codes_test), chunk):
        # Products of sparse rows look only at pairs that agree somewhere: V times less work than comparing every position.
        distance = length - (test[start : start + chunk] @ train.T).toarray().astype(np.int64)
        # Distances tie often; with the index in the key, the neighbors do not depend on how a partition orders equal ones.
        key = distance * count + np.arange(count)
        found.append(np.sort(np.partition(key, neighbors - 1, axis=1)[:, :neighbors], axis=1) % count)
    return np.concatenate(found) if found else np.zeros((0, neighbors), np.int64)


def vote(labels: np.ndarray, *, classes: int) -> np.ndarray:
    """Returns int [n], the most frequent of labels [n, neighbors], nearest first; nearer ones decide between equals."""
    # Each vote counts 1, less a little for its rank, too little for all ranks together to outweigh a vote.
    neighbors = labels.shape[1]
    weight = 1 - np.arange(neighbors) / (neighbors * (neighbors + 1))
    votes = np.einsum("nkc,k->nc", np.eye(classes)[labels], weight)
    return votes.argmax(axis=1)


def _linear_probes(
    codes_train: np.ndarray,
    labels_train: np.ndarray,
    codes_test: np.ndarray,
    labels_test: np.ndarray,
    *,
    values: int,
    classes: Sequence[int],
    ridge: float | Sequence[float],
) -> list[float]:
    """Returns the accuracy of every column of labels [n, f]; all are solved for at once, each with its own choice of strength."""
    strengths = np.atleast_1d(np.asarray(ridge, np.float64))
    x, x_test = _one_hot(codes_train, values), _one_hot(codes_test, values)
    y = np.concatenate([np.eye(kinds)[labels_train[:, column]] for column, kinds in enumerate(classes)], axis=1)
    edges = np.cumsum(classes)[:-1]

    def accuracies(strength, fit_x, fit_y, score_x, score_labels):
        weight, bias = _fit(fit_x, fit_y, strength=strength)
        logits = np.split(score_x @ weight + bias, edges, axis=1)
        return [float(np.mean(part.argmax(axis=1) == score_labels[:, column])) for column, part in enumerate(logits)]

    best = np.zeros(len(classes), int)
    if len(strengths) > 1:
        order = np.random.default_rng(0).permutation(len(codes_train))
        held, kept = np.split(order, [max(1, len(order) // 5)])
        best = np.argmax([accuracies(s, x[kept], y[kept], x[held], labels_train[held]) for s in strengths], axis=0)
    final = {choice: accuracies(strengths[choice], x, y, x_test, labels_test) for choice in set(best.tolist())}
    return [final[choice][column] for column, choice in enumerate(best.tolist())]


def _one_hot(codes: np.ndarray, values: int) -> scipy.sparse.csr_array:
    codes = np.asarray(codes)
    count, length = codes.shape
    if codes.size and (codes.min() < 0 or codes.max() >= values):
        raise ValueError(f"codes run from {codes.min()} to {codes.max()}; they must lie in 0..{values - 1}")
    columns = codes.astype(np.int64) + np.arange(length) * values
    rows = np.arange(count + 1, dtype=np.int64) * length
    return scipy.sparse.csr_array((np.ones(columns.size), columns.ravel(), rows), shape=(count, length * values))


def _fit(x: scipy.sparse.csr_array, y: np.ndarray, *, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Minimizes |x w + b - y|^2 + strength |w|^2; the bias is not penalized."""
    count, width = x.shape
    x_mean, y_mean = np.asarray(x.mean(axis=0)).ravel(), y.mean(axis=0)
    right = x.T @ (y - y_mean)  # x need not be centered here: the rows of y - y_mean add up to zero
    if width <= DIRECT_WIDTH:
        left = (x.T @ x).toarray() - count * np.outer(x_mean, x_mean)
        left[np.diag_indices(width)] += strength
        weight = scipy.linalg.cho_solve(scipy.linalg.cho_factor(left, overwrite_a=True), right)
    else:

        def times(w):
            product = x @ w
            return x.T @ (product - product.mean(axis=0)) + strength * w

        weight = _conjugate_gradients(times, right)
    return weight, y_mean - x_mean @ weight


def _conjugate_gradients(times: Callable, right: np.ndarray, *, tolerance: float = 1e-6, steps: int = 300) -> np.ndarray:
    """Solves `times(w) = right` for every column at once (Hestenes and Stiefel, 1952)."""
    w = np.zeros_like(right)
    residual = right.copy()
    direction = residual.copy()
    norm = (residual**2).sum(axis=0)
    goal = tolerance**2 * norm
    for _ in range(steps):
        if (norm <= goal).all():
            break
        image = times(direction)
        curvature = (direction * image).sum(axis=0)
        move = np.divide(norm, curvature, out=np.zeros_like(norm), where=curvature > 0)  # a solved column stays
        w += move * direction
        residual -= move * image
        norm, before = (residual**2).sum(axis=0), norm
        direction = residual + np.divide(norm, before, out=np.zeros_like(norm), where=before > 0) * direction
    return w
