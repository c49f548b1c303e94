"""Moments of streams, the Fréchet distance in closed form, and its bias and error by simulation."""

import numpy as np
import pytest

from dlc_jax.errors import UserError
from dlc_jax.evals import frechet
from dlc_jax.evals.frechet import Moments


def spd(random, d, rank=None):
    half = random.normal(size=(d, rank or d)) / np.sqrt(d)
    return half @ half.T


def moments(features, sizes=(10**9,)):
    found, start = Moments.of(features.shape[1]), 0
    while start < len(features):
        for size in sizes:
            found.add(features[start : start + size])
            start += size
    return found


@pytest.mark.parametrize("sizes", [(1,), (7,), (64, 1, 0, 300), (500,)])
def test_moments_do_not_depend_on_batches(sizes):
    """An offset of 10^6 deviations, where a sum of x x^T would lose 12 of 16 digits."""
    x = 1e6 + np.random.default_rng(0).normal(size=(500, 6)) * np.arange(1, 7)
    found = moments(x, sizes)
    assert found.count == 500
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.covariance, np.cov(x.T), rtol=1e-7, atol=1e-8)


def test_processes_agree_in_any_order():
    x = np.random.default_rng(1).normal(size=(301, 5)).astype(np.float32)
    whole = moments(x)
    parts = [moments(x[rank::3], (17,)) for rank in range(3)] + [Moments.of(5)]
    for order in ([0, 1, 2, 3], [3, 2, 0, 1]):
        merged = Moments.of(5)
        for index in order:
            merged.merge(parts[index])
        for found, expected in zip(merged.statistics(), whole.statistics(), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)


def test_moments_from_statistics_go_on():
    x = np.random.default_rng(2).normal(size=(50, 4))
    found = Moments.from_statistics(*moments(x[:30]).statistics())
    found.add(x[30:])
    np.testing.assert_allclose(found.covariance, np.cov(x.T), rtol=1e-12)


@pytest.mark.parametrize("rank", [40, 11])
def test_closed_form(rank):
    """S2 = A S1 A with A symmetric has the map A: the root's trace is tr A S1, of any rank."""
    random = np.random.default_rng(3)
    sigma1, a = spd(random, 40, rank), spd(random, 40) + 0.1 * np.eye(40)
    mu1, mu2, sigma2 = random.normal(size=40), random.normal(size=40), a @ sigma1 @ a
    expected = np.square(mu1 - mu2).sum() + np.trace(sigma1 + sigma2 - 2 * a @ sigma1)
    for pairs in ((mu1, sigma1, mu2, sigma2), (mu2, sigma2, mu1, sigma1)):
        assert frechet.distance(*pairs) == pytest.approx(expected, rel=1e-9)


def test_closed_form_of_commuting_covariances():
    random = np.random.default_rng(4)
    v, _ = np.linalg.qr(random.normal(size=(30, 30)))
    s1, s2 = 10.0 ** -np.arange(30), random.uniform(size=30)
    s2[5:9] = 0
    found = frechet.distance(np.zeros(30), (v * s1) @ v.T, np.zeros(30), (v * s2) @ v.T)
    assert found == pytest.approx(np.square(np.sqrt(s1) - np.sqrt(s2)).sum(), rel=1e-6)


def test_singular_and_regular_covariances():
    """Rounding errors of zero eigenvalues must not come under a root, where 1e-16 is 1e-8."""
    v, _ = np.linalg.qr(np.random.default_rng(10).normal(size=(64, 64)))
    s = np.arange(64.0) * (np.arange(64) < 5)
    zero, singular = np.zeros(64), (v * s) @ v.T
    expected = np.square(np.sqrt(s) - 1).sum()
    assert frechet.distance(zero, singular, zero, np.eye(64)) == pytest.approx(expected, rel=1e-11)
    assert frechet.distance(zero, np.eye(64), zero, singular) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("rank", [64, 20])
def test_same_set_and_translation(rank):
    random = np.random.default_rng(5)
    sigma, mu = 100 * spd(random, 64, rank), random.normal(size=64)
    assert frechet.distance(mu, sigma, mu, sigma) < 1e-10
    assert frechet.distance(mu, sigma, mu + 0.01, sigma) == pytest.approx(0.0064, rel=1e-6)


def test_bias_of_one_feature():
    """E (sample mean)^2 = S / n, and E (deviation - true one)^2 = S / (2 n)."""
    assert frechet.bias(np.array([[4.0]]), 10**5) == pytest.approx(6e-5, rel=1e-3)


def test_bias_of_many_images_is_the_second_order():
    s, n = 0.7 ** np.arange(12), 10**6
    expected = s.sum() / n + (np.add.outer(1 / s, 1 / s) ** -1).sum() / (2 * n) + s.sum() / (4 * n)
    assert frechet.bias(np.diag(s), n) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("count, power", [(16, 0), (16, 1), (32, 1), (200, 1), (33, 0)])
def test_bias_by_simulation(count, power):
    """Also where there are half as many images as features."""
    d, random = 32, np.random.default_rng(6)
    s = 1.0 / np.arange(1, d + 1) ** power
    zero, sigma, found = np.zeros(d), np.diag(s), []
    for _ in range(100):
        part = moments(random.normal(size=(count, d)) * np.sqrt(s))
        found.append(frechet.distance(*part.statistics()[:2], zero, sigma))
    error = np.std(found) / 10
    assert abs(np.mean(found) - frechet.bias(sigma, count)) < 0.03 * np.mean(found) + 2 * error


def test_influence_is_the_derivative():
    """Of the distance along (1 - e) P + e delta_x, by differences."""
    random, e = np.random.default_rng(7), 1e-5
    x, mu, sigma = random.normal(size=(50, 5)), random.normal(size=5), spd(random, 5)
    mu1, sigma1 = x.mean(0), np.cov(x.T)
    found = frechet.influence(x, mu1, sigma1, mu, sigma)
    for row in range(3):
        apart = x[row] - mu1

        def along(e, apart=apart):
            moved = (1 - e) * sigma1 + e * (1 - e) * np.outer(apart, apart)
            return frechet.distance(mu1 + e * apart, moved, mu, sigma)

        assert found[row] == pytest.approx((along(e) - along(-e)) / (2 * e), rel=1e-5)


@pytest.mark.parametrize("tails, n", [("normal", 300), ("exponential", 1000)])
@pytest.mark.parametrize("scale, low, high", [(1.3, 0.85, 1.15), (1.0, 1.0, 1.8)])
def test_error_by_simulation(tails, n, scale, low, high):
    """The error is that of other samples where distributions differ, and never too small."""
    d, repeats, random = 8, 300, np.random.default_rng(8)
    draw = {"normal": random.standard_normal, "exponential": random.standard_exponential}[tails]
    mean, s = np.full(d, float(tails == "exponential")), 1 / np.arange(1, d + 1)
    found, errors = np.zeros(repeats), np.zeros(repeats)
    for i in range(repeats):
        x = scale * (draw(size=(n, d)) - mean) * np.sqrt(s)
        sets = (*moments(x).statistics()[:2], np.zeros(d), np.diag(s))
        found[i] = frechet.distance(*sets)
        errors[i] = frechet.standard_error(frechet.influence(x, *sets))
    assert low < errors.mean() / found.std() < high
    assert (np.abs(found - found.mean()) < 1.96 * errors).mean() > 0.91


def test_influence_of_blocks_and_maps(tmp_path):
    x = np.random.default_rng(9).normal(size=(50, 4)).astype(np.float32)
    sets = (*moments(x).statistics()[:2], np.zeros(4), np.eye(4))
    expected = frechet.influence(x, *sets)
    x.tofile(tmp_path / "x")
    parts = [frechet.influence(x[:20], *sets), frechet.influence(x[20:], *sets)]
    mapped = np.memmap(tmp_path / "x", np.float32, "r", shape=(50, 4))
    for found in (np.concatenate(parts), frechet.influence(mapped, *sets)):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_refusals():
    stream, x = Moments.of(3), np.ones((6, 3))
    stream.add(x)
    x[2:4, 1] = np.nan
    with pytest.raises(UserError, match="2 of 6 rows are NaN or infinite, the first is row 8"):
        stream.add(x)
    assert stream.count == 6 and np.isfinite(stream.scatter).all()
    with pytest.raises(UserError, match="one feature network"):
        stream.add(np.ones((2, 4)))
    with pytest.raises(UserError, match="cannot be merged"):
        stream.merge(Moments.of(4))
    with pytest.raises(UserError, match="needs 2 images; there are 1"):
        frechet.bias(np.eye(3), 1)
    with pytest.raises(UserError, match="needs 2 images; there are 0"):
        _ = Moments.of(3).covariance
    good = np.zeros(3), np.eye(3)
    with pytest.raises(UserError, match="first set: the moments are NaN"):
        frechet.distance(np.full(3, np.inf), np.eye(3), *good)
    with pytest.raises(UserError, match="second set: the covariance is zero"):
        frechet.distance(*good, *stream.statistics()[:2])
    with pytest.raises(UserError, match="3 features and the second 2"):
        frechet.distance(*good, np.zeros(2), np.eye(2))
    with pytest.raises(UserError, match="do not fit"):
        Moments.from_statistics(np.zeros(3), np.eye(2), 10)
