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
from dlc_jax.diffusion.code_sampler import CodeSampler
from dlc_jax.diffusion.guidance import Guidance
from dlc_jax.diffusion.sample import Sampler
from dlc_jax.errors import UserError
from dlc_jax.evals import composition
from dlc_jax.models.vit import standardize
from dlc_jax.networks import Networks
from dlc_jax.networks.encoder import EncoderNetwork
from dlc_jax.networks.network import Network

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

    def logits(variables, codes):
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


def test_compose_copies_codes_position_by_position(p):
    a, b = images(6, seed=1), images(6, seed=2)
    assert np.mean(p.encode(a) != p.encode(b)) > 0.3  # else there is nothing to mix
    how = dict(weights=(1, 2), keep=(0,), seed=4)
    found, codes = p.compose([a, b], **how), [p.encode(a), p.encode(b)]
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, composition.mix(codes, **how))
    np.testing.assert_array_equal(found, p.compose([codes[0], b], **how))
    np.testing.assert_array_equal(found[2:4], p.compose([a[2:4], b[2:4]], **how, first=2))
    np.testing.assert_array_equal(found, p.compose([codes[0].astype(np.uint8), codes[1]], **how))


def test_compose_mixes_simplices_at_a_temperature(p):
    a, b = images(1, seed=1), images(1, seed=2)
    many = [np.repeat(part, 64, 0) for part in (a, b)]
    limit = p.compose(many, temperature=1e-3, seed=4)
    np.testing.assert_array_equal(limit, p.compose(many, seed=4))  # the copy
    soft = [p.simplices(part, temperature=2.0) for part in many]
    values = p.compose(many, temperature=2.0, seed=4)
    np.testing.assert_array_equal(values, p.compose(soft, seed=4))
    # also values that neither parent has
    assert np.mean((values == p.encode(a)) | (values == p.encode(b))) < 0.95


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p, x, c: p.compose([]), "no parents"),
        (lambda p, x, c: p.compose([x, x], weights=(1,)), "weights"),
        (lambda p, x, c: p.compose([x, x], keep=(LENGTH,)), f"0..{LENGTH - 1}; got {LENGTH}"),
        (lambda p, x, c: p.compose([x, x[:1]]), "they hold [1, 2]"),
        (lambda p, x, c: p.compose([x, c], temperature=0.5), "corners"),
        (lambda p, x, c: p.compose([x, x], temperature=-1.0), "-1.0"),
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


def test_load_samples_as_the_recipe_does(tmp_path):
    written(tmp_path)
    found = pipeline.load(tmp_path, batch=3)
    assert found.sampler == dataclasses.replace(FAST, guidance=Guidance(scale=1.5))
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
