"""The Python face with random weights: what it computes, and what it refuses.

Batches and parts change nothing.
"""

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recipes import load

from dlc_jax import parallel, pipeline
from dlc_jax.composition import best
from dlc_jax.composition.mix import mix
from dlc_jax.composition.operators import Infill, Refine, Soft
from dlc_jax.diffusion.code_sampler import CodeSampler
from dlc_jax.diffusion.guidance import Guidance
from dlc_jax.diffusion.sample import Sampler
from dlc_jax.errors import UserError
from dlc_jax.models.vit import standardize
from dlc_jax.networks import Networks
from dlc_jax.networks.encoder import EncoderNetwork
from dlc_jax.networks.generator import GeneratorNetwork
from dlc_jax.networks.network import Network
from dlc_jax.networks.network import keys as network_keys
from dlc_jax.networks.prior import PriorNetwork

SIZE, LENGTH, VALUES = 8, 6, 5
STEPS = ("encoder", "prior", "generator")
SMALL = {
    "*.model*.image": SIZE,
    "*.model*.patch": 4,
    "*.model*.width": 16,
    "*.model*.depth": 1,
    "*.model*.heads": 2,
    "*.model*positions": LENGTH,
    "*.model*values": VALUES,
    "encoder.crops.*_size": SIZE,
    "encoder.model.backbone.registers": 1,
    "encoder.model.dino.prototypes": 8,
    "encoder.model.dino.hidden": 8,
    "encoder.model.dino.bottleneck": 4,
    "generator.model.qk_norm": False,
    "generator.process.prediction": "v",
    "samples.code_sampler.calls": 3,
    "samples.sampler.method": "euler",
    "samples.sampler.steps": 2,
}
FAST = Sampler(method="euler", steps=2)
NULL = {"generator.codes": "", "generator.model.positions": 0, "generator.model.values": 0}


def networks(lines=(), *, batch=8, devices=1):
    """Of a workdir that does not exist."""
    mesh = parallel.make_mesh(devices=jax.devices()[:devices])
    return Networks(load("quickstart.py:tiny", SMALL | dict(lines)), "nowhere", mesh, batch=batch)


def random_params(network):
    """Parameters that are drawn, so that no network gives a constant.

    Without the encoder's biases: with them, random codes say little of the image.
    """
    random = np.random.default_rng(7)
    scale, bias = (1.0, 0.0) if isinstance(network, EncoderNetwork) else (0.3, 0.3)

    def draw(path, leaf):
        kind = bias if path[-1].key == "bias" else scale
        return kind * random.standard_normal(leaf.shape, np.float32)

    return jax.tree.map_with_path(draw, network.shapes)


def drawn(lines=(), *, batch=8, devices=1, **settings):
    """A pipeline whose parameters are drawn instead of loaded."""
    p = pipeline.Pipeline(networks(lines, batch=batch, devices=devices), sampler=FAST, **settings)
    for step in STEPS:
        p.networks[step].params = random_params(p.networks[step])
    return p


@pytest.fixture(scope="module")
def p():
    return drawn()


def images(count, seed=0):
    """Four flat patches each: noise would look alike to a network of random weights."""
    colors = np.random.default_rng(seed).integers(0, 2, (count, 2, 2, 3), np.uint8) * 255
    return np.repeat(np.repeat(colors, 4, 1), 4, 2)


def close(a, b):
    """The same pictures but for rounding: other places in a batch may round otherwise."""
    assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
    assert np.abs(a.astype(int) - b).max() <= 1
    assert a.std() > 10  # a network that gives a constant would pass


def test_simplices_are_the_softmax_of_the_logits_and_codes_their_maxima(p):
    x = images(3)
    network = p.networks["encoder"]
    apply = jax.jit(network.model.apply)
    logits = apply({"params": network.params}, standardize(jnp.asarray(x)))["logits"]
    for temperature in (1.0, 0.3):
        soft = p.simplices(x, temperature=temperature)
        assert soft.dtype == np.float32 and soft.shape == (3, LENGTH, VALUES)
        np.testing.assert_allclose(soft, jax.nn.softmax(logits / temperature), atol=1e-5)
    codes = p.encode(x)
    assert codes.dtype == np.int32 and len(np.unique(codes)) > 2
    np.testing.assert_array_equal(codes, soft.argmax(-1))


def test_images_of_other_sizes_are_fitted(p):
    codes = p.encode(images(2))
    large = np.repeat(np.repeat(images(2), 2, 1), 2, 2)  # halving by box averages gives them back
    np.testing.assert_array_equal(p.encode(large), codes)
    np.testing.assert_array_equal(p.encode([*images(2), large[0]]), codes[[0, 1, 0]])
    with pytest.raises(UserError, match="nothing to do"):
        p.encode([])


def test_soft_codes_at_the_corners_decode_as_hard_ones(p):
    codes = p.encode(images(5))
    hard = p.decode(codes, seed=3)
    assert hard.shape == (5, SIZE, SIZE, 3)
    close(hard, p.decode(np.eye(VALUES, dtype=np.float32)[codes], seed=3))
    other = p.decode((codes + 1) % VALUES, seed=3)
    assert np.abs(hard.astype(int) - other).max() > 5  # the codes are read
    corners = np.eye(VALUES)
    between = p.decode((corners[codes] + corners[(codes + 1) % VALUES]) / 2, seed=3).astype(int)
    assert np.abs(between - hard).max() > 1 and np.abs(between - other).max() > 1


def test_batches_devices_and_parts_change_nothing(p):
    large = drawn(batch=16, devices=4)
    np.testing.assert_array_equal(p.encode(images(11)), large.encode(images(11)))
    np.testing.assert_array_equal(p.sample_codes(11, seed=2), large.sample_codes(11, seed=2))
    whole = p.sample(11, seed=2)
    close(whole, large.sample(11, seed=2))
    close(whole[4:7], p.sample(3, first=4, seed=2))
    close(whole, p.decode(p.sample_codes(11, seed=2), seed=3))
    assert np.abs(whole.astype(int) - p.sample(11, seed=3)).max() > 5


def test_a_function_is_compiled_once_per_shape(monkeypatch):
    traced, codes = [], EncoderNetwork.codes

    @functools.wraps(codes)
    def counted(*arguments):
        traced.append(1)
        return codes(*arguments)

    monkeypatch.setattr(EncoderNetwork, "codes", counted)
    fresh = drawn()
    for count in (3, 8, 13):
        fresh.encode(images(count))
    assert len(traced) == 1


def test_samplers_are_those_of_the_pipeline_unless_given(monkeypatch):
    found = drawn(code_sampler=CodeSampler(calls=2))
    monkeypatch.setattr(Network, "run", lambda *arguments, sampler, **more: sampler)
    counted = lambda *arguments, sampler, **more: (sampler, 0)  # noqa: E731
    monkeypatch.setattr(PriorNetwork, "sample_counted", counted)
    codes = np.zeros((1, LENGTH), int)
    assert found.decode(codes) is FAST and found.sample_codes(1) == CodeSampler(calls=2)
    other, others = Sampler(steps=5), CodeSampler(temperature=0.5)
    assert found.decode(codes, sampler=other) is other
    assert found.sample_codes(1, sampler=others) is others
    monkeypatch.setattr(found, "sample_codes", lambda *_, sampler, **more: codes + sampler.calls)
    monkeypatch.setattr(found, "decode", lambda codes, sampler, **more: (codes.max(), sampler))
    assert found.sample(1, sampler=other, code_sampler=CodeSampler(calls=4)) == (4, other)


def test_guidance_and_steps_reach_the_sampler(p):
    codes = p.encode(images(2))
    plain = p.decode(codes).astype(int)
    for change in ({"guidance": Guidance(scale=3.0)}, {"steps": 3}):
        sampler = dataclasses.replace(FAST, **change)
        assert np.abs(p.decode(codes, sampler=sampler) - plain).max() > 1


LIKELY = np.arange(LENGTH) % VALUES


@pytest.fixture(scope="module")
def known():
    """A pipeline whose networks know the likeliest values, and the pixels of a code and of none."""

    def logits(variables, codes, sigma, label):
        twice = jnp.log1p(jax.nn.one_hot(LIKELY, VALUES))
        return jnp.broadcast_to(twice, (*codes.shape, VALUES))

    def data(variables, *inputs, method):
        if method == "embed":
            given = inputs[0]
            return 100.0 if given is None else 110.0 + given.codes[:, :1, None, None]
        x, _, pixel = inputs
        return jnp.broadcast_to(pixel / 127.5 - 1, x.shape)

    found = pipeline.Pipeline(networks({"generator.process.prediction": "x"}))
    sizes = dict(positions=LENGTH, values=VALUES, image=2, channels=3, classes=0, early=0)
    sizes |= {"sigma_conditioning": False, "embedding": 0}
    for step, apply in (("prior", logits), ("generator", data)):
        network = found.networks[step]
        network.model = types.SimpleNamespace(apply=apply, **sizes)
        network.shapes = network.params = {}
    return found


def test_pixels_are_those_the_network_knows_led_away_from_the_null_condition(known):
    """The path ends at predicted data, however short its last step; pixels stay in 0 to 255."""
    values = np.arange(VALUES)
    codes = values[:, None] * np.ones(LENGTH, int)
    right = {1.0: 110 + values, 2.0: 120 + 2 * values, 20.0: 255 + 0 * values}
    for guidance, pixels in right.items():
        expected = np.broadcast_to(pixels[:, None, None, None], (VALUES, 2, 2, 3))
        sampler = Sampler(method="euler", steps=100, guidance=Guidance(scale=guidance))
        np.testing.assert_array_equal(known.decode(codes, sampler=sampler), expected)


def test_the_temperature_reaches_the_prior(known):
    """At 0 every value is the likeliest one, though it is only twice as likely as each other."""
    found = known.sample_codes(8, sampler=CodeSampler(temperature=0.0))
    np.testing.assert_array_equal(found, np.tile(LIKELY, (8, 1)))


def other(codes, *positions):
    """The codes with another value at some positions."""
    codes = codes.copy()
    codes[:, list(positions)] = (codes[:, list(positions)] + 2) % VALUES
    return codes


def test_how_likely_codes_and_their_values_are(known):
    """One value of a position has 1/3, and each other one 1/6, whatever the others are."""
    codes = np.stack([LIKELY, *other(LIKELY[None], 1, 4)])
    bits = np.full(codes.shape, np.log2(3))
    bits[1, [1, 4]] = np.log2(6)
    for calls in (1, 4, LENGTH):
        np.testing.assert_allclose(known.surprise(codes, calls=calls), bits, atol=1e-5)
    found, error = known.likelihood(np.repeat(codes, 50, 0), draws=64, seed=3)
    found, error = found.reshape(2, 50), error.reshape(2, 50)
    spread = 4 * np.sqrt((error**2).sum(1)) / 50
    assert (abs(found.mean(1) - bits.sum(1)) < spread).all() and spread.max() < 1


def test_the_least_likely_positions_are_drawn_anew(known):
    likely = np.tile(LIKELY, (5, 1))
    codes, sampler = other(likely, 0, 3), CodeSampler(temperature=0.0)
    np.testing.assert_array_equal(known.redraw(codes, 2 / LENGTH, sampler=sampler), likely)
    one = known.redraw(codes, 0.1, sampler=sampler)  # of 6 positions a tenth is one
    assert ((one != likely).sum(1) == 1).all() and ((one != codes).sum(1) == 1).all()
    np.testing.assert_array_equal(known.redraw(codes, 0.0), codes)


def test_what_is_drawn_again_has_other_noise_than_before(known):
    """The seed with which codes were drawn gives them back no more often than another does."""
    codes = known.sample_codes(400, seed=0)
    kept = np.arange(LENGTH) < LENGTH // 2

    def same(found):
        return (found == codes)[:, ~kept].mean()

    again, other = (same(known.complete(codes, kept, seed=seed)) for seed in (0, 1))
    assert abs(again - other) < 4 * np.sqrt(0.5 / (400 * (~kept).sum())) and again < 0.9
    once = known.complete(codes, kept, seed=0)
    twice = known.redraw(once, 0.5, seed=0)
    assert (once != twice).mean() > 0.02


def test_codes_are_completed_around_what_is_kept(known):
    likely = np.tile(LIKELY, (4, 1))
    codes, sampler = other(likely, *range(LENGTH)), CodeSampler(temperature=0.0)
    kept = np.zeros(LENGTH, bool)
    kept[[1, 5]] = True
    expected = np.where(kept, codes, likely)
    codes[:, 0] = VALUES  # a mask where nothing is kept is not read
    for keep in ([1, 5], kept, np.tile(kept, (4, 1))):
        found = known.complete(codes, keep, sampler=sampler)
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(known.complete(codes, [], sampler=sampler), likely)
    drawn = known.complete(codes, [1], seed=2)
    np.testing.assert_array_equal(drawn[2:], known.complete(codes[2:], [1], seed=2, first=2))
    assert (drawn != known.complete(codes, [1], seed=3)).any()


def test_labels_reach_the_networks_that_have_classes(monkeypatch):
    given = {}
    for name, kind in (("prior", PriorNetwork), ("generator", GeneratorNetwork)):

        def draw(*_, labels=None, name=name, **how):
            given[name] = labels
            return np.zeros((2, LENGTH), int), None

        method = {"prior": "sample_counted", "generator": "decode"}[name]
        monkeypatch.setattr(kind, method, draw)
    for prior, generator in ((0, 0), (3, 0), (0, 3), (3, 3)):
        lines = {"prior.model.classes": prior, "generator.model.classes": generator}
        found = pipeline.Pipeline(networks(lines))
        found.sample(2, labels=[1, 2])
        has = {"prior": bool(prior), "generator": bool(generator) or not prior}  # or it refuses
        assert {name: label is not None for name, label in given.items()} == has


def test_compose_copies_codes_position_by_position(p):
    a, b = images(6, seed=1), images(6, seed=2)
    assert np.mean(p.encode(a) != p.encode(b)) > 0.3  # else there is nothing to mix
    how = dict(weights=(1, 2), keep=(0,), seed=4)
    found, codes = p.compose([a, b], **how), [p.encode(a), p.encode(b)]
    assert found.codes.dtype == np.int32
    np.testing.assert_array_equal(found.codes, mix(codes, **how))
    np.testing.assert_allclose(
        found.bits, p.surprise(found.codes, seed=0, calls=LENGTH).mean(1), rtol=1e-5
    )
    for parents in ([codes[0], b], [codes[0].astype(np.uint8), codes[1]]):
        np.testing.assert_array_equal(found.codes, p.compose(parents, **how).codes)
    part = p.compose([a[2:4], b[2:4]], **how, first=2)
    np.testing.assert_array_equal(found.codes[2:4], part.codes)
    np.testing.assert_allclose(found.bits[2:4], part.bits, rtol=1e-5)


def test_compose_mixes_simplices_at_a_temperature(p):
    a, b = images(1, seed=1), images(1, seed=2)
    many = [np.repeat(part, 64, 0) for part in (a, b)]
    limit = p.compose(many, operator=Soft(temperature=1e-3), seed=4).codes
    np.testing.assert_array_equal(limit, p.compose(many, seed=4).codes)  # the copy
    soft = [p.simplices(part, temperature=2.0) for part in many]
    values = p.compose(many, operator=Soft(temperature=2.0), seed=4).codes
    np.testing.assert_array_equal(values, p.compose(soft, operator=Soft(), seed=4).codes)
    # also values that neither parent has
    assert np.mean((values == p.encode(a)) | (values == p.encode(b))) < 0.95


def test_operators_reach_the_prior_whatever_the_batch(p):
    a, b = images(11, seed=1), images(11, seed=2)
    for operator in (Infill(share=1 / 3), Refine(rounds=2, share=1 / 3, start=Infill(share=0.5))):
        found = p.compose([a, b], operator=operator, seed=4, best=2)
        codes, prior = [p.encode(a), p.encode(b)], p.networks["prior"].drawing(p.code_sampler)
        np.testing.assert_array_equal(found.codes, best(operator, codes, prior, n=2, seed=4).codes)
        part = p.compose([a[3:5], b[3:5]], operator=operator, seed=4, best=2, first=3)
        np.testing.assert_array_equal(found.codes[3:5], part.codes)
        assert (p.compose([a, b], operator=operator, seed=5, best=2).codes != found.codes).any()


def test_the_prior_draws_by_given_numbers(p):
    numbers = np.array([9, 2, 3, 7])
    whole, part = p.sample_codes(10, seed=2), p.sample_codes(4, seed=2, first=numbers)
    np.testing.assert_array_equal(part, whole[numbers])


def test_kept_positions_are_not_drawn_anew(known):
    codes, keep = other(np.tile(LIKELY, (4, 1)), 0, 3, 4), np.zeros((4, LENGTH), bool)
    keep[:, 3], keep[0] = True, True
    how = {"positions": 2, "seed": 0, "keep": keep, "calls": LENGTH}
    found = known.networks["prior"].redraw(codes, sampler=CodeSampler(temperature=0.0), **how)
    expected = np.tile(LIKELY, (4, 1))
    expected[keep] = codes[keep]
    np.testing.assert_array_equal(found, expected)


def test_without_a_trained_prior_no_likelihood_is_told():
    found = drawn()
    del found.networks["prior"].params
    a, b = images(2, seed=1), images(2, seed=2)
    assert found.compose([a, b]).bits is None
    with pytest.raises(UserError, match="train this step first"):
        found.compose([a, b], operator=Infill())
    none = pipeline.Pipeline(found.networks, prior="none")
    with pytest.raises(UserError, match="infill draws from a prior, and there is none"):
        none.compose([a, b], operator=Infill())
    with pytest.raises(UserError, match="needs a prior"):
        none.compose([a, b], best=2)
    uniform = drawn({"prior.process.name": "uniform"})
    assert uniform.compose([a, b]).bits is None
    with pytest.raises(UserError, match="only a masked process"):
        uniform.compose([a, b], best=2)


def test_a_flow_draws_whole_codes_and_says_how_likely_they_are():
    flow = drawn({"prior.process.name": "flow", "prior.model.sigma_conditioning": True})
    how = {"sampler": CodeSampler(method="auto", calls=3)}
    codes = flow.sample_codes(5, seed=1, **how)
    assert codes.shape == (5, LENGTH) and (codes >= 0).all() and (codes < VALUES).all()
    np.testing.assert_array_equal(flow.sample_codes(2, seed=1, **how), codes[:2])
    bits, error = flow.likelihood(codes, draws=4)
    assert (bits > 0).all() and (error > 0).all()
    a, b = images(2, seed=1), images(2, seed=2)
    assert flow.compose([a, b]).bits is None
    with pytest.raises(UserError, match="process.name=flow keeps no positions"):
        flow.complete(codes, keep=[0], seed=0)


def test_partial_codes_are_codes_with_the_null_value(p):
    codes = p.encode(images(5))
    mask = np.random.default_rng(0).random((5, LENGTH)) < 0.5
    network = p.networks["generator"]

    def drawn_by_hand(given):
        draws = network_keys(3, 5)
        how = {"sampler": FAST, "names": ("codes",)}
        return network.run(network._draw, draws, given, **how)

    expected = drawn_by_hand(np.where(mask, codes, VALUES).astype(np.int32))
    np.testing.assert_array_equal(p.decode(codes, seed=3, known=mask), expected)
    soft = np.eye(VALUES, dtype=np.float32)[codes]
    close(p.decode(soft, seed=3, known=mask), expected)
    whole = p.decode(codes, seed=3)
    close(p.decode(codes, seed=3, known=np.ones(LENGTH, bool)), whole)
    assert np.abs(whole.astype(int) - expected).max() > 5


def test_a_conjunction_of_one_is_plain_guidance_and_of_several_reads_each(p):
    a, b = p.encode(images(5, seed=1)), p.encode(images(5, seed=2))
    guided = dataclasses.replace(FAST, guidance=Guidance(scale=2.0, interval=(0.2, 0.8)))
    close(p.decode_all([a], seed=3, sampler=guided), p.decode(a, seed=3, sampler=guided))
    first, none = np.arange(LENGTH) < 2, np.zeros(LENGTH, bool)
    both = p.decode_all([a, b], known=[first, ~first], seed=3, sampler=guided)
    close(both, p.decode_all([b, a], known=[~first, first], seed=3, sampler=guided))
    close(both[1:3], p.decode_all(
        [a[1:3], b[1:3]], known=[first, ~first], seed=3, sampler=guided, first=1
    ))  # fmt: skip
    assert np.abs(both.astype(int) - p.decode(a, seed=3, sampler=guided)).max() > 5
    alone = p.decode(a, seed=3, sampler=guided)  # who asks for nothing changes nothing
    close(p.decode_all([a, b], known=[None, none], seed=3, sampler=guided), alone)
    soft = [np.eye(VALUES, dtype=np.float32)[each] for each in (a, b)]
    close(p.decode_all(soft, known=[first, ~first], seed=3, sampler=guided), both)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p, x, c: p.compose([]), "no parents"),
        (lambda p, x, c: p.compose([x, x], weights=(1,)), "weights"),
        (lambda p, x, c: p.compose([x, x], keep=(LENGTH,)), f"0..{LENGTH - 1}; got {LENGTH}"),
        (lambda p, x, c: p.compose([x, x[:1]]), f"they hold [(1, {LENGTH}), (2, {LENGTH})]"),
        (lambda p, x, c: p.compose([x, c], operator=Soft()), "corners"),
        (lambda p, x, c: p.compose([x, x], operator=Soft(temperature=-1.0)), "-1.0"),
        (lambda p, x, c: p.compose([x, x], keep=["fork"]), "'fork'; known: form, ground, tint"),
        (lambda p, x, c: p.compose([x, x], best=0), "best=0"),
        (lambda p, x, c: p.decode(c, known=np.ones(LENGTH, int)), f"known is bool [{LENGTH}]"),
        (lambda p, x, c: p.decode(c, known=np.ones(2, bool)), f"known is bool [{LENGTH}]"),
        (lambda p, x, c: p.decode_all([]), "0 parents"),
        (lambda p, x, c: p.decode_all([c, c], scales=(1,)), "finite scales"),
        (lambda p, x, c: p.decode_all([c, c], scales=(1, np.nan)), "finite scales"),
        (lambda p, x, c: p.decode_all([c, c], known=[None]), "as many masks"),
        (lambda p, x, c: p.decode_all([c, c[:1]]), "one shape and type"),
        (lambda p, x, c: p.decode_all([c, np.eye(VALUES)[c]]), "one shape and type"),
        (
            lambda p, x, c: p.decode_all([c], sampler=Sampler(guidance=Guidance(base="internal"))),
            "takes no sampler.guidance.base",
        ),
        (lambda p, x, c: p.compose([x, c + VALUES]), f"0..{VALUES - 1}"),
        (lambda p, x, c: p.compose([x[0], x[0]]), "uint8"),
        (lambda p, x, c: p.simplices(x, temperature=0), "above 0"),
        (lambda p, x, c: p.decode(c + VALUES), f"0..{VALUES - 1}"),
        (lambda p, x, c: p.decode(c[:, 1:]), f"[b, {LENGTH}]"),
        (lambda p, x, c: p.decode(c.astype(float)), "float64"),
        (lambda p, x, c: p.decode(None, count=2), "trained with codes"),
        (lambda p, x, c: p.decode(c, sampler=Sampler(steps=0)), "steps=0"),
        (lambda p, x, c: p.decode(c, sampler=Sampler(method="rk4")), "rk4"),
        (lambda p, x, c: p.sample(0), "nothing to do"),
        (lambda p, x, c: p.sample_codes(1, sampler=CodeSampler(calls=-1)), "calls=-1"),
        (lambda p, x, c: p.sample_codes(1, labels=[0]), "without classes"),
        (lambda p, x, c: p.complete(c, [LENGTH]), f"0..{LENGTH - 1}; got {LENGTH}"),
        (lambda p, x, c: p.complete(c, np.ones(LENGTH - 1, bool)), f"bool [{LENGTH}]"),
        (lambda p, x, c: p.complete(c, [0.5]), "list of positions"),
        (lambda p, x, c: p.complete(c[0], [0]), f"[b, {LENGTH}]"),
        (lambda p, x, c: p.complete(c + VALUES, [0]), f"0..{VALUES - 1}"),
        (lambda p, x, c: p.complete(c[:, 1:], [0]), f"[b, {LENGTH}]"),
        (lambda p, x, c: p.likelihood(c + VALUES), f"0..{VALUES - 1}"),
        (lambda p, x, c: p.likelihood(c, draws=1), "draws=1"),
        (lambda p, x, c: p.surprise(c, calls=LENGTH + 1), f"1..{LENGTH}"),
        (lambda p, x, c: p.redraw(c, 1.5), "share=1.5"),
        (lambda p, x, c: p.redraw(c, float("nan")), "share=nan"),
    ],
)
def test_refused_in_one_line(p, call, words):
    x = images(2)
    with pytest.raises(UserError) as refused:
        call(p, x, p.encode(x))
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_generator_without_codes_draws_and_reads_none():
    bare = drawn(NULL)
    close(bare.sample(9, seed=1)[3:5], bare.sample(2, seed=1, first=3))
    with pytest.raises(UserError, match="without codes"):
        bare.decode(np.zeros((1, LENGTH), int))


def test_a_recipe_without_the_step_is_told():
    found = networks()
    with pytest.raises(UserError, match="no step 'tokenizer'"):
        pipeline.Pipeline(found, encoder="tokenizer").encode(images(1))


def test_lower(p):
    how = {"encoder": {}, "prior": {"sampler": CodeSampler()}, "generator": {"sampler": FAST}}
    for step, settings in how.items():
        assert "func" in p.networks[step].lower(**settings).as_text()


def written(workdir, lines=(), *, without=()):
    """A run's config.json."""
    config = load("quickstart.py:tiny", SMALL | dict(lines)).to_dict()
    config = {name: section for name, section in config.items() if name not in without}
    (workdir / "config.json").write_text(json.dumps(config))


def test_groups_are_kinds_of_crops_and_clusters_of_the_run(tmp_path):
    written(tmp_path)
    kinds = {"form": (0, 1, 2), "ground": (3, 4), "tint": (5,)}
    assert pipeline.load(tmp_path).groups == kinds
    found = {"length": LENGTH, "groups": {"shape": [1, 4]}}
    (tmp_path / "positions.json").write_text(json.dumps(found))
    assert pipeline.load(tmp_path).groups == kinds | {"shape": (1, 4)}
    lines = {"name": "infill", "groups": (), "whole": True}
    written(tmp_path, {f"samples.operator.{name}": value for name, value in lines.items()})
    assert pipeline.load(tmp_path).operator == Infill(whole=True)


def test_load_samples_as_the_recipe_does(tmp_path):
    written(tmp_path)
    found = pipeline.load(tmp_path, batch=3)
    assert found.sampler == dataclasses.replace(FAST, guidance=Guidance(scale=1.0))
    assert found.code_sampler == CodeSampler(calls=3)
    assert found.batch >= 3 and found.batch % jax.device_count() == 0
    with pytest.raises(UserError, match="train this step first"):
        found.encode(images(1))
    written(tmp_path, without=("samples",))
    assert pipeline.load(tmp_path).sampler == Sampler()


def test_the_encoder_of_codes_from_another_run_is_that_runs(tmp_path):
    written(tmp_path, {"codes.path": str(tmp_path / "first" / "codes")})
    with pytest.raises(UserError, match="first/encoder"):
        pipeline.load(tmp_path).encode(images(1))


def test_load_refuses_what_is_no_run(tmp_path):
    for path, words in ((tmp_path / "nowhere", "does not exist"), (tmp_path, "no run")):
        with pytest.raises(UserError, match=words):
            pipeline.load(path)
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match="damaged"):
            pipeline.load(tmp_path)
