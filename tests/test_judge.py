"""The judge: exact against brute force, and its proof on small samples."""

import numpy as np
import pytest

from dlc_jax.data import counterexamples, shapes, sources
from dlc_jax.data import judge as judging
from dlc_jax.errors import UserError


@pytest.fixture(scope="module")
def judge():
    return judging.Judge(image=16)


def real(count, **arguments):
    factors, nuisances = shapes.draw(
        np.arange(count), **{"split": "held_out", "seed": 7, **arguments}
    )
    return shapes.render(factors, nuisances), factors, nuisances


@pytest.mark.parametrize(
    ("image", "positions", "count"), [(16, False, 150), (16, True, 60), (32, False, 60)]
)
def test_proof(image, positions, count):
    result = judging.Judge(image=image, positions=positions).proof(count)
    names = list(shapes.NAMES)[: 5 if positions else 4]
    assert {f"told_{name}" for name in names} < set(result)
    for name, value in result.items():
        floor = 0.99 if name.startswith("read_") else 0.95
        assert value >= floor, (name, value)


def test_threshold_lies_between_real_and_bad():
    found = judging.calibration(image=16, count=250)
    assert found["real_99"] < 0.003
    assert found["threshold"] == min(
        found[f"{kind}_1"] for kind in ("blank", "blur", "noise", "mixture", "halves")
    )
    assert abs(found["threshold"] - judging.THRESHOLD[16]) < 0.005


def test_distance_is_the_root_mean_square_to_a_rendering(judge):
    images, factors, _ = real(60)
    reading = judge.read(images)
    np.testing.assert_array_equal(reading.factors, factors)
    assert reading.distance.max() < 0.5 / 255 + 1e-4  # half a level of 8 bits, no more
    assert reading.valid.all()
    # Noise of a known size is far from every rendering by just that size.
    random = np.random.default_rng(0)
    noisy = np.clip(np.round(images + random.choice([-20, 20], images.shape)), 0, 255).astype(
        np.uint8
    )
    off = np.sqrt(np.square((noisy - images.astype(np.float64)) / 255).mean(axis=(1, 2, 3)))
    np.testing.assert_allclose(judge.read(noisy).distance, off, rtol=0.05)


def test_nearest_is_the_nearest_of_the_whole_grid(judge):
    images, _, _ = real(3)
    noise = np.random.default_rng(0).integers(0, 256, images.shape, np.uint8)
    pixels = np.float32(np.concatenate([images, noise]).reshape(6, -1, 3)) / 255
    bank = judging._Bank(judge._bank.masks[::13])
    products = bank.products(pixels)
    for pair in (0, 5, 14, 23):
        square, mask, hue = bank.nearest(pixels, np.full(6, pair), products=products)
        below = shapes.BACKGROUNDS[pair % 4]
        brute = np.full(6, np.inf)
        for degrees in np.linspace(-shapes.HUE, shapes.HUE, 41):
            above = shapes.paint([pair // 4], [degrees])[0]
            painted = below + bank.masks[:, :, None] * (above - below)  # [k, pixels, c]
            flat = np.float32(painted.reshape(len(painted), -1))
            x = pixels.reshape(6, -1)
            brute = np.minimum(
                brute,
                (np.square(x).sum(1)[:, None] - 2 * x @ flat.T + np.square(flat).sum(1)).min(
                    axis=1
                ),
            )
        np.testing.assert_allclose(square, brute, rtol=2e-3, atol=2e-2)
        above = shapes.paint(np.full(6, pair // 4), hue)
        painted = below + bank.masks[mask][:, :, None] * (above - below)[:, None]
        np.testing.assert_allclose(
            square, np.square(painted - pixels).sum(axis=(1, 2)), rtol=1e-3, atol=1e-2
        )


def test_no_rendering_of_the_grid_is_nearer_than_the_reading(judge):
    images, factors, _ = real(60)
    images = np.concatenate([images, *counterexamples.bad(images, factors, seed=0).values()])
    pixels = np.float32(images.reshape(len(images), -1, 3)) / 255
    products = judge._bank.products(pixels)
    square = [
        judge._bank.nearest(pixels, np.full(len(images), pair), products=products)[0]
        for pair in range(24)
    ]
    excess = judge.read(images).distance - np.sqrt(np.min(square, axis=0) / (3 * 256))
    # A few bad images lose their pair.
    assert np.quantile(excess, 0.99) < 1e-4 and excess.max() < 0.01


def test_reading_does_not_depend_on_the_company(judge):
    images, _, _ = real(70)
    whole, part = judge.read(images), judge.read(images[60:])
    np.testing.assert_array_equal(whole.factors[60:], part.factors)
    np.testing.assert_allclose(whole.distance[60:], part.distance, atol=1e-5)
    assert len(judge.read(images[:0]).valid) == 0


def test_bad_images_are_bad():
    images, factors, _ = real(120)
    made = counterexamples.bad(images, factors, seed=0)
    assert all(x.shape == images.shape and x.dtype == np.uint8 for x in made.values())
    assert (np.ptp(made["blank"], axis=(1, 2)) == 0).all()
    np.testing.assert_allclose(
        made["blur"].mean(axis=(0, 1, 2)), images.mean(axis=(0, 1, 2)), atol=2
    )
    partner = counterexamples._partners(factors, np.random.default_rng(0))
    assert (factors[partner] != factors).all()


def test_wrong_input(judge):
    with pytest.raises(UserError, match="threshold"):
        judging.Judge(image=24)
    for wrong in (np.zeros((1, 32, 32, 3), np.uint8), np.zeros((1, 16, 16, 3), np.float32)):
        with pytest.raises(ValueError, match="reads uint8"):
            judge.read(wrong)


def test_the_judge_comes_with_its_data_set():
    found = sources.judge("shapes", image=16, count=9, seed=3, positions=True)
    assert found.image == 16 and found.positions and found.held_out == shapes.HELD_OUT
    assert not sources.judge("shapes").positions
    assert sources.judge("images", path="anywhere", image=16) is None
    with pytest.raises(UserError, match="threshold"):
        sources.judge("shapes", image=24)
