"""The Inception Score by its definition, in any stream, and its error by simulation."""

import numpy as np
import pytest
import scipy.special

from dlc_jax.errors import UserError
from dlc_jax.evals.inception_score import InceptionScore, equal_splits, inception_score


def logits(count, seed=0, classes=10):
    return 2 * np.random.default_rng(seed).normal(size=(count, classes))


def by_definition(x):
    p = scipy.special.softmax(x, axis=1)
    return np.exp((p * np.log(p / p.mean(0))).sum(1).mean())


def test_splits_in_order():
    x = logits(250)
    scores = [by_definition(part) for part in (x[:100], x[100:200], x[200:])]
    found = inception_score(x, 100)
    assert found.mean == pytest.approx(np.mean(scores), rel=1e-10)
    assert found.std == pytest.approx(np.std(scores), rel=1e-9)


def test_equal_splits():
    x = logits(103)
    edges = [0, 25, 51, 77, 103]
    scores = [by_definition(x[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
    found = inception_score(x, equal_splits(103, 4))
    assert found[:2] == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-9)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_processes_and_batches_agree(size):
    x, whole = logits(230), inception_score(logits(230), 50)
    merged = InceptionScore(50)
    for rank in (2, 0, 1):
        part, places = InceptionScore(50), np.arange(230)[rank::3]
        for start in range(0, len(places), size):
            at = places[start : start + size]
            part.add(x[at], at)
        merged.merge(part)
    assert tuple(merged.score()) == pytest.approx(tuple(whole), rel=1e-10)


def test_extremes():
    """Sure and even: as many as there are classes. All the same: 1."""
    sure = np.tile(1e4 * np.eye(7), (3, 1))
    assert inception_score(sure) == pytest.approx((7, 0, 0), abs=1e-6)
    assert inception_score(sure[:1].repeat(9, 0)) == pytest.approx((1, 0, 0), abs=1e-6)


def test_error_by_simulation():
    found = np.array([inception_score(logits(400, seed), 200) for seed in range(300)])
    assert 0.85 < found[:, 2].mean() / found[:, 0].std() < 1.15


def test_refusals():
    with pytest.raises(UserError, match="needs images; there are none"):
        InceptionScore().score()
    with pytest.raises(UserError, match="split of 0 images"):
        InceptionScore(0)
    with pytest.raises(UserError, match="3 images cannot be cut into 10 splits"):
        equal_splits(3)
    stream = InceptionScore()
    stream.add(logits(5))
    with pytest.raises(UserError, match=r"must be \[images, 10\], not \[5, 4\]"):
        stream.add(logits(5, classes=4))
    with pytest.raises(UserError, match="1 of 1 rows are NaN or infinite, the first is row 5"):
        stream.add(np.full((1, 10), np.nan))
