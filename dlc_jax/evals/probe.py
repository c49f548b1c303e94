"""Linear probes: what a linear classifier reads from hard codes, or from features.

The protocol is that of DINOv2 and arXiv 2507.12318: SGD with momentum 0.9 and no weight decay, a
cosine to 0, several learning rates, all trained in one pass. What differs: the rate is chosen on a
part of the training set, so that the unseen images are only ever scored.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax import stop
from dlc_jax.errors import UserError

MOMENTUM = 0.9
SCORED = 1024  # rows scored at a time
RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """How a probe is trained: the `fit` section.

    Attributes:
      rates: learning rates of a batch of 256. A batch of b takes them times b / 256. The paper's
        thirteen for codes of 512 positions are 1e-5 to 0.1; fewer images and shorter codes need
        larger ones.
      epochs: passes over the training set.
      batch: examples of a step. What does not fill a batch is left out of that epoch.
      deviation: of the normal initial weights, the same for every rate.
      held: share of the training set on which the rate is chosen. All of it is then trained on.
      memory_gb: limit in 10^9 bytes for weights, momentum and gradient of the rates that are
        trained together. The rates are split to fit.
    """

    rates: tuple[float, ...] = RATES
    epochs: int = 50
    batch: int = 128
    deviation: float = 0.0
    held: float = 0.2
    memory_gb: float = 4.0

    def __post_init__(self):
        whole = self.epochs >= 1 and self.batch >= 1
        if not self.rates or min(self.rates) <= 0 or not whole or self.deviation < 0:
            raise UserError(
                "probe.fit: rates must be above 0, epochs and batch at least 1, "
                f"deviation at least 0; got {self}"
            )
        if not 0 < self.held < 1 or self.memory_gb <= 0:
            raise UserError(
                f"probe.fit: held={self.held} must be between 0 and 1, "
                f"memory_gb={self.memory_gb} above 0"
            )


class Found(NamedTuple):
    """What a probe reads of each of f factors, [f] each.

    Attributes:
      accuracy: share of right answers on unseen examples, with the rate chosen on a part of the
        training set.
      best: the largest share over all rates: chosen on the examples it is reported on, as in the
        paper.
      rate: the one chosen.
    """

    accuracy: np.ndarray
    best: np.ndarray
    rate: np.ndarray


def linear_probe(
    train: np.ndarray,
    labels_train: np.ndarray,
    unseen: np.ndarray,
    labels_unseen: np.ndarray,
    *,
    classes: Sequence[int],
    values: int = 0,
    fit: Fit = Fit(),
    seed: int = 0,
) -> Found:
    """Trains a linear classifier for each factor and scores it on unseen examples.

    Of codes, logits = b + sum_i W[i, c_i], an embedding bag: no one-hot vector is ever made, and a
    step reads and writes what the codes of a batch name (with momentum it updates all of W). W of
    512 x 256 values and 1000 classes has 524 MB in float32, 6.8 GB for thirteen rates, three times
    that with momentum and gradient; `fit.memory_gb` trains fewer at a time. Of features,
    logits = b + W x, where x is standardized over the training set and divided by sqrt(d): with a
    norm of about 1, sets of any width need the same rates (the paper's 1e-5 to 0.1 for 1024
    features of unit deviation are 0.01 to 100 here).

    Args:
      train, unseen: codes, int [n, l] in 0..values-1, or features, float [n, d].
      labels_train, labels_unseen: int [n, f].
      classes: how many values each of the f factors has.
      values: V of codes; features need none.
      seed: of the order of the examples and the initial weights.

    Raises:
      UserError: features are not finite; fewer than two examples to train on, none to score.
      ValueError: codes or labels out of range.
    """
    train, unseen = np.asarray(train), np.asarray(unseen)
    labels_train, labels_unseen = np.asarray(labels_train), np.asarray(labels_unseen)
    for labels in (labels_train, labels_unseen):
        if labels.min(initial=0) < 0 or (labels >= np.asarray(classes)).any():
            raise ValueError(
                f"labels must lie below {list(classes)}; the largest are {labels.max(axis=0)}"
            )
    if len(train) < 2 or not len(unseen):
        counts = f"{len(train)} and {len(unseen)}"
        raise UserError(
            f"a probe needs two examples to train on and one to score; there are {counts}: "
            "raise count, or give more images"
        )
    train, unseen, shape = _prepared(train, unseen, values)
    order = np.random.default_rng(seed).permutation(len(train))
    held, kept = np.split(order, [max(1, int(fit.held * len(train)))])
    together = max(1, int(fit.memory_gb * 1e9 // (12 * math.prod(shape) * sum(classes))))
    chosen_on, scored_on = [], []
    for start in range(0, len(fit.rates), together):
        part = dataclasses.replace(fit, rates=tuple(fit.rates[start : start + together]))
        share = dict(classes=tuple(classes), shape=shape, fit=part, seed=seed)
        parts = train[kept], labels_train[kept], train[held], labels_train[held]
        chosen_on.append(_trained(*parts, **share))
        scored_on.append(_trained(train, labels_train, unseen, labels_unseen, **share))
    choice = np.concatenate(chosen_on).argmax(axis=0)
    accuracy = np.concatenate(scored_on)
    columns = np.arange(len(classes))
    return Found(accuracy[choice, columns], accuracy.max(axis=0), np.asarray(fit.rates)[choice])


def _prepared(train, unseen, values):
    """Codes as they are, features standardized; and the shape of the weights of one answer."""
    if np.issubdtype(train.dtype, np.integer):
        for codes in (train, unseen):
            if codes.min() < 0 or codes.max() >= values:
                raise ValueError(
                    f"codes run from {codes.min()} to {codes.max()}; "
                    f"they must lie in 0..{values - 1}"
                )
        return train, unseen, (train.shape[1], values)
    if not (np.isfinite(train).all() and np.isfinite(unseen).all()):
        raise UserError(
            "the probe's features are not finite: the encoder has diverged; "
            "train it with a lower learning rate"
        )
    mean, deviation = train.mean(axis=0, dtype=np.float64).astype(np.float32), train.std(axis=0)
    width = np.float32(math.sqrt(train.shape[1]))
    scale = 1 / np.where(deviation > 1e-6, deviation, 1) / width
    train, unseen = (((x - mean) * scale).astype(np.float32) for x in (train, unseen))
    return train, unseen, (train.shape[1],)


def _trained(
    x, labels, unseen, labels_unseen, *, classes, shape, fit: Fit, seed: int
) -> np.ndarray:
    """Accuracies [rates, f] on `unseen` of classifiers trained on `x`."""
    count, batch, size = len(x), min(fit.batch, len(x)), sum(classes)
    steps = count // batch
    weight = fit.deviation * jax.random.normal(jax.random.key(seed), (*shape, 1, size))
    params = {
        "weight": jnp.tile(weight, (len(fit.rates), 1)),
        "bias": jnp.zeros((len(fit.rates), size)),
    }
    momentum = jax.tree.map(jnp.zeros_like, params)
    x, labels, order = jnp.asarray(x), jnp.asarray(labels, jnp.int32), np.random.default_rng(seed)
    for epoch in range(fit.epochs):
        stop.breathe()
        rows = order.permutation(count)[: steps * batch].reshape(steps, batch)
        at = (epoch * steps + np.arange(steps)) / (fit.epochs * steps)
        rates = np.outer(0.5 * (1 + np.cos(np.pi * at)) * batch / 256, fit.rates).astype(np.float32)
        params, momentum = _epoch(params, momentum, x, labels, rows, rates, classes=classes)
    right = np.zeros((len(fit.rates), len(classes)))
    for start in range(0, len(unseen), SCORED):
        rows = np.minimum(np.arange(start, start + SCORED), len(unseen) - 1)
        fresh = np.arange(start, start + SCORED) < len(unseen)  # the last batch is filled up
        asked = labels_unseen[rows].astype(np.int32)
        right += np.asarray(_right(params, unseen[rows], asked, fresh, classes=classes))
    return right / len(unseen)


def logits(params, x):
    """Codes int [b, l] or features float [b, d] to [b, r, k], for r rates.

    The weight is [l, v, r, k] or [d, r, k].
    """
    weight, bias = params["weight"], params["bias"]
    if weight.ndim == 3:
        return bias + jnp.einsum("bd,drk->brk", x, weight)
    # Position by position: all at once would hold [b, l, r, k], 27 GB for a batch of 1024 in the
    # paper's sizes.
    start = jnp.broadcast_to(bias, (len(x), *bias.shape))
    at_positions = (weight, x.T.astype(jnp.int32))
    return jax.lax.scan(lambda total, at: (total + at[0][at[1]], None), start, at_positions)[0]


def cross_entropy(params, x, labels, *, classes):
    """Mean over the batch, sum over rates and factors; labels int [b, f].

    Rates and factors share nothing, so that each has its own gradient.
    """
    total = 0.0
    for column, part in enumerate(_split(logits(params, x), classes)):
        log = jax.nn.log_softmax(part)
        total -= jnp.take_along_axis(log, labels[:, column, None, None], axis=-1).mean(0).sum()
    return total


@functools.partial(jax.jit, static_argnames="classes", donate_argnums=(0, 1))
def _epoch(params, momentum, x, labels, rows, rates, *, classes):
    """SGD over the batches `rows` [steps, b] with learning rates [steps, r]."""

    def step(carry, at):
        params, momentum = carry
        rows, rate = at
        gradient = jax.grad(cross_entropy)(params, x[rows], labels[rows], classes=classes)
        momentum = jax.tree.map(lambda m, g: MOMENTUM * m + g, momentum, gradient)
        return (jax.tree.map(lambda p, m: p - rate[:, None] * m, params, momentum), momentum), None

    return jax.lax.scan(step, (params, momentum), (rows, rates))[0]


@functools.partial(jax.jit, static_argnames="classes")
def _right(params, x, labels, fresh, *, classes):
    """How many answers of each rate are right, [r, f]."""
    parts = _split(logits(params, x), classes)
    same = [part.argmax(-1) == labels[:, column, None] for column, part in enumerate(parts)]
    return jnp.einsum("fbr,b->rf", jnp.stack(same).astype(jnp.float32), fresh.astype(jnp.float32))


def _split(scores, classes):
    return jnp.split(scores, np.cumsum(classes)[:-1].tolist(), axis=-1)
