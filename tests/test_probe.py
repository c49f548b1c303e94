"""Probes against dense references and cases counted by hand."""

import numpy as np
import pytest

from dlc_jax.evals import probe


def _codes(count, length=4, values=5, seed=0):
    return np.random.default_rng(seed).integers(0, values, (count, length))


def test_ridge_equals_the_dense_solution():
    codes, values, classes, strength = _codes(60), 5, 3, 0.7
    labels = np.random.default_rng(1).integers(0, classes, 60)
    dense = np.eye(values)[codes].reshape(60, -1)
    np.testing.assert_array_equal(probe._one_hot(codes, values).toarray(), dense)
    # The same problem as one least squares: penalty rows for the weights, none for the bias.
    left = np.block([[dense, np.ones((60, 1))], [np.sqrt(strength) * np.eye(20), np.zeros((20, 1))]])
    right = np.concatenate([np.eye(classes)[labels], np.zeros((20, classes))])
    expected = np.linalg.lstsq(left, right, rcond=None)[0]
    weight, bias = probe._fit(probe._one_hot(codes, values), np.eye(classes)[labels], strength=strength)
    np.testing.assert_allclose(weight, expected[:-1], atol=1e-9)
    np.testing.assert_allclose(bias, expected[-1], atol=1e-9)


def test_wide_codes_take_conjugate_gradients_to_the_same_weights(monkeypatch):
    codes, labels = _codes(80), np.random.default_rng(2).integers(0, 3, 80)
    x, y = probe._one_hot(codes, 5), np.eye(3)[labels]
    direct = probe._fit(x, y, strength=0.5)
    monkeypatch.setattr(probe, "DIRECT_WIDTH", 0)
    for a, b in zip(probe._fit(x, y, strength=0.5), direct, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_factor_in_the_codes_is_read_and_one_that_is_not_is_not():
    train, test = _codes(600), _codes(300, seed=3)
    unrelated = np.random.default_rng(4).integers(0, 4, 300)
    share = dict(values=5, classes=5, ridge=(0.1, 1.0))
    assert probe.linear_probe(train, train[:, 2], test, test[:, 2], **share) == 1.0
    noise = np.random.default_rng(5).integers(0, 4, 600)
    assert probe.linear_probe(train, noise, test, unrelated, **share | {"classes": 4}) < 0.4


def test_the_strength_is_chosen_on_the_training_set():
    # Codes say nothing and two thirds of the labels are 0: the strongest ridge, which says 0 always, must win.
    random = np.random.default_rng(6)
    train, test = _codes(400, length=64), _codes(1000, length=64, seed=7)
    labels, unseen = (random.random(400) > 2 / 3).astype(int), (random.random(1000) > 2 / 3).astype(int)
    score = {r: probe.linear_probe(train, labels, test, unseen, values=5, classes=2, ridge=r) for r in (1e-3, 1e6, (1e-3, 1e6))}
    assert score[1e6] == np.mean(unseen == 0) > score[1e-3]
    assert score[(1e-3, 1e6)] == score[1e6]


def test_nearest_neighbors_and_votes_by_hand():
    train = np.array([[0, 0, 0], [0, 0, 1], [1, 1, 1], [0, 1, 0]])
    test = np.array([[0, 0, 0], [1, 1, 0]])
    # Distances: 0 1 3 1 and 2 3 1 1; ties go to the lower index.
    np.testing.assert_array_equal(probe.nearest_neighbors(train, test, neighbors=3), [[0, 1, 3], [2, 3, 0]])
    labels = np.array([2, 1, 0, 1])
    np.testing.assert_array_equal(probe.vote(np.array([[2, 1, 1], [2, 1, 0], [0, 1, 1]]), classes=3), [1, 2, 1])
    assert probe.knn(train, labels, test, np.array([2, 0]), classes=3, neighbors=1) == 1.0
    assert probe.knn(train, labels, test, np.array([1, 2]), classes=3, neighbors=3) == 0.5  # votes 2 1 1 -> 1; 0 1 2 -> 0


def test_neighbors_do_not_depend_on_chunks():
    train, test = _codes(50), _codes(30, seed=8)
    whole = probe.nearest_neighbors(train, test, neighbors=5)
    single = np.concatenate([probe.nearest_neighbors(train, test[i : i + 1], neighbors=5) for i in range(30)])
    np.testing.assert_array_equal(whole, single)


def test_all_factors_at_once():
    train, test = _codes(300), _codes(100, seed=9)
    results = probe.probe(train, train[:, :2], test, test[:, :2], names=("shape", "color"), values=5, classes=(5, 5), ridge=1.0)
    keys = {"probe/shape", "probe/color", "probe/count", "probe_knn/shape", "probe_knn/color", "probe_knn/count"}
    assert set(results) == keys
    alone = probe.linear_probe(train, train[:, 1], test, test[:, 1], values=5, classes=5, ridge=1.0)
    assert results["probe/color"] == alone
    assert results["probe/shape"] == results["probe/color"] == 1.0 and results["probe/count"] == 100
    assert results["probe_knn/shape"] == probe.knn(train, train[:, 0], test, test[:, 0], classes=5)


def test_a_code_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"0\.\.4"):
        probe.linear_probe(_codes(10) + 1, np.zeros(10, int), _codes(10), np.zeros(10, int), values=5, classes=2)


def test_each_factor_gets_its_own_strength():
    # As above for one factor; for the other the label is in the code, and the strongest ridge would see nothing of it.
    random = np.random.default_rng(6)
    train, test = _codes(400, length=64), _codes(1000, length=64, seed=7)
    factors, unseen = (np.stack([(random.random(len(c)) > 2 / 3).astype(int), c[:, 0]], axis=1) for c in (train, test))
    share = dict(values=5, ridge=(1e-3, 1e6))
    results = probe.probe(train, factors, test, unseen, names=("noise", "value"), classes=(2, 5), **share)
    for column, (name, classes) in enumerate((("noise", 2), ("value", 5))):
        alone = probe.linear_probe(train, factors[:, column], test, unseen[:, column], classes=classes, **share)
        assert results[f"probe/{name}"] == alone
    assert results["probe/noise"] == np.mean(unseen[:, 0] == 0) and results["probe/value"] == 1.0
