"""The checkup of an encoder: views by hand, and names of what is reported.

And the evaluator on one device and on eight.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recipes import load
from test_pipeline import drawn, images

from dlc_jax import checkup, parallel
from dlc_jax.data import sources
from dlc_jax.data.shapes import Shapes
from dlc_jax.errors import UserError
from dlc_jax.evals.probe import Fit
from dlc_jax.models.vit import standardize
from dlc_jax.stages import STAGES
from dlc_jax.step import make_init

STILL = dict(
    global_size=16,
    global_scale=(1.0, 1.0),
    ratio=(1.0, 1.0),
    flip=0.0,
    jitter=(0.0, 0.0, 0.0, 0.0),
    lightness=0.0,
    gray=0.0,
    blur=(0.0, 0.0, 0.0),
    blur_quirk=False,
    solarize=(0.0, 0.0, 0.0),
)


@pytest.fixture
def source():
    return Shapes(split="validation", image=16, count=40)


def brightness(images):
    """A code of four positions: brightness in eight steps, and three that are never the same."""
    brightness.calls += 1
    first = np.asarray(images).reshape(len(images), -1).mean(1).astype(int) // 32
    other = (np.arange(len(images)) + brightness.calls) % 8
    return np.stack([first, other, other, other], axis=1)


def test_every_position_is_compared_under_the_crops_of_its_kind(source):
    brightness.calls = 0

    def agreement(**crops):
        return checkup.agreement(source, range(40), brightness, crops=crops, values=8, seed=0)

    found, bright = agreement(a=STILL), STILL | dict(lightness=1.0)
    assert found["positions"] == 0.25 and found["positions_min"] == 0 and found["count"] == 40
    assert agreement(b=STILL, a=bright)["positions"] < 0.2  # kind a has the first two
    assert agreement(b=bright, a=STILL)["positions"] == 0.25


def test_shares_of_positions_are_minded(source):
    brightness.calls = 0

    def agreement(**crops):
        def encode(images):  # the position of brightness is the second
            return np.roll(brightness(images), 1, axis=1)

        return checkup.agreement(source, range(40), encode, crops=crops, values=8, seed=0)

    bright = STILL | dict(lightness=1.0)
    assert agreement(a=STILL, b=bright)["positions"] == 0.25  # of two and two
    assert agreement(a=STILL, b=bright | dict(share=3))["positions"] < 0.2  # of one and three


def test_views_are_two_global_crops_and_the_same_for_a_seed(source):
    seen = []

    def encode(images):
        seen.append(np.asarray(images))
        return brightness(images)

    brightness.calls = 0
    for seed in (0, 0, 1):
        crops = STILL | dict(flip=0.5, global_scale=(0.3, 1.0), global_crops=5)
        crops |= dict(local_crops=2, local_size=8)
        checkup.agreement(source, [3, 1], encode, crops={"all": crops}, values=8, seed=seed)
    assert len(seen) == 6 and all(view.shape == (2, 16, 16, 3) for view in seen)
    np.testing.assert_array_equal(np.stack(seen[:2]), np.stack(seen[2:4]))
    assert (seen[0] != seen[1]).any() and (seen[0] != seen[4]).any()


def test_read_gives_what_functions_say_in_the_order_of_the_rows(source, monkeypatch):
    monkeypatch.setattr(checkup, "PART", 7)
    rows = [5, *range(20)]
    means = {"mean": lambda part: np.array([image.mean() for image in part])}
    found, records = checkup.read(source, rows, means), [source[row] for row in rows]
    np.testing.assert_array_equal(found["mean"], [record["image"].mean() for record in records])
    np.testing.assert_array_equal(found["factors"], [record["factors"] for record in records])


def test_pixels_are_those_of_the_image_or_of_a_smaller_one():
    small = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    np.testing.assert_array_equal(checkup.pixels(list(small)), small.reshape(2, -1))
    assert checkup.pixels([np.zeros((90, 70, 3), np.uint8)] * 2).shape == (2, 32 * 32 * 3)


def test_names_of_what_is_probed():
    random = np.random.default_rng(0)
    codes = random.integers(0, 4, (60, 3))
    record = {"codes": codes, "factors": codes[:, :2], "untrained": codes[::-1]}
    record |= {"features": random.normal(size=(60, 8)), "pixels": random.normal(size=(60, 5))}
    share = dict(factors={"shape": "abcd", "color": "abcd"}, values=4)
    share["fit"] = Fit(epochs=10, batch=8)
    found = checkup.probes(record, record, **share)
    groups = ("", "_best_on_validation", "_knn", "_untrained", "_features", "_pixels")
    groups, names = (*groups, "_features_patches"), ("shape", "color", "count")
    expected = {f"probe{group}/{name}" for group in groups for name in names}
    names = ("shape_10", "shape_20", "color_10", "color_20", "count")
    expected |= {f"probe_features_knn/{name}" for name in names}
    assert set(found) == expected
    assert found["probe/shape"] > 0.9 and found["probe_knn/shape"] > 0.5
    assert found["probe_untrained/shape"] < 0.7 and found["probe/count"] == 60
    bare = {name: record[name] for name in ("codes", "factors")}
    held_out = checkup.probes(bare, bare, split="held_out", **share)
    assert {key.partition("/")[0] for key in held_out} == {
        "probe_held_out",
        "probe_held_out_best_on_held_out",
        "probe_held_out_knn",
    }


def test_features_are_the_normalized_class_token_and_the_mean_of_the_patches():
    p, x = drawn(), images(3)
    network = p.networks["encoder"]
    model, params = network.model, {"params": network.params}
    tokens = jax.jit(model.apply)(params, standardize(jnp.asarray(x)))
    normal = [model.apply(params, tokens[name], method="normalize") for name in ("cls", "patches")]
    found, expected = p.features(x), np.concatenate([normal[0], normal[1].mean(1)], axis=1)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_an_untrained_encoder_is_another_and_always_the_same():
    x = images(16)
    network, alone, other = (drawn({"seed": seed}).networks["encoder"] for seed in (3, 3, 4))
    found = network.encode(x, params=network.untrained())
    np.testing.assert_array_equal(found, alone.encode(x, params=alone.untrained()))
    assert (network.encode(x) != found).any()
    first, second = (jax.tree.leaves(each.untrained()) for each in (alone, other))
    assert any((a != b).any() for a, b in zip(first, second, strict=True))


@pytest.fixture
def config():
    small = {"backbone.width": 16, "backbone.depth": 1, "backbone.heads": 2}
    lines = {f"encoder.model.{name}": value for name, value in small.items()}
    return load("quickstart.py:tiny", lines | {"encoder.monitor.count": 48})


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
    alike = ("codes/perplexity", "codes/dead", "codes/mutual_information")
    for key in (*alike, "agreement/times_chance", "probe/color"):
        assert first[key] == pytest.approx(second[key], abs=0.1), key
    known = {"probe_knn/shape", "probe_features/shape", "probe_features_knn/shape_10"}
    assert known | {"agreement/positions"} <= first.keys()
    assert all(isinstance(value, float | int) for value in first.values())
    assert not list(tmp_path.iterdir())


def test_without_classes_there_is_health_and_agreement_and_without_a_count_nothing(
    config, tmp_path, monkeypatch
):
    monkeypatch.setattr(sources.DataSet, "factors", lambda _: {})
    stage = STAGES["encoder"](config, step="encoder", workdir=tmp_path)
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        found = stage.evals[0].run(make_init(stage)(jax.random.key(0)), {}, mesh, tmp_path)
    assert {key.partition("/")[0] for key in found} == {"codes", "agreement"}
    config.encoder.monitor.count = 0
    assert STAGES["encoder"](config, step="encoder", workdir=tmp_path).evals == ()
    config.encoder.monitor.count = -1
    with pytest.raises(UserError, match="encoder.monitor"):
        STAGES["encoder"](config, step="encoder", workdir=tmp_path)
