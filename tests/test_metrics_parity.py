"""Metrics against independent packages, on the same arrays."""

import numpy as np
import pytest
from packages import import_or_skip

from dlc_jax.evals import frechet, inception_score, kernel_distance, manifold, vendi

pytestmark = pytest.mark.torch
torch = import_or_skip("torch")


def features(count, seed, shift=0.0, d=48):
    """Not negative and correlated, like Inception's."""
    mixing = np.random.default_rng(0).normal(size=(d, d)) / d**0.5 * np.linspace(1, 0.05, d)
    x = np.random.default_rng(seed).normal(size=(count, d)) @ mixing.T
    return np.maximum(0.4 + shift + 0.5 * x, 0).astype(np.float32)


X, Y = features(900, 1, 0.02), features(800, 2)


def torch_fidelity(name):
    return import_or_skip(f"torch_fidelity.metric_{name}")


@pytest.mark.parametrize("count", [800, 30])
def test_frechet(count):
    theirs = [import_or_skip("pytorch_fid.fid_score").calculate_frechet_distance]
    fid = torch_fidelity("fid")
    sets = []
    for x in (X[:count], Y):
        stream = frechet.Moments.of(x.shape[1])
        for start in range(0, len(x), 37):
            stream.add(x[start : start + 37])
        sets += [stream.mean, stream.covariance]
        their = fid.fid_features_to_statistics(torch.from_numpy(x))
        np.testing.assert_allclose(stream.mean, their["mu"], rtol=1e-5)
        np.testing.assert_allclose(stream.covariance, their["sigma"], rtol=1e-4, atol=1e-7)
    keys = [{"mu": sets[0], "sigma": sets[1]}, {"mu": sets[2], "sigma": sets[3]}]
    fidelity = fid.fid_statistics_to_metric(*keys, verbose=False)["frechet_inception_distance"]
    ours = frechet.distance(*sets)
    assert ours == pytest.approx(theirs[0](*sets), rel=1e-5)
    assert ours == pytest.approx(fidelity, rel=1e-5)


def test_inception_score():
    isc = torch_fidelity("isc")
    logits = 3 * np.random.default_rng(0).normal(size=(1003, 40)).astype(np.float32)
    edges = inception_score.equal_splits(len(logits))
    theirs = isc.isc_features_to_metric(torch.from_numpy(logits), 10, shuffle=False)
    ours = inception_score.inception_score(logits, edges)
    assert ours[:2] == pytest.approx(list(theirs.values()), rel=1e-6)
    # Shuffled: a row's place is where the permutation puts it.
    theirs = isc.isc_features_to_metric(torch.from_numpy(logits), 10, rng_seed=5)
    stream = inception_score.InceptionScore(edges)
    stream.add(logits, np.argsort(np.random.RandomState(5).permutation(len(logits))))
    assert stream.score()[:2] == pytest.approx(list(theirs.values()), rel=1e-6)


def test_kernel_distance():
    kid = torch_fidelity("kid")
    settings = {"kid_kernel": "poly", "kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None}
    settings |= {"kid_kernel_poly_coef0": 1, "kid_subsets": 10, "kid_subset_size": 300}
    pair = torch.from_numpy(X), torch.from_numpy(Y)
    theirs = kid.kid_features_to_metric(*pair, rng_seed=2020, verbose=False, **settings)
    ours = kernel_distance.subset_kernel_distance(X, Y, subsets=10, size=300)
    assert ours[:2] == pytest.approx(list(theirs.values()), rel=1e-3)


def test_precision_and_recall():
    prc = torch_fidelity("prc")
    settings = {"prc_neighborhood": 3, "prc_batch_size": 500, "save_cpu_ram": False}
    pair = torch.from_numpy(X), torch.from_numpy(Y)
    theirs = prc.prc_features_to_metric(*pair, verbose=False, **settings)
    ours = manifold.precision_recall_density_coverage(X, Y)
    assert ours[:2] == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-3)


def test_density_and_coverage():
    theirs = import_or_skip("prdc").compute_prdc(Y, X, 5)
    ours = manifold.precision_recall_density_coverage(X, Y, neighbors=5)
    assert ours._asdict() == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("count", [900, 20])
def test_vendi(count):
    package = import_or_skip("vendi_score.vendi")
    theirs = package.score_dual(X[:count].astype(np.float64))
    assert vendi.vendi_score(X[:count]) == pytest.approx(theirs, rel=1e-6)
