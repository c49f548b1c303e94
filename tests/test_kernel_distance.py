"""The kernel distance by its definition, and its error by simulation."""

import numpy as np
import pytest

from dlc_jax.errors import UserError
from dlc_jax.evals.kernel_distance import kernel_distance, subset_kernel_distance


def features(count, seed, shift=0.0, d=12):
    x = np.random.default_rng(seed).normal(size=(count, d)) / np.arange(1, d + 1) ** 0.5
    return np.maximum(0.4 + shift + x, 0).astype(np.float32)


def by_definition(x, y):
    x, y = x.astype(float), y.astype(float)
    k_xx, k_yy, k_xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    n, m = len(x), len(y)
    within = (k_xx.sum() - np.trace(k_xx)) / n / (n - 1)
    return within + (k_yy.sum() - np.trace(k_yy)) / m / (m - 1) - 2 * k_xy.mean()


@pytest.mark.parametrize("block", [1, 16, 1000])
def test_definition(block, tmp_path):
    x, y = features(37, 0), features(30, 1, 0.2)
    found = kernel_distance(x, y, block=block)
    assert found.value == pytest.approx(by_definition(x, y), rel=1e-4)
    assert found == pytest.approx(kernel_distance(x, y), rel=1e-4)
    x.tofile(tmp_path / "x")
    mapped = np.memmap(tmp_path / "x", np.float32, "r", shape=x.shape)
    assert kernel_distance(mapped, y, block=block) == found


def test_subsets():
    """Drawn by RandomState, samples first: the subsets of torch-fidelity."""
    x, y, random = features(60, 0), features(50, 1, 0.2), np.random.RandomState(3)
    values = []
    for _ in range(7):
        part = x[random.choice(60, 20, replace=False)]
        values.append(by_definition(part, y[random.choice(50, 20, replace=False)]))
    found = subset_kernel_distance(x, y, subsets=7, size=20, seed=3)
    assert found[:2] == pytest.approx((np.mean(values), np.std(values)), rel=1e-4)
    assert found.mean != subset_kernel_distance(x, y, subsets=7, size=20, seed=4).mean


@pytest.mark.parametrize("shift, most", [(0.2, 1.2), (0.0, 1.5)])
def test_errors_by_simulation(shift, most):
    """Of other samples with the same reference; std / sqrt(subsets) would be far too small."""
    y, repeats = features(200, 10**6), 150
    exact, subsets, published = [], [], []
    for seed in range(repeats):
        x = features(150, seed, shift)
        exact.append(kernel_distance(x, y))
        found = subset_kernel_distance(x, y, subsets=30, size=100)
        subsets.append((found.mean, found.error))
        published.append(found.std / 30**0.5)
    for found in (np.array(exact), np.array(subsets)):
        assert 0.85 < found[:, 1].mean() / found[:, 0].std() < most
    assert np.mean(published) < 0.5 * np.std(np.array(subsets)[:, 0])


def test_no_bias():
    found = [kernel_distance(features(10, 2 * i), features(12, 2 * i + 1)).value for i in range(99)]
    assert abs(np.mean(found)) < 2 * np.std(found) / 99**0.5


def test_constant_features():
    one = np.ones((5, 3), np.float32)
    assert kernel_distance(one, one[:4]) == (0, 0)
    assert kernel_distance(one, 2 * one).value == pytest.approx(2**3 + 5**3 - 2 * 3**3, rel=1e-6)


def test_refusals():
    x, y = features(20, 0), features(20, 1)
    with pytest.raises(UserError, match="samples: 1 rows, the metric needs 2"):
        kernel_distance(x[:1], y)
    with pytest.raises(UserError, match="samples: 20 rows, the metric needs 1000; give more"):
        subset_kernel_distance(x, y)
    with pytest.raises(UserError, match=r"must be \[images, 12\], not \[20, 11\]"):
        kernel_distance(x, y[:, 1:])
    y[3] = np.nan
    with pytest.raises(UserError, match="reference: 1 of 20 rows .* the first is row 3"):
        kernel_distance(x, y)
    many = np.zeros((5000, 12), np.float32)
    many[[4500, 4999]] = np.nan
    with pytest.raises(UserError, match="samples: 2 of 5000 rows .* the first is row 4500"):
        kernel_distance(many, x)
