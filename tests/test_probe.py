"""Linear probes: against the dense model, separate runs and planted rules.

The rate is chosen without the unseen images.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlc_jax.errors import UserError
from dlc_jax.evals import probe
from dlc_jax.evals.probe import Fit, linear_probe

SHORT = Fit(rates=(0.1, 1.0), epochs=20, batch=32)


def _codes(count, length=4, values=5, seed=0):
    return np.random.default_rng(seed).integers(0, values, (count, length))


def _params(length=4, values=5, rates=3, size=7):
    keys = jax.random.split(jax.random.key(0))
    return {
        "weight": jax.random.normal(keys[0], (length, values, rates, size)),
        "bias": jax.random.normal(keys[1], (rates, size)),
    }


def test_the_bag_and_its_gradient_are_those_of_the_dense_model():
    params, codes, labels = (
        _params(),
        _codes(20).astype(np.uint8),
        np.random.default_rng(1).integers(0, 3, (20, 2)),
    )
    dense = jnp.asarray(np.eye(5)[codes].reshape(20, -1), jnp.float32)
    flat = params | {"weight": params["weight"].reshape(20, 3, 7)}
    np.testing.assert_allclose(probe.logits(params, codes), probe.logits(flat, dense), atol=1e-5)

    def of(params, x):
        return probe.cross_entropy(params, x, labels, classes=(3, 4))

    bag, expected = jax.grad(of)(params, codes), jax.grad(of)(flat, dense)
    np.testing.assert_allclose(bag["weight"].reshape(20, 3, 7), expected["weight"], atol=1e-6)
    np.testing.assert_allclose(bag["bias"], expected["bias"], atol=1e-6)


def test_the_loss_by_hand():
    params, codes, labels = (
        _params(rates=2, size=3),
        _codes(6),
        np.random.default_rng(2).integers(0, 3, (6, 1)),
    )
    scores = np.asarray(probe.logits(params, codes), np.float64)
    shares = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = sum(
        -np.log(shares[row, rate, labels[row, 0]]) / 6 for row in range(6) for rate in range(2)
    )
    assert float(probe.cross_entropy(params, codes, labels, classes=(3,))) == pytest.approx(
        expected, rel=1e-5
    )


def test_sgd_by_hand():
    """Two steps over the whole set: momentum 0.9, a cosine from rate to half of it, batch / 256."""
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    labels = np.random.default_rng(1).integers(0, 2, (8, 1))
    fit = Fit(rates=(2.0,), epochs=2, batch=8)
    weight, bias, m_weight, m_bias = np.zeros((3, 2)), np.zeros(2), 0, 0
    for rate in (2.0 * 8 / 256, 1.0 * 8 / 256):
        scores = x @ weight + bias
        error = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True) - np.eye(2)[labels[:, 0]]
        m_weight, m_bias = 0.9 * m_weight + x.T @ error / 8, 0.9 * m_bias + error.mean(0)
        weight, bias = weight - rate * m_weight, bias - rate * m_bias
    params = _weights(x, labels, classes=(2,), shape=(3,), fit=fit)
    np.testing.assert_allclose(params["weight"][:, 0], weight, atol=1e-6)
    np.testing.assert_allclose(params["bias"][0], bias, atol=1e-6)


def _weights(*arguments, **options):
    """What `_trained` scores with."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            probe,
            "_right",
            lambda params, *rest, **more: seen.append(jax.device_get(params)) or np.zeros((1, 1)),
        )
        probe._trained(*arguments, *arguments, seed=0, **options)
    return seen[0]


def test_every_rate_is_what_it_is_alone_however_many_are_trained_together():
    train, unseen = _codes(200), _codes(100, seed=3)
    rule = lambda codes: (codes[:, :1] + codes[:, 1:2] > 3).astype(int)  # noqa: E731
    share = dict(classes=(2,), shape=(4, 5), seed=0)
    fit = Fit(rates=(0.02, 0.1, 1.0), epochs=3, batch=32, deviation=0.01)
    together = probe._trained(train, rule(train), unseen, rule(unseen), fit=fit, **share)
    alone = [
        probe._trained(
            train,
            rule(train),
            unseen,
            rule(unseen),
            fit=dataclasses.replace(fit, rates=(rate,)),
            **share,
        )
        for rate in fit.rates
    ]
    np.testing.assert_array_equal(together, np.concatenate(alone))
    assert len(set(together[:, 0])) > 1
    whole = linear_probe(train, rule(train), unseen, rule(unseen), classes=(2,), values=5, fit=fit)
    split = dataclasses.replace(fit, memory_gb=1e-9)  # a rate at a time
    for a, b in zip(
        whole,
        linear_probe(train, rule(train), unseen, rule(unseen), classes=(2,), values=5, fit=split),
    ):
        np.testing.assert_array_equal(a, b)


def test_a_planted_linear_rule_is_found_in_codes_and_in_features():
    random = np.random.default_rng(0)
    weight = random.normal(size=(4, 5, 3))
    train, unseen = _codes(2000), _codes(500, seed=3)
    labels = [(weight[np.arange(4), codes].sum(1)).argmax(-1)[:, None] for codes in (train, unseen)]
    found = linear_probe(train, labels[0], unseen, labels[1], classes=(3,), values=5, fit=SHORT)
    assert (
        found.accuracy[0] > 0.95
        and found.best[0] >= found.accuracy[0]
        and found.rate[0] in SHORT.rates
    )
    x, y = random.normal(3, 10, (2000, 6)), random.normal(3, 10, (500, 6))
    labels = [((z - 3) @ weight.reshape(-1, 3)[:6]).argmax(-1)[:, None] for z in (x, y)]
    high = Fit(rates=(1.0, 10.0), batch=32)
    found = linear_probe(x, labels[0], y, labels[1], classes=(3,), fit=high)
    assert found.accuracy[0] > 0.95
    noise = [random.integers(0, 4, (len(codes), 1)) for codes in (train, unseen)]
    assert (
        linear_probe(train, noise[0], unseen, noise[1], classes=(4,), values=5, fit=SHORT).accuracy[
            0
        ]
        < 0.35
    )


def test_the_scale_of_features_does_not_matter_and_constant_ones_do_no_harm():
    random = np.random.default_rng(0)
    x = random.normal(size=(300, 4)).astype(np.float32)
    labels = (x[:, :1] > 0).astype(int)
    share = dict(classes=(2,), fit=SHORT)
    plain = linear_probe(x[:200], labels[:200], x[200:], labels[200:], **share)
    scaled = linear_probe(
        x[:200] * 1024 + 512, labels[:200], x[200:] * 1024 + 512, labels[200:], **share
    )
    assert plain.accuracy == pytest.approx(scaled.accuracy, abs=0.021)
    constant = np.concatenate([x, np.full((300, 1), 7.0, np.float32)], axis=1)
    assert (
        linear_probe(constant[:200], labels[:200], constant[200:], labels[200:], **share).accuracy[
            0
        ]
        > 0.9
    )


def test_what_a_probe_trains_on_and_what_it_scores(monkeypatch):
    """Features are standardized over the training set alone.

    The rate is chosen on a fifth of it, and then all of it is trained on.
    """
    calls = []

    def trained(x, labels, unseen, labels_unseen, *, fit, **_):
        calls.append((x, labels[:, 0], unseen, labels_unseen[:, 0]))
        return np.zeros((len(fit.rates), 1))

    monkeypatch.setattr(probe, "_trained", trained)
    random = np.random.default_rng(0)
    train, unseen = random.normal(3, 5, (50, 4)), random.normal(-40, 100, (30, 4))
    labels = np.arange(50)[:, None]
    linear_probe(train, labels, unseen, labels[:30], classes=(50,), fit=SHORT)
    (kept, kept_rows, held, held_rows), (all_of_it, rows, scored, scored_rows) = calls
    mean, scale = train.mean(0), 1 / train.std(0) / 2  # 2 is the root of their number
    np.testing.assert_allclose(all_of_it, (train - mean) * scale, atol=1e-5)
    np.testing.assert_allclose(scored, (unseen - mean) * scale, atol=1e-4)
    np.testing.assert_array_equal(np.concatenate([rows, scored_rows]), [*range(50), *range(30)])
    assert len(held_rows) == 10 and sorted([*kept_rows, *held_rows]) == list(range(50))
    chosen = all_of_it[[*kept_rows, *held_rows]]
    np.testing.assert_array_equal(np.concatenate([kept, held]), chosen)
    assert list(held_rows) != sorted(held_rows)  # files are sorted by class


def test_the_choice_never_sees_the_unseen_labels():
    train, unseen = _codes(300, length=16), _codes(200, length=16, seed=7)
    labels, asked = ((codes[:, :1] > 2).astype(int) for codes in (train, unseen))
    share = dict(classes=(2,), values=5, fit=Fit(rates=(1e-4, 0.01, 1.0), epochs=5, batch=32))
    found = linear_probe(train, labels, unseen, asked, **share)
    wrong = linear_probe(train, labels, unseen, 1 - asked, **share)
    assert found.rate == wrong.rate and found.accuracy == pytest.approx(1 - wrong.accuracy)
    assert wrong.best > wrong.accuracy  # choosing by the unseen would have taken the worst rate


def test_each_factor_gets_its_own_rate_and_is_what_it_is_alone():
    random = np.random.default_rng(6)
    train, unseen = _codes(400, length=64), _codes(1000, length=64, seed=7)
    factors, asked = (
        np.stack([(random.random(len(c)) > 2 / 3).astype(int), c[:, 0]], axis=1)
        for c in (train, unseen)
    )
    share = dict(values=5, fit=Fit(rates=(1e-4, 2.0), epochs=20, batch=64))
    both = linear_probe(train, factors, unseen, asked, classes=(2, 5), **share)
    # Codes say nothing of the first and two thirds of it are 0: the lowest rate, which says 0
    # always, must win.
    assert both.rate.tolist() == [1e-4, 2.0]
    assert both.accuracy[0] == np.mean(asked[:, 0] == 0) and both.accuracy[1] > 0.9
    for column, classes in enumerate((2, 5)):
        alone = linear_probe(
            train,
            factors[:, column : column + 1],
            unseen,
            asked[:, column : column + 1],
            classes=(classes,),
            **share,
        )
        assert alone.accuracy[0] == both.accuracy[column] and alone.rate[0] == both.rate[column]


def test_scores_do_not_depend_on_how_many_are_scored_at_a_time(monkeypatch):
    train, unseen = _codes(100), _codes(37, seed=2)
    share = dict(classes=(5,), values=5, fit=SHORT)
    whole = linear_probe(train, train[:, :1], unseen, unseen[:, :1], **share)
    monkeypatch.setattr(probe, "SCORED", 10)
    assert linear_probe(train, train[:, :1], unseen, unseen[:, :1], **share) == whole


@pytest.mark.parametrize(
    "change, error",
    [
        (dict(train=_codes(10) + 1), "must lie in 0..4"),
        (dict(unseen=_codes(10) - 1), "must lie in 0..4"),
        (dict(labels=np.full((10, 1), 2)), "labels must lie below"),
    ],
)
def test_bad_inputs(change, error):
    given = dict(train=_codes(10), labels=np.zeros((10, 1), int), unseen=_codes(10)) | change
    with pytest.raises(ValueError, match=error):
        asked = np.zeros((len(given["unseen"]), 1), int)
        linear_probe(
            given["train"], given["labels"], given["unseen"], asked, classes=(2,), values=5
        )


def test_too_few_images_are_refused_in_one_line():
    """As of dlc probe --count 1."""
    for train, unseen in ((1, 5), (5, 0)):
        with pytest.raises(
            UserError,
            match=f"two examples to train on .* there are {train} and {unseen}: raise count",
        ):
            given = (
                _codes(train),
                np.zeros((train, 1), int),
                _codes(unseen),
                np.zeros((unseen, 1), int),
            )
            linear_probe(*given, classes=(2,), values=5)


def test_features_of_a_diverged_encoder_are_refused_in_one_line():
    x = np.full((4, 3), np.nan, np.float32)
    with pytest.raises(UserError, match="not finite"):
        linear_probe(x, np.zeros((4, 1), int), x, np.zeros((4, 1), int), classes=(2,))


@pytest.mark.parametrize(
    "wrong", [dict(rates=()), dict(rates=(0.0,)), dict(epochs=0), dict(held=1.0), dict(memory_gb=0)]
)
def test_a_fit_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(UserError, match="probe.fit"):
        Fit(**wrong)
