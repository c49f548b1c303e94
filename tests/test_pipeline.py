"""The Python face with random weights: what it computes, that batches and parts change nothing, and what it refuses."""

import functools
import json
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from dlc_jax import parallel, pipeline
from dlc_jax.errors import UserError
from dlc_jax.evals import composition
from dlc_jax.models.vit import standardize

SIZE, LENGTH, VALUES = 8, 6, 5
SMALL = dict(width=16, depth=1, heads=2, remat="none", unroll=0)
ENCODER = dict(image=SIZE, patch=4, positions=LENGTH, values=VALUES, prototypes=8, hidden=8, bottleneck=4, registers=1, **SMALL)
GENERATOR = dict(image=SIZE, channels=3, patch=4, positions=LENGTH, values=VALUES, **SMALL)
TRAIN = dict(dtype="float32")
RECIPE = dict(
    encoder=dict(stage="encoder", model=ENCODER, crops=dict(all=dict(global_size=SIZE)), train=TRAIN),
    prior=dict(stage="prior", model=dict(positions=LENGTH, values=VALUES, **SMALL), train=TRAIN),
    generator=dict(stage="generator", latents=False, model=GENERATOR, objective=dict(prediction="v"), train=TRAIN),
    samples=dict(
        stage="samples", encoder="encoder", prior="prior", generator="generator", calls=3, sampling_steps=2, guidance=1.5, method="euler"
    ),
)  # fmt: skip


class Drawn(pipeline.Pipeline):
    """A pipeline whose parameters are drawn, so that no network gives a constant, instead of loaded; it counts what it traces."""

    @functools.cache  # noqa: B019
    def _params(self, network):
        """Without the encoder's biases: with them, random codes say little of the image."""
        random = np.random.default_rng(7)
        scale, bias = (1.0, 0.0) if network == "encoder" else (0.3, 0.3)

        def draw(path, leaf):
            return (bias if path[-1].key == "bias" else scale) * random.standard_normal(leaf.shape, np.float32)

        return jax.tree.map_with_path(draw, self._model(network)[1])

    traced = 0

    def _encode(self, params, images):
        self.traced += 1
        return super()._encode(params, images)


def drawn(*, batch=8, recipe=RECIPE, devices=1, **keywords):
    mesh = parallel.make_mesh(devices=jax.devices()[:devices])
    return Drawn(ml_collections.ConfigDict(recipe), "nowhere", mesh=mesh, batch=batch, **keywords)


@pytest.fixture(scope="module")
def p():
    return drawn(steps=2, method="euler")


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
    logits = jax.jit(p._model("encoder")[0].apply)({"params": p._params("encoder")}, standardize(jnp.asarray(x)))["logits"]
    for temperature in (1.0, 0.3):
        soft = p.simplices(x, temperature=temperature)
        assert soft.dtype == np.float32 and soft.shape == (3, LENGTH, VALUES)
        np.testing.assert_allclose(soft, jax.nn.softmax(logits / temperature), atol=1e-5)
    codes = p.encode(x)
    assert codes.dtype == np.int32 and len(np.unique(codes)) > 2
    np.testing.assert_array_equal(codes, soft.argmax(-1))


def test_images_of_other_sizes_are_fitted(p):
    large = np.repeat(np.repeat(images(2), 2, 1), 2, 2)  # halving by box averages gives the small ones back
    np.testing.assert_array_equal(p.encode(large), p.encode(images(2)))
    np.testing.assert_array_equal(p.encode([*images(2), large[0]]), p.encode(images(2))[[0, 1, 0]])
    with pytest.raises(UserError, match="nothing to do"):
        p.encode([])


def test_soft_codes_at_the_corners_decode_as_hard_ones(p):
    codes = p.encode(images(5))
    hard = p.decode(codes, seed=3)
    assert hard.shape == (5, SIZE, SIZE, 3)
    close(hard, p.decode(np.eye(VALUES, dtype=np.float32)[codes], seed=3))
    other = p.decode((codes + 1) % VALUES, seed=3)
    assert np.abs(hard.astype(int) - other).max() > 5  # the codes are read
    between = p.decode((np.eye(VALUES)[codes] + np.eye(VALUES)[(codes + 1) % VALUES]) / 2, seed=3)
    assert np.abs(between.astype(int) - hard).max() > 1 and np.abs(between.astype(int) - other).max() > 1


def test_batches_devices_and_parts_change_nothing(p):
    large = drawn(batch=16, devices=4, steps=2, method="euler")
    np.testing.assert_array_equal(p.encode(images(11)), large.encode(images(11)))
    np.testing.assert_array_equal(p.sample_codes(11, seed=2), large.sample_codes(11, seed=2))
    whole = p.sample(11, seed=2)
    close(whole, large.sample(11, seed=2))
    close(whole[4:7], p.sample(3, first=4, seed=2))
    close(whole, p.decode(p.sample_codes(11, seed=2), seed=3))
    assert np.abs(whole.astype(int) - p.sample(11, seed=3)).max() > 5


def test_a_function_is_compiled_once_per_shape():
    fresh = drawn()
    for count in (3, 8, 13):
        fresh.encode(images(count))
    assert fresh.traced == 1


def test_settings_are_those_of_the_pipeline_unless_given(monkeypatch):
    found = drawn(calls=2, steps=3, guidance=2.0, method="euler")
    monkeypatch.setattr(found, "_run", lambda function, *arguments, **params: function.keywords)
    codes = np.zeros((1, LENGTH), int)
    assert found.decode(codes) == {"steps": 3, "scale": 2.0, "method": "euler"}
    assert found.decode(codes, steps=5, guidance=1, method="heun") == {"steps": 5, "scale": 1.0, "method": "heun"}
    assert found.sample_codes(1) == {"calls": 2, "temperature": 1.0}
    assert found.sample_codes(1, calls=4, temperature=0.5) == {"calls": 4, "temperature": 0.5}
    assert found.sample_codes(1, calls=0)["calls"] == LENGTH


def test_guidance_and_steps_reach_the_sampler(p):
    codes = p.encode(images(2))
    plain = p.decode(codes).astype(int)
    for change in ({"guidance": 3.0}, {"steps": 3}):
        assert np.abs(p.decode(codes, **change) - plain).max() > 1


class Known(pipeline.Pipeline):
    """A pipeline whose networks know the likeliest values, and the pixels of a code and of none."""

    LIKELY = np.arange(LENGTH) % VALUES

    def _model(self, network):
        def logits(variables, codes):
            twice = jnp.log1p(jax.nn.one_hot(self.LIKELY, VALUES))
            return jnp.broadcast_to(twice, (*codes.shape, VALUES))

        def data(variables, x, t, codes):
            pixel = 100.0 if codes is None else 110.0 + codes[:, :1, None, None]
            return jnp.broadcast_to(pixel / 127.5 - 1, x.shape)

        sizes = dict(positions=LENGTH, values=VALUES, image=2, channels=3)
        return types.SimpleNamespace(apply=logits if network == "prior" else data, **sizes), {}

    def _params(self, network):
        return {}


@pytest.fixture(scope="module")
def known():
    recipe = RECIPE | {"generator": RECIPE["generator"] | {"objective": dict(prediction="x")}}
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    how = dict(batch=8, steps=100, method="euler")
    return Known(ml_collections.ConfigDict(recipe), "nowhere", mesh=mesh, **how)


def test_pixels_are_those_the_network_knows_led_away_from_the_null_condition(known):
    """The path ends at predicted data, however short its last step; pixels stay in 0 to 255."""
    values = np.arange(VALUES)
    codes = values[:, None] * np.ones(LENGTH, int)
    right = {1.0: 110 + values, 2.0: 120 + 2 * values, 20.0: 255 + 0 * values}
    for guidance, pixels in right.items():
        expected = np.broadcast_to(pixels[:, None, None, None], (VALUES, 2, 2, 3))
        np.testing.assert_array_equal(known.decode(codes, guidance=guidance), expected)


def test_the_temperature_reaches_the_prior(known):
    """At 0 every value is the likeliest one, though it is only twice as likely as each other."""
    found = known.sample_codes(8, temperature=0.0)
    np.testing.assert_array_equal(found, np.tile(Known.LIKELY, (8, 1)))


def test_compose_copies_codes_position_by_position(p):
    a, b = images(6, seed=1), images(6, seed=2)
    assert np.mean(p.encode(a) != p.encode(b)) > 0.3  # else there is nothing to mix
    found = p.compose([a, b], weights=(1, 2), keep=(0,), seed=4)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, composition.mix([p.encode(a), p.encode(b)], weights=(1, 2), keep=(0,), seed=4))
    np.testing.assert_array_equal(found, p.compose([p.encode(a), b], weights=(1, 2), keep=(0,), seed=4))
    np.testing.assert_array_equal(found[2:4], p.compose([a[2:4], b[2:4]], weights=(1, 2), keep=(0,), seed=4, first=2))
    np.testing.assert_array_equal(
        p.compose([p.encode(a).astype(np.uint8), p.encode(b)], weights=(1, 2), keep=(0,), seed=4), found
    )


def test_compose_mixes_simplices_at_a_temperature(p):
    a, b = images(1, seed=1), images(1, seed=2)
    many = [np.repeat(part, 64, 0) for part in (a, b)]
    np.testing.assert_array_equal(p.compose(many, temperature=1e-3, seed=4), p.compose(many, seed=4))  # the limit is the copy
    soft = [p.simplices(part, temperature=2.0) for part in many]
    np.testing.assert_array_equal(p.compose(many, temperature=2.0, seed=4), p.compose(soft, seed=4))
    values = p.compose(many, temperature=2.0, seed=4)
    assert np.mean((values == p.encode(a)) | (values == p.encode(b))) < 0.95  # also values that neither parent has


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p, x, c: p.compose([]), "no parents"),
        (lambda p, x, c: p.compose([x, x], weights=(1,)), "weights"),
        (lambda p, x, c: p.compose([x, x], keep=(LENGTH,)), f"0..{LENGTH - 1}; got {LENGTH}"),
        (lambda p, x, c: p.compose([x, x[:1]]), "[2, 1]"),
        (lambda p, x, c: p.compose([x, c], temperature=0.5), "corners"),
        (lambda p, x, c: p.compose([x, x], temperature=-1.0), "-1.0"),
        (lambda p, x, c: p.compose([x, c + VALUES]), f"0..{VALUES - 1}"),
        (lambda p, x, c: p.compose([x[0], x[0]]), "uint8"),
        (lambda p, x, c: p.simplices(x, temperature=0), "above 0"),
        (lambda p, x, c: p.decode(c + VALUES), f"0..{VALUES - 1}"),
        (lambda p, x, c: p.decode(c[:, 1:]), f"[b, {LENGTH}]"),
        (lambda p, x, c: p.decode(c.astype(float)), "float64"),
        (lambda p, x, c: p.decode(None, count=2), "trained with codes"),
        (lambda p, x, c: p.decode(c, steps=0), "steps=0"),
        (lambda p, x, c: p.decode(c, method="rk4"), "rk4"),
        (lambda p, x, c: p.sample(0), "nothing to do"),
        (lambda p, x, c: p.sample_codes(1, calls=-1), "calls=-1"),
    ],
)  # fmt: skip
def test_refused_in_one_line(p, call, words):
    x = images(2)
    with pytest.raises(UserError) as refused:
        call(p, x, p.encode(x))
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_generator_without_codes_draws_and_reads_none():
    recipe = RECIPE | {"generator": RECIPE["generator"] | {"model": GENERATOR | {"positions": 0, "values": 0}}}
    bare = drawn(recipe=recipe, steps=2, method="euler")
    close(bare.sample(9, seed=1)[3:5], bare.sample(2, seed=1, first=3))
    with pytest.raises(UserError, match="without codes"):
        bare.decode(np.zeros((1, LENGTH), int))


def test_latents_are_not_shown_as_pixels():
    with pytest.raises(UserError, match="latents"):
        drawn(recipe=RECIPE | {"generator": RECIPE["generator"] | {"latents": True}}).sample(1)


def test_a_recipe_without_the_step_is_told():
    with pytest.raises(UserError, match="no step 'encoder'"):
        drawn(recipe={key: section for key, section in RECIPE.items() if key != "encoder"}).encode(images(1))


@pytest.mark.parametrize("what", ["encode", "sample_codes", "decode"])
def test_lower(p, what):
    assert "func" in p.lower(what).as_text()


def test_load_samples_as_the_recipe_does(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RECIPE))
    found = pipeline.load(tmp_path, batch=3)
    assert (found.calls, found.steps, found.guidance, found.method) == (3, 2, 1.5, "euler")
    assert found.batch >= 3 and found.batch % jax.device_count() == 0
    with pytest.raises(UserError, match="train this step first"):
        found.encode(images(1))
    (tmp_path / "config.json").write_text(json.dumps({key: part for key, part in RECIPE.items() if key != "samples"}))
    assert pipeline.load(tmp_path).method == "heun"


def test_the_encoder_of_codes_from_another_run_is_that_runs(tmp_path):
    codes = dict(stage="codes", path=str(tmp_path / "first" / "codes"), encoder="encoder")
    (tmp_path / "config.json").write_text(json.dumps(RECIPE | {"codes": codes}))
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
