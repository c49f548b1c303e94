"""Transforms against plain NumPy, and the properties that training relies on."""

import colorsys

import numpy as np
import pytest
from PIL import Image

from dlc_jax.data import transforms
from dlc_jax.errors import UserError

PLAIN = dict(flip=0.0, jitter_probability=0.0, gray=0.0, blur=(0, 0, 0), solarize=(0, 0, 0))


def noise(height=16, width=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def ramp(height=16, width=16):
    """Red grows with x, green with y: a crop's pixels tell where it was cut."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 200 // width, y * 200 // height, 0 * x], -1).astype(np.uint8)


class Silent:
    """A generator that must not be asked."""

    def __getattr__(self, name):
        raise AssertionError("drew a random number")


def test_center_crop_scales_the_short_side_and_keeps_the_center():
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, 20:60] = 255
    out = np.asarray(transforms.center_crop(Image.fromarray(image), size=10))
    assert out.shape == (10, 10, 3)
    assert (out == 255).all()
    odd = transforms.center_crop(Image.fromarray(noise(7, 300)), size=16)
    assert odd.size == (16, 16)
    same = noise(16, 16)
    np.testing.assert_array_equal(transforms.center_crop(Image.fromarray(same), size=16), same)


def test_center_crop_halves_by_box_averages():
    image = noise(64, 64)
    boxes = image.astype(np.float64)
    for _ in range(2):
        boxes = boxes.reshape(boxes.shape[0] // 2, 2, boxes.shape[1] // 2, 2, 3).mean((1, 3))
    out = np.asarray(transforms.center_crop(Image.fromarray(image), size=16)).astype(float)
    assert np.abs(out - boxes).max() <= 2.5  # Pillow rounds after each of four passes


def test_box_has_the_area_and_the_ratio_asked_for():
    crop = transforms.RandomResizedCrop(8, scale=(0.2, 0.5), ratio=(0.5, 2.0))
    rng = np.random.default_rng(0)
    boxes = np.array([crop.box(40, 30, rng) for _ in range(500)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= 40 + 1e-9).all() and (boxes[:, 3] <= 30 + 1e-9).all()
    share = w * h / 1200
    assert 0.2 - 1e-9 <= share.min() < 0.22 and 0.48 < share.max() <= 0.5 + 1e-9
    assert 0.5 - 1e-9 <= (w / h).min() < 0.55 and 1.8 < (w / h).max() <= 2 + 1e-9


def test_crop_of_the_whole_image_is_the_image():
    image = Image.fromarray(noise())
    crop = transforms.RandomResizedCrop(16, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    np.testing.assert_array_equal(np.asarray(crop(image, np.random.default_rng(0))), noise())


def test_crop_shows_the_box_it_drew():
    crop = transforms.RandomResizedCrop(16, scale=(0.25, 0.25), ratio=(1.0, 1.0), interpolation="bilinear")
    left, top, right, bottom = crop.box(64, 64, np.random.default_rng(5))
    out = np.asarray(crop(Image.fromarray(ramp(64, 64)), np.random.default_rng(5))).astype(float)
    assert abs(out[..., 0].mean() - ((left + right) / 2 - 0.5) * 200 / 64) < 1.5
    assert abs(out[..., 1].mean() - ((top + bottom) / 2 - 0.5) * 200 / 64) < 1.5


def test_shift_repeats_the_edge():
    crop = transforms.RandomResizedCrop(16, scale=(1.0, 1.0), ratio=(1.0, 1.0), shift=0.4, interpolation="bilinear")
    outs = [np.asarray(crop(Image.fromarray(ramp()), np.random.default_rng(s))) for s in range(30)]
    assert len({out.tobytes() for out in outs}) > 25
    assert all(out[..., :2].max() <= ramp().max() and out[..., 2].max() == 0 for out in outs)  # no black or foreign filling
    means = np.array([out[..., 0].mean() for out in outs])
    assert means.min() < ramp()[..., 0].mean() - 20 and means.max() > ramp()[..., 0].mean() + 20
    pixels = noise(5, 7)
    np.testing.assert_array_equal(
        transforms._extend(Image.fromarray(pixels), 3, 2), np.pad(pixels, ((2, 2), (3, 3), (0, 0)), "edge")
    )


def luma(x):
    return x @ np.array([0.299, 0.587, 0.114])


def test_color_changes_match_their_formulas():
    image, x = Image.fromarray(noise()), noise().astype(np.float64)
    factor = 1.3  # strength 0.5, draw 0.8
    mean = luma(x).mean()
    for change, want in [
        (transforms._brightness, x * factor),
        (transforms._contrast, mean + factor * (x - mean)),
        (transforms._saturation, luma(x)[..., None] + factor * (x - luma(x)[..., None])),
    ]:
        out = np.asarray(change(image, 0.5, 0.8)).astype(float)
        assert np.abs(out - np.clip(want, 0, 255)).max() <= 2, change.__name__
    for draw, turn in [(1.0, 0.25), (0.5, 0.0), (0.0, -0.25)]:  # shares of the circle
        turned = np.asarray(transforms._hue(image, 0.25, draw)).astype(float)
        for before, after in zip(x.reshape(-1, 3)[:50], turned.reshape(-1, 3)):
            h, s, v = colorsys.rgb_to_hsv(*before / 255)
            want = 255 * np.array(colorsys.hsv_to_rgb((h + turn) % 1, s, v))
            assert np.abs(after - want).max() <= 8  # hue has 256 steps


def test_jitter_of_a_factor_of_one_changes_nothing():
    image = Image.fromarray(noise())
    for change in transforms._CHANGES[:3]:
        np.testing.assert_array_equal(change(image, 0.5, 0.5), noise())


@pytest.mark.parametrize(
    "transform",
    [
        transforms.Flip(0.0),
        transforms.ColorJitter(probability=0.0),
        transforms.ColorJitter(0, 0, 0, 0),
        transforms.Gray(0.0),
        transforms.Blur(0.0),
        transforms.Solarize(0.0),
    ],
)
def test_probability_zero_costs_nothing(transform):
    image = Image.fromarray(noise())
    assert transform(image, Silent()) is image


def test_flip_gray_solarize_blur():
    rng, x, image = np.random.default_rng(0), noise(), Image.fromarray(noise())
    np.testing.assert_array_equal(transforms.Flip(1.0)(image, rng), x[:, ::-1])
    gray = np.asarray(transforms.Gray(1.0)(image, rng)).astype(float)
    assert (gray == gray[..., :1]).all() and np.abs(gray[..., 0] - luma(x)).max() <= 1
    np.testing.assert_array_equal(transforms.Solarize(1.0, threshold=100)(image, rng), np.where(x < 100, x, 255 - x))
    blurred = np.asarray(transforms.Blur(1.0, sigma=(2.0, 2.0))(image, rng)).astype(float)
    assert blurred.std() < 0.5 * x.std() and abs(blurred.mean() - x.mean()) < 6
    flips = sum(transforms.Flip(0.25)(image, rng) is not image for _ in range(1000))
    assert 200 < flips < 300


def test_multi_crop_shapes_and_fields():
    record = {"image": noise(20, 24), "index": 3}
    crop = transforms.MultiCrop(global_size=16, local_crops=3, local_size=8)
    out = crop(record, np.random.default_rng(0))
    assert set(out) == {"global", "local", "index"} and out["index"] == 3 and set(record) == {"image", "index"}
    assert out["global"].shape == (2, 16, 16, 3) and out["local"].shape == (3, 8, 8, 3)
    assert out["global"].dtype == out["local"].dtype == np.uint8
    again = crop(record, np.random.default_rng(0))
    np.testing.assert_array_equal(out["global"], again["global"])
    np.testing.assert_array_equal(out["local"], again["local"])
    assert (out["global"][0] != out["global"][1]).any()
    assert (out["global"] != crop(record, np.random.default_rng(1))["global"]).any()
    assert "local" not in transforms.MultiCrop(global_size=16)(record, np.random.default_rng(0))


def test_multi_crop_gives_each_kind_of_crop_its_own_probabilities():
    whole = dict(global_scale=(1, 1), local_scale=(1, 1), ratio=(1, 1), local_size=16, local_crops=2, global_crops=3)
    record, x = {"image": noise()}, noise()
    inverted = np.where(x < 128, x, 255 - x)
    out = transforms.MultiCrop(global_size=16, **{**PLAIN, **whole, "solarize": (0, 1, 0)})(record, np.random.default_rng(0))
    for got, want in zip([*out["global"], *out["local"]], [x, inverted, inverted, x, x]):
        np.testing.assert_array_equal(got, want)
    out = transforms.MultiCrop(global_size=16, **{**PLAIN, **whole, "blur": (1, 0, 1)})(record, np.random.default_rng(0))
    assert [(crop == x).all() for crop in [*out["global"], *out["local"]]] == [False, True, True, False, False]


def test_on_image():
    record = {"image": noise(), "index": 1}
    assert transforms.OnImage(transforms.Flip(0.0))(record, Silent()) is record
    out = transforms.OnImage(transforms.Flip(1.0), transforms.Solarize(0.0))(record, np.random.default_rng(0))
    np.testing.assert_array_equal(out["image"], noise()[:, ::-1])
    with pytest.raises(ValueError, match="uint8"):
        transforms.OnImage(transforms.Flip(1.0))({"image": noise() / 255.0}, np.random.default_rng(0))


@pytest.mark.parametrize(
    "make",
    [
        lambda: transforms.RandomResizedCrop(8, scale=(0.5, 0.2)),
        lambda: transforms.RandomResizedCrop(8, interpolation="cubic"),
        lambda: transforms.ColorJitter(hue=0.7),
        lambda: transforms.MultiCrop(global_size=16, local_crops=2),
    ],
)
def test_nonsense_is_refused(make):
    with pytest.raises(UserError):
        make()


def test_lightness_adds_the_same_to_every_channel():
    image = Image.fromarray(np.full((2, 2, 3), (100, 120, 140), np.uint8))
    found = np.asarray(transforms.Lightness(0.2)(image, np.random.default_rng(0))).astype(int)
    moved = found - (100, 120, 140)
    assert len(np.unique(moved)) == 1 and 0 < abs(moved[0, 0, 0]) <= 51
    assert np.asarray(transforms.Lightness(1.0)(image, np.random.default_rng(1))).min() >= 0


def test_views_name_the_crops_of_each_kind():
    crop = {"global_size": 8, "local_crops": 1, "local_size": 4}
    views = transforms.Views({"b": transforms.MultiCrop(**crop), "a": transforms.MultiCrop(**crop)})
    record = views({"image": np.zeros((8, 8, 3), np.uint8), "index": 3}, np.random.default_rng(0))
    assert sorted(record) == ["a/global", "a/local", "b/global", "b/local", "index"]
    assert record["a/global"].shape == (2, 8, 8, 3)
