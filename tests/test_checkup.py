"""The checkup of an encoder: views by hand, names of what is reported, and the evaluator on one device and on eight."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from test_configs import ROOT, load
from test_pipeline import RECIPE, drawn, images

from dlc_jax import checkup, parallel
from dlc_jax.data import sources
from dlc_jax.data.shapes import Shapes
from dlc_jax.errors import UserError
from dlc_jax.evals.probe import SMALL
from dlc_jax.models.vit import standardize
from dlc_jax.stages import STAGES
from dlc_jax.step import make_init

STILL = dict(
    global_size=16, global_scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, jitter=(0.0, 0.0, 0.0, 0.0), lightness=0.0, gray=0.0,
    blur=(0.0, 0.0, 0.0), blur_quirk=False, solarize=(0.0, 0.0, 0.0),
)  # fmt: skip


@pytest.fixture
def source():
    return Shapes(split="validation", image=16, count=40)


def brightness(images):
    """A code of four positions: the image's brightness in eight steps, and three that are never the same."""
    brightness.calls += 1
    first = np.asarray(images).reshape(len(images), -1).mean(1).astype(int) // 32
    other = (np.arange(len(images)) + brightness.calls) % 8
    return np.stack([first, other, other, other], axis=1)


def test_every_position_is_compared_under_the_crops_of_its_kind(source):
    brightness.calls = 0
    crops = {"b": STILL, "a": STILL | dict(lightness=1.0)}
    share = dict(values=8, seed=0)
    found = checkup.agreement(source, range(40), brightness, crops={"a": STILL}, **share)
    assert found["positions"] == 0.25 and found["positions_min"] == 0 and found["count"] == 40
    assert checkup.agreement(source, range(40), brightness, crops=crops, **share)["positions"] < 0.2  # kind a has the first two
    crops = {"b": STILL | dict(lightness=1.0), "a": STILL}
    assert checkup.agreement(source, range(40), brightness, crops=crops, **share)["positions"] == 0.25


def test_views_are_two_global_crops_and_the_same_for_a_seed(source):
    seen = []

    def encode(images):
        seen.append(np.asarray(images))
        return brightness(images)

    brightness.calls = 0
    for seed in (0, 0, 1):
        crops = STILL | dict(flip=0.5, global_scale=(0.3, 1.0), global_crops=5, local_crops=2, local_size=8)
        checkup.agreement(source, [3, 1], encode, crops={"all": crops}, values=8, seed=seed)
    assert len(seen) == 6 and all(view.shape == (2, 16, 16, 3) for view in seen)
    np.testing.assert_array_equal(np.stack(seen[:2]), np.stack(seen[2:4]))
    assert (seen[0] != seen[1]).any() and (seen[0] != seen[4]).any()


def test_read_gives_what_functions_say_in_the_order_of_the_rows(source, monkeypatch):
    monkeypatch.setattr(checkup, "PART", 7)
    found = checkup.read(source, [5, *range(20)], {"mean": lambda part: np.array([image.mean() for image in part])})
    np.testing.assert_array_equal(found["mean"], [source[row]["image"].mean() for row in [5, *range(20)]])
    np.testing.assert_array_equal(found["factors"], [source[row]["factors"] for row in [5, *range(20)]])


def test_pixels_are_those_of_the_image_or_of_a_smaller_one():
    small = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    np.testing.assert_array_equal(checkup.pixels(list(small)), small.reshape(2, -1))
    assert checkup.pixels([np.zeros((90, 70, 3), np.uint8)] * 2).shape == (2, 32 * 32 * 3)


def test_names_of_what_is_probed():
    random = np.random.default_rng(0)
    codes = random.integers(0, 4, (60, 3))
    record = {"codes": codes, "factors": codes[:, :2], "features": random.normal(size=(60, 8)), "untrained": codes[::-1]}
    record["pixels"] = random.normal(size=(60, 5))
    share = dict(factors={"shape": "abcd", "color": "abcd"}, values=4, fit=replace(SMALL, epochs=10, batch=8))
    found = checkup.probes(record, record, **share)
    groups = ("probe", "probe_best_on_validation", "probe_knn", "probe_untrained", "probe_features", "probe_pixels")
    expected = {f"{group}/{name}" for group in (*groups, "probe_features_patches") for name in ("shape", "color", "count")}
    expected |= {f"probe_features_knn/{name}" for name in ("shape_10", "shape_20", "color_10", "color_20", "count")}
    assert set(found) == expected
    assert found["probe/shape"] > 0.9 and found["probe_knn/shape"] > 0.5 and found["probe_untrained/shape"] < 0.7
    assert found["probe/count"] == 60
    bare = {name: record[name] for name in ("codes", "factors")}
    held_out = checkup.probes(bare, bare, split="held_out", **share)
    assert {key.partition("/")[0] for key in held_out} == {
        "probe_held_out",
        "probe_held_out_best_on_held_out",
        "probe_held_out_knn",
    }


def test_features_are_the_normalized_class_token_and_the_mean_of_the_patches():
    p, x = drawn(), images(3)
    model, params = p._model("encoder")[0], {"params": p._params("encoder")}
    tokens = jax.jit(model.apply)(params, standardize(jnp.asarray(x)))
    normal = [model.apply(params, tokens[name], method="normalize") for name in ("cls", "patches")]
    found = p.features(x)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.concatenate([normal[0], normal[1].mean(1)], axis=1), atol=1e-4)


def test_an_untrained_encoder_is_another_and_always_the_same():
    p, alone, x = drawn(recipe=RECIPE | dict(seed=3)), drawn(recipe=RECIPE | dict(seed=3)), images(16)
    found = p.encode(x, params=p.untrained())
    np.testing.assert_array_equal(found, alone.encode(x, params=alone.untrained()))
    assert (p.encode(x) != found).any()
    first, other = alone.untrained(), drawn(recipe=RECIPE | dict(seed=4)).untrained()
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True))


@pytest.fixture
def config():
    config = load(ROOT / "configs" / "quickstart.py", "tiny")
    config.encoder.model.update(dict(width=16, depth=1, heads=2))
    config.encoder.monitor.count = 48
    return config


@pytest.mark.slow
def test_the_monitor_says_the_same_on_one_device_and_on_eight(config, tmp_path):
    stage = STAGES["encoder"](config, step="encoder", workdir=tmp_path)
    (monitor,) = stage.evals
    assert (monitor.name, monitor.every) == ("monitor", 12)
    found = []
    for devices in (1, 8):
        mesh = parallel.make_mesh(devices=jax.devices()[:devices])
        with jax.set_mesh(mesh):
            state = jax.device_put(make_init(stage)(jax.random.key(0)), parallel.replicated(mesh))
            found.append(monitor.run(state, {}, mesh, tmp_path))
    first, second = found
    assert first.keys() == second.keys()
    for key in ("codes/perplexity", "codes/dead", "codes/mutual_information", "agreement/times_chance", "probe/color"):
        assert first[key] == pytest.approx(second[key], abs=0.1), key
    assert {"probe_knn/shape", "probe_features/shape", "probe_features_knn/shape_10", "agreement/positions"} <= first.keys()
    assert all(isinstance(value, float | int) for value in first.values()) and not list(tmp_path.iterdir())


def test_without_classes_there_is_health_and_agreement_and_without_a_count_nothing(config, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "factors", lambda **_: {})
    stage = STAGES["encoder"](config, step="encoder", workdir=tmp_path)
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        found = stage.evals[0].run(make_init(stage)(jax.random.key(0)), {}, mesh, tmp_path)
    assert {key.partition("/")[0] for key in found} == {"codes", "agreement"}
    config.encoder.monitor.count = 0
    assert STAGES["encoder"](config, step="encoder", workdir=tmp_path).evals == ()
    config.encoder.monitor.count = -1
    with pytest.raises(UserError, match="encoder.monitor"):
        STAGES["encoder"](ml_collections.ConfigDict(config), step="encoder", workdir=tmp_path)
