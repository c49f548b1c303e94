"""Changes of color and sharpness against plain formulas in float64."""

import colorsys
import functools

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dlc_jax.data import colors
from dlc_jax.errors import UserError


def noise(height=16, width=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


class Silent:
    """A generator that must not be asked."""

    def __getattr__(self, name):
        raise AssertionError("drew a random number")


def luma(x):
    return x @ np.array([0.299, 0.587, 0.114])


def changed(change, pixels, strength, draw):
    planes = colors._planes(pixels)
    change(planes, strength, draw)
    return np.moveaxis(planes, 0, -1)


def test_color_changes_match_their_formulas():
    x = noise().astype(np.float64)
    factor = 1.3  # strength 0.5, draw 0.8
    mean = luma(x).mean()
    for change, want in [
        (colors._brightness, x * factor),
        (colors._contrast, mean + factor * (x - mean)),
        (colors._saturation, luma(x)[..., None] + factor * (x - luma(x)[..., None])),
    ]:
        np.testing.assert_allclose(
            changed(change, noise(), 0.5, 0.8),
            np.clip(want, 0, 255),
            atol=1e-3,
            err_msg=change.__name__,
        )


@pytest.mark.parametrize("turn", [0.5, 0.25, 0.1, 0.0, -0.1, -0.37, -0.5])  # shares of the circle
def test_hue_is_that_of_hsv(turn):
    plain = [
        (0, 0, 0),
        (255, 255, 255),
        (77, 77, 77),
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (255, 255, 0),
        (0, 9, 9),
        (9, 0, 9),
    ]
    x = np.concatenate([plain, noise().reshape(-1, 3)]).astype(np.uint8)
    found = changed(colors._hue, x[None], abs(turn), 0.5 + np.sign(turn) / 2)[0]
    for before, after in zip(x / 255.0, found):
        h, s, v = colorsys.rgb_to_hsv(*before)
        np.testing.assert_allclose(
            after, 255 * np.array(colorsys.hsv_to_rgb((h + turn) % 1, s, v)), atol=1e-3
        )


def test_hue_of_an_image_of_several_strips():
    pixels = noise(70, 500)
    assert 70 * 500 > 2 * colors.STRIP
    rows = [changed(colors._hue, pixels[y : y + 1], 0.3, 0.9)[0] for y in range(70)]
    np.testing.assert_array_equal(changed(colors._hue, pixels, 0.3, 0.9), rows)


def test_jitter_rounds_once_and_a_factor_of_one_changes_nothing():
    class Middle:
        random = staticmethod(lambda n=None: 0.0 if n is None else np.full(n, 0.5))
        permutation = staticmethod(np.arange)

    np.testing.assert_array_equal(
        colors.ColorJitter(0.5, 0.5, 0.5, 0.5, probability=1.0)(noise(), Middle), noise()
    )
    x = np.full((2, 2, 3), 100, np.uint8)
    rng = np.random.default_rng(0)
    found = np.array(
        [colors.ColorJitter(0.4, 0, 0, 0, probability=1.0)(x, rng)[0, 0, 0] for _ in range(2000)]
    )
    assert 60 <= found.min() <= 61 and 139 <= found.max() <= 140
    share, _ = np.histogram(found, 8, (60, 140))
    assert (abs(share / 2000 - 1 / 8) < 0.03).all()


def test_jitter_takes_every_order():
    seen = set()

    def note(name):
        return lambda planes, strength, draw: order.append(name)

    jitter = colors.ColorJitter(probability=1.0)
    jitter.changes = [(note(k), strength) for k, (_, strength) in enumerate(jitter.changes)]
    for seed in range(300):
        order = []
        jitter(noise(4, 4), np.random.default_rng(seed))
        seen.add(tuple(order))
    assert len(seen) == 24


@pytest.mark.parametrize(
    "change",
    [
        colors.ColorJitter(probability=0.0),
        colors.ColorJitter(0, 0, 0, 0),
        colors.Lightness(0.0),
        colors.Gray(0.0),
        colors.Blur(0.0),
        colors.Solarize(0.0),
    ],
)
def test_probability_zero_costs_nothing(change):
    pixels = noise()
    assert change(pixels, Silent()) is pixels and change.probability == 0


@pytest.mark.parametrize(
    "make",
    [
        colors.ColorJitter,
        colors.Gray,
        functools.partial(colors.Blur, sigma=(1, 1)),
        colors.Solarize,
    ],
)
def test_probability_is_a_share_of_the_images(make):
    pixels, rng = noise(4, 4), np.random.default_rng(0)
    kept = sum(make(probability=0.25)(pixels, rng) is pixels for _ in range(2000))
    assert 1420 < kept < 1580


def test_gray_and_solarize():
    rng, x = np.random.default_rng(0), noise()
    gray = colors.Gray(1.0)(x, rng).astype(float)
    assert (gray == gray[..., :1]).all() and np.abs(gray[..., 0] - luma(x)).max() <= 0.501
    np.testing.assert_array_equal(
        colors.Solarize(1.0, threshold=100)(x, rng), np.where(x < 100, x, 255 - x)
    )


def test_lightness_adds_the_same_to_every_channel():
    pixels = np.full((2, 2, 3), (100, 120, 140), np.uint8)
    moved = colors.Lightness(0.2)(pixels, np.random.default_rng(0)).astype(int) - (100, 120, 140)
    assert len(np.unique(moved)) == 1 and 0 < abs(moved[0, 0, 0]) <= 51
    ends = [colors.Lightness(1.0)(pixels, np.random.default_rng(seed)) for seed in range(20)]
    assert min(x.min() for x in ends) == 0 and max(x.max() for x in ends) == 255


def nine_taps(x, sigma):
    """DINOv2's kernel of 9 taps, the image mirrored without its edge."""
    kernel = np.exp(-0.5 * (np.arange(-4, 5) / sigma) ** 2)
    kernel /= kernel.sum()
    height, width, _ = x.shape
    x = np.pad(x.astype(float), ((4, 4), (4, 4), (0, 0)), "reflect")
    x = sum(weight * x[k : k + height] for k, weight in enumerate(kernel))
    return sum(weight * x[:, k : k + width] for k, weight in enumerate(kernel))


@pytest.mark.parametrize("shape", [(40, 30), (9, 5), (3, 4), (1, 2)])
@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.5, 0.9, 1.4, 2.0])
def test_blur_is_the_kernel_of_nine_taps(sigma, shape):
    x = noise(*shape)
    error = colors.Blur(1.0, sigma=(sigma, sigma))(x, np.random.default_rng(0)) - nine_taps(
        x, sigma
    )
    assert np.abs(error).max() <= 2 and np.abs(error).mean() < 0.6


def test_taps_keep_the_brightness():
    for sigma in np.linspace(0.1, 2.0, 50):
        taps = colors._taps(sigma).astype(int)
        assert taps[0] + 2 * taps[1:].sum() == 256 and (np.diff(taps) <= 0).all() and len(taps) <= 5
    for value in (0, 1, 254, 255):
        flat = np.full((8, 8, 3), value, np.uint8)
        np.testing.assert_array_equal(
            colors.Blur(1.0, sigma=(2.0, 2.0))(flat, np.random.default_rng(0)), flat
        )


@pytest.mark.parametrize("sigma", [2.5, 5.0, 10.0])
def test_a_wide_blur_is_not_cut_short(sigma):
    step = np.zeros((4, 160, 3), np.uint8)
    step[:, 80:] = 255
    found = colors.Blur(1.0, sigma=(sigma, sigma))(step, np.random.default_rng(0))
    np.testing.assert_array_equal(
        found, Image.fromarray(step).filter(ImageFilter.GaussianBlur(sigma))
    )
    edge = np.diff(found[0, :, 0].astype(float)) / 255
    place = np.arange(159) - 79.0
    assert abs((edge * place).sum()) < 0.05
    assert abs(np.sqrt((edge * place**2).sum()) / sigma - 1) < 0.02


@pytest.mark.parametrize(
    "make",
    [
        lambda: colors.ColorJitter(hue=0.7),
        lambda: colors.Lightness(2.0),
        lambda: colors.Blur(1.0, sigma=(2.0, 1.0)),
    ],
)
def test_nonsense_is_refused(make):
    with pytest.raises(UserError):
        make()
