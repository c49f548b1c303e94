"""The embedded data set: draws by index, disjoint combinations, exact coverage, distinct images."""

import pickle

import numpy as np
import pytest

from dlc_jax.data import shapes
from dlc_jax.errors import UserError


@pytest.mark.parametrize("positions", [False, True])
def test_an_example_depends_on_its_index_alone(positions):
    indices = np.arange(300)
    factors, nuisances = shapes.draw(indices, split="train", seed=3, positions=positions)
    order = np.random.default_rng(0).permutation(300)
    for part in np.array_split(order, 7):
        f, z = shapes.draw(part, split="train", seed=3, positions=positions)
        np.testing.assert_array_equal(f, factors[part])
        np.testing.assert_array_equal(z, nuisances[part])
    images = shapes.render(factors, nuisances)
    np.testing.assert_array_equal(shapes.render(factors[5:9], nuisances[5:9]), images[5:9])


def test_seeds_and_splits_draw_differently():
    draws = [
        shapes.draw(np.arange(50), split=split, seed=seed)[1]
        for split, seed in (
            ("train", 0),
            ("train", 1),
            ("validation", 0),
            ("held_out", 0),
            ("train", -1),
        )
    ]
    assert len(np.unique(np.concatenate(draws)[:, 0])) == 250


def test_factors_and_nuisances_are_uniform():
    factors, nuisances = shapes.draw(np.arange(20000), split="train", positions=True)
    for column, names in enumerate(shapes.NAMES.values()):
        counts = np.bincount(factors[:, column], minlength=len(names))
        assert len(counts) == len(names) and counts.min() > 0.8 * counts.max()
    unit = nuisances / shapes.NUISANCES
    assert np.abs(unit).max() <= 1
    np.testing.assert_allclose(unit.mean(axis=0), 0, atol=0.02)
    np.testing.assert_allclose(unit.var(axis=0), 1 / 3, atol=0.02)
    np.testing.assert_allclose(np.corrcoef(unit.T) - np.eye(5), 0, atol=0.03)


def test_held_out_combinations_never_occur_in_training():
    held_out = set(shapes.HELD_OUT)
    assert len(held_out) == 22
    seen = {
        split: set(map(tuple, shapes.draw(np.arange(5000), split=split)[0][:, :3].tolist()))
        for split in shapes.SPLITS
    }
    assert (
        seen["held_out"] == held_out == set(map(tuple, shapes.combinations(held_out=True).tolist()))
    )
    assert (
        seen["train"]
        == seen["validation"]
        == set(map(tuple, shapes.combinations(held_out=False).tolist()))
    )
    assert len(seen["train"]) == 122 and not seen["train"] & held_out
    # Every pair of values is still seen in training: only the triple is new.
    for a, b in (
        (0, 1),
        (0, 2),
        (1, 2),
    ):
        pairs = [(triple[a], triple[b]) for triple in shapes.HELD_OUT]
        assert len(set(pairs)) == 22
    for column, values in enumerate((6, 6, 4)):
        assert {triple[column] for triple in shapes.HELD_OUT} == set(range(values))


def test_no_two_images_are_equal():
    images = [
        shapes.Shapes(split=split, count=2500)._everything[0] for split in ("train", "validation")
    ]
    assert len(np.unique(np.concatenate(images).reshape(5000, -1), axis=0)) == 5000


# Areas of the outlines at radius 1, by hand: the triangle's circumradius is 1.25, the cross is two
# bars less what they share.
AREAS = {
    "disc": np.pi,
    "ring": np.pi * (1 - 0.55**2),
    "square": 1.76**2,
    "triangle": 3 * 3**0.5 / 4 * 1.25**2,
    "cross": 2 * 2 * 0.68 - 0.68**2,
    "bar": 2 * 0.72,
}


@pytest.mark.parametrize("image", [16, 32, 45])
def test_coverage_is_anti_aliased(image):
    random = np.random.default_rng(0)
    nuisances = random.uniform(-1, 1, (200, 5)) * shapes.NUISANCES
    for shape, name in enumerate(shapes.NAMES["shape"]):
        for size, radius in enumerate(shapes.RADII):
            mask = shapes.coverage(np.tile([shape, 0, 0, size], (200, 1)), nuisances, image=image)
            area = AREAS[name] * (radius * (1 + nuisances[:, 3])) ** 2
            assert abs((mask.mean(axis=(1, 2)) / area).mean() - 1) < 0.02
            assert ((mask > 0.05) & (mask < 0.95)).any(axis=(1, 2)).all()


def test_shift_moves_the_center_of_mass_by_itself():
    nuisances = np.zeros((3, 5))
    nuisances[1, 0], nuisances[2, 1] = shapes.SHIFT, -shapes.SHIFT / 2
    mask = shapes.coverage(np.zeros((3, 4), int), nuisances, image=16).astype(np.float64)
    grid = (np.arange(16) + 0.5) / 16
    mean_x = (mask * grid).sum(axis=(1, 2)) / mask.sum(axis=(1, 2))
    mean_y = (mask * grid[:, None]).sum(axis=(1, 2)) / mask.sum(axis=(1, 2))
    np.testing.assert_allclose(mean_x - 0.5, [0, shapes.SHIFT, 0], atol=2e-3)
    np.testing.assert_allclose(mean_y - 0.5, [0, 0, -shapes.SHIFT / 2], atol=2e-3)


def test_sizes_show_the_same_scene():
    factors, nuisances = shapes.draw(np.arange(40), split="train")
    small = shapes.render(factors, nuisances, image=16).astype(np.float64)
    large = shapes.render(factors, nuisances, image=48).astype(np.float64)
    pooled = large.reshape(40, 16, 3, 16, 3, 3).mean(axis=(2, 4))
    assert np.sqrt(np.square(pooled - small).mean()) < 255 * 0.02


def test_colors_are_hues():
    import colorsys

    hues = np.array([-10.0, -4.0, 0.0, 7.0, 10.0])
    for color in range(6):
        for hue, rgb in zip(hues, shapes.paint(np.full(5, color), hues)):
            low, span = shapes.DARK, shapes.BRIGHT - shapes.DARK
            expected = low + span * np.array(
                colorsys.hsv_to_rgb(((60 * color + hue) / 360) % 1, 1, 1)
            )
            np.testing.assert_allclose(rgb, expected, atol=1e-12)


@pytest.mark.parametrize("image", [16, 17, 64])
def test_source_reads_what_render_paints(image):
    source = shapes.Shapes(split="held_out", image=image, count=20, seed=4, positions=True)
    factors, nuisances = shapes.draw(np.arange(20), split="held_out", seed=4, positions=True)
    images = shapes.render(factors, nuisances, image=image)
    assert len(source) == 20
    for i in (0, 19, 7):
        record = source[i]
        assert record["index"] == i and record["image"].dtype == np.uint8
        assert record["factors"].dtype == np.int32
        np.testing.assert_array_equal(record["image"], images[i])
        np.testing.assert_array_equal(record["factors"], factors[i])
    for wrong in (20, -1):
        with pytest.raises(IndexError):
            source[wrong]


def test_source_is_the_same_rendered_whole_or_one_by_one(monkeypatch):
    whole = shapes.Shapes(split="train", count=30)
    kept = [whole[i]["image"] for i in range(30)]
    monkeypatch.setattr(shapes, "CACHE_BYTES", 0)
    single = shapes.Shapes(split="train", count=30)
    np.testing.assert_array_equal(kept, [single[i]["image"] for i in range(30)])
    assert "_everything" not in single.__dict__
    copy = pickle.loads(pickle.dumps(whole))
    assert "_everything" not in copy.__dict__ and repr(copy) == repr(whole)
    np.testing.assert_array_equal(copy[3]["image"], kept[3])


def test_captions():
    assert shapes.caption([1, 0, 2, 1]) == "a large red ring on a white background"
    assert (
        shapes.caption(np.array([5, 3, 3, 0, 8]))
        == "a small cyan bar on a brown background, bottom right"
    )


def test_user_errors():
    for arguments in ({"image": 15}, {"split": "test"}, {"count": 0}):
        with pytest.raises(UserError):
            shapes.Shapes(**{"split": "train", **arguments})
