"""Random crops: boxes, what is cut from them, and how image files are decoded for them."""

import io

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from dlc_jax.data import colors, inputs, sources, transforms
from dlc_jax.data.decoder import Picture, decode_image
from dlc_jax.data.loader import batches
from dlc_jax.errors import UserError

PLAIN = dict(
    flip=0.0,
    jitter_probability=0.0,
    gray=0.0,
    blur=(0, 0, 0),
    blur_quirk=False,
    solarize=(0, 0, 0),
)


def noise(height=16, width=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def scene(height, width, seed=0):
    """Large and small patches of color: with edges, but not noise, of which JPEG keeps little."""
    made = np.zeros((height, width, 3))
    for side in (4, 16, 64):
        patches = Image.fromarray(noise(-(-height // side), -(-width // side), seed))
        made += np.asarray(patches.resize((width, height), Image.Resampling.BICUBIC), float) / 3
    return made.astype(np.uint8)


def encode(pixels, format="JPEG", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(
        file, format, **({"quality": 90} | options if format == "JPEG" else options)
    )
    return file.getvalue()


def ramp(height=16, width=16):
    """Red grows with x, green with y: a crop's pixels tell where it was cut."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 200 // width, y * 200 // height, 0 * x], -1).astype(np.uint8)


def test_box_has_the_area_and_the_ratio_asked_for():
    crop = transforms.RandomResizedCrop(8, scale=(0.2, 0.5), ratio=(0.5, 2.0))
    rng = np.random.default_rng(0)
    boxes = np.array([crop.box(40, 30, rng) for _ in range(500)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= 40 + 1e-9).all()
    assert (boxes[:, 3] <= 30 + 1e-9).all()
    share = w * h / 1200
    assert 0.2 - 1e-9 <= share.min() < 0.22 and 0.48 < share.max() <= 0.5 + 1e-9
    assert 0.5 - 1e-9 <= (w / h).min() < 0.55 and 1.8 < (w / h).max() <= 2 + 1e-9


def test_area_is_uniform_ratio_log_uniform_and_place_and_shift_uniform():
    crop = transforms.RandomResizedCrop(8, scale=(0.1, 0.4), ratio=(0.5, 2.0))
    rng = np.random.default_rng(0)
    # All of them fit, so that none is drawn again.
    left, top, right, bottom = np.array([crop.box(40, 40, rng) for _ in range(4000)]).T
    w, h = right - left, bottom - top
    drawn = [(w * h / 1600 - 0.1) / 0.3, (np.log2(w / h) + 1) / 2, left / (40 - w), top / (40 - h)]
    whole = transforms.RandomResizedCrop(8, scale=(1.0, 1.0), ratio=(1.0, 1.0), shift=0.4)
    shift = np.array([whole.box(40, 40, rng)[:2] for _ in range(4000)]).T
    drawn += list((shift / 40 + 0.4) / 0.8)
    shares = np.array([0.1, 0.25, 0.5, 0.75, 0.9])
    np.testing.assert_allclose(np.quantile(drawn, shares, axis=1).T, [shares] * 6, atol=0.032)
    np.testing.assert_allclose(np.corrcoef(drawn), np.eye(6), atol=0.065)  # four deviations


def test_crop_of_the_whole_image_is_the_image():
    image = Image.fromarray(noise())
    crop = transforms.RandomResizedCrop(16, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    np.testing.assert_array_equal(np.asarray(crop(image, np.random.default_rng(0))), noise())


def test_crop_shows_the_box_it_drew():
    crop = transforms.RandomResizedCrop(
        16, scale=(0.25, 0.25), ratio=(1.0, 1.0), interpolation="bilinear"
    )
    left, top, right, bottom = crop.box(64, 64, np.random.default_rng(5))
    out = np.asarray(crop(Image.fromarray(ramp(64, 64)), np.random.default_rng(5))).astype(float)
    assert abs(out[..., 0].mean() - ((left + right) / 2 - 0.5) * 200 / 64) < 1.5
    assert abs(out[..., 1].mean() - ((top + bottom) / 2 - 0.5) * 200 / 64) < 1.5


def test_shift_repeats_the_edge():
    crop = transforms.RandomResizedCrop(
        16, scale=(1.0, 1.0), ratio=(1.0, 1.0), shift=0.4, interpolation="bilinear"
    )
    outs = [np.asarray(crop(Image.fromarray(ramp()), np.random.default_rng(s))) for s in range(30)]
    assert len({out.tobytes() for out in outs}) > 25
    # No black or foreign filling.
    assert all(out[..., :2].max() <= ramp().max() and out[..., 2].max() == 0 for out in outs)
    means = np.array([out[..., 0].mean() for out in outs])
    assert means.min() < ramp()[..., 0].mean() - 20 and means.max() > ramp()[..., 0].mean() + 20
    pixels = noise(5, 7)
    np.testing.assert_array_equal(
        transforms._extend(Image.fromarray(pixels), 3, 2),
        np.pad(pixels, ((2, 2), (3, 3), (0, 0)), "edge"),
    )


def test_extreme_images_have_boxes_of_the_ratio_asked_for():
    """torchvision's rule: what does not fit after ten draws becomes the largest box of an allowed
    ratio, in the center.
    """
    crop = transforms.RandomResizedCrop(8, scale=(0.3, 1.0), ratio=(3 / 4, 4 / 3))
    rng = np.random.default_rng(0)
    assert crop.box(3200, 100, rng) == pytest.approx((1600 - 200 / 3, 0, 1600 + 200 / 3, 100))
    assert crop.box(100, 3200, rng) == pytest.approx((0, 1600 - 200 / 3, 100, 1600 + 200 / 3))
    whole = transforms.RandomResizedCrop(8, scale=(1.0, 1.0), ratio=(1.25, 1.3))
    assert whole.box(90, 100, rng) == pytest.approx((0, 14, 90, 86))
    for width, height in [(4, 4), (4, 128), (128, 4), (5, 7), (333, 41)]:
        for kind in (crop, transforms.RandomResizedCrop(8, scale=(0.05, 0.32))):
            for _ in range(200):
                left, top, right, bottom = kind.box(width, height, rng)
                assert left >= 0 and top >= 0 and right <= width + 1e-9 and bottom <= height + 1e-9
                assert 3 / 4 - 1e-9 <= (right - left) / (bottom - top) <= 4 / 3 + 1e-9
            assert kind(Image.fromarray(noise(height, width)), rng).size == (8, 8)


@pytest.mark.parametrize("interpolation, support", [("bilinear", 1), ("bicubic", 2)])
def test_filters_are_the_antialiased_ones_of_torch(interpolation, support):
    """Written from their definition: a = -0.5, widened by the reduction, weights normalized, edges
    of the image left out.
    """

    def weigh(x):
        x = np.abs(x)
        if support == 1:
            return np.clip(1 - x, 0, None)
        return np.where(
            x < 1,
            1.5 * x**3 - 2.5 * x**2 + 1,
            np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0.0),
        )

    def matrix(length, size, low, high):
        scale = (high - low) / size
        centers = low + (np.arange(size) + 0.5) * scale
        weights = weigh((np.arange(length) + 0.5 - centers[:, None]) / max(scale, 1.0))
        return weights / weights.sum(1, keepdims=True)

    x = noise(40, 50) // 2 + 64  # Pillow cuts off and rounds between the two directions
    for box in [(3.3, 5.1, 44.2, 38.7), (10.25, 8.5, 22.0, 19.75)]:  # made smaller, and larger
        left, top, right, bottom = box
        across, down = matrix(50, 16, left, right), matrix(40, 16, top, bottom)
        want = np.einsum("yr,rsc,xs->yxc", down, x.astype(float), across)
        found = transforms.RandomResizedCrop(16, interpolation=interpolation).cut(
            Image.fromarray(x), box
        )
        assert np.abs(np.asarray(found) - want).max() < 1.5


def test_flip_mirrors_with_its_probability():
    image, rng = Image.fromarray(noise()), np.random.default_rng(0)
    np.testing.assert_array_equal(transforms.Flip(1.0)(image, rng), noise()[:, ::-1])
    assert 200 < sum(transforms.Flip(0.25)(image, rng) is not image for _ in range(1000)) < 300
    assert transforms.Flip(0.0)(image, None) is image


def test_multi_crop_shapes_and_fields():
    record = {"image": noise(20, 24), "index": 3}
    crop = transforms.MultiCrop(global_size=16, local_crops=3, local_size=8)
    out = crop(record, np.random.default_rng(0))
    assert set(out) == {"global", "local", "index"} and out["index"] == 3
    assert set(record) == {"image", "index"}
    assert out["global"].shape == (2, 16, 16, 3) and out["local"].shape == (3, 8, 8, 3)
    assert out["global"].dtype == out["local"].dtype == np.uint8
    again = crop(record, np.random.default_rng(0))
    np.testing.assert_array_equal(out["global"], again["global"])
    np.testing.assert_array_equal(out["local"], again["local"])
    assert (out["global"][0] != out["global"][1]).any()
    assert (out["global"] != crop(record, np.random.default_rng(1))["global"]).any()
    alone = transforms.MultiCrop(global_size=16, local_crops=0)
    assert "local" not in alone(record, np.random.default_rng(0))


def test_multi_crop_gives_each_kind_of_crop_its_own_probabilities():
    whole = dict(
        global_scale=(1, 1),
        local_scale=(1, 1),
        ratio=(1, 1),
        local_size=16,
        local_crops=2,
        global_crops=3,
    )
    record, x = {"image": noise()}, noise()
    inverted = np.where(x < 128, x, 255 - x)
    out = transforms.MultiCrop(global_size=16, **{**PLAIN, **whole, "solarize": (0, 1, 0)})(
        record, np.random.default_rng(0)
    )
    for got, want in zip([*out["global"], *out["local"]], [x, inverted, inverted, x, x]):
        np.testing.assert_array_equal(got, want)
    out = transforms.MultiCrop(global_size=16, **{**PLAIN, **whole, "blur": (1, 0, 1)})(
        record, np.random.default_rng(0)
    )
    assert [(crop == x).all() for crop in [*out["global"], *out["local"]]] == [
        False,
        True,
        True,
        False,
        False,
    ]


def test_a_crop_is_flipped_jittered_grayed_blurred_and_solarized_in_that_order():
    always = dict(
        flip=1.0,
        jitter_probability=1.0,
        gray=1.0,
        blur=(1.0,) * 3,
        blur_quirk=False,
        solarize=(1.0,) * 3,
    )
    crop = transforms.MultiCrop(
        global_size=16, global_crops=1, local_crops=1, local_size=8, **always
    )
    found, rng = crop({"image": noise(40, 40)}, np.random.default_rng(0)), np.random.default_rng(0)
    boxes = crop.boxes(40, 40, rng)
    steps = (
        colors.ColorJitter(0.4, 0.4, 0.2, 0.1, probability=1.0),
        colors.Gray(1.0),
        colors.Blur(1.0),
        colors.Solarize(1.0),
    )
    for name, size in (("global", 16), ("local", 8)):
        cut = transforms.RandomResizedCrop(size).cut(Image.fromarray(noise(40, 40)), boxes[name][0])
        pixels = np.asarray(transforms.Flip(1.0)(cut, rng))
        for step in steps:
            pixels = step(pixels, rng)
        np.testing.assert_array_equal(found[name][0], pixels)


def test_blur_quirk_takes_one_minus_the_probabilities():
    record = {"image": noise(40, 40)}
    sizes = dict(global_size=16, local_crops=2, local_size=8)
    one = transforms.MultiCrop(**sizes, blur=(1.0, 0.1, 0.5), blur_quirk=True)
    two = transforms.MultiCrop(**sizes, blur=(0.0, 0.9, 0.5), blur_quirk=False)
    for seed in range(5):
        a, b = (crop(record, np.random.default_rng(seed)) for crop in (one, two))
        np.testing.assert_array_equal(a["global"], b["global"])
        np.testing.assert_array_equal(a["local"], b["local"])


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_files_give_the_crops_of_their_pixels(format):
    """Bit for bit, where boxes are too small for a coarser decoding."""
    data = encode(scene(60, 80), format)
    crop = transforms.MultiCrop(global_size=48, local_crops=3, local_size=32)
    for seed in range(5):
        want = crop({"image": decode_image(data)}, np.random.default_rng(seed))
        found = crop({"image": data}, np.random.default_rng(seed))
        np.testing.assert_array_equal(found["global"], want["global"])
        np.testing.assert_array_equal(found["local"], want["local"])


def test_no_crop_is_enlarged_by_a_coarse_decoding():
    crop = transforms.MultiCrop(global_size=24, local_crops=2, local_size=10)
    rng, seen = np.random.default_rng(0), set()
    for _ in range(300):
        width, height = rng.integers(16, 900, 2).tolist()
        boxes = crop.boxes(width, height, rng)
        shrink = crop.shrink(boxes)
        sides = [
            min(right - left, bottom - top) / size
            for name, size in (("global", 24), ("local", 10))
            for left, top, right, bottom in boxes[name]
        ]
        assert shrink == 1 or min(sides) >= shrink
        assert shrink == 8 or min(sides) < 2 * shrink  # and none coarser would do
        seen.add(shrink)
    assert seen == {1, 2, 4, 8}


@pytest.mark.parametrize("shrink", [2, 4, 8])
def test_crops_of_a_coarse_decoding_are_those_of_the_full_one(shrink):
    """PSNR of 30 dB; boxes that are off by one coarse pixel have 10 dB less."""
    # Sides that nothing divides: the decoder completes the last row and column.
    data = encode(scene(515, 773), "JPEG")
    crop = transforms.MultiCrop(
        global_size=24,
        global_crops=4,
        local_crops=0,
        global_scale=(0.3, 0.3),
        ratio=(1.0, 1.0),
        **PLAIN,
    )
    boxes = crop.boxes(773, 515, np.random.default_rng(0))["global"]
    (coarse, scale), (full, _) = Picture(data).decode(shrink), Picture(data).decode()
    assert scale == shrink

    def crops(image, boxes):
        return crop.cut(image, {"global": boxes}, None)["global"].astype(float)

    def psnr(a, b):
        return 10 * np.log10(255**2 / ((a - b) ** 2).mean())

    found = crops(coarse, [[edge / shrink for edge in box] for box in boxes])
    assert psnr(found, crops(full, boxes)) > 30
    off = [[edge / shrink + 1 for edge in box] for box in boxes]
    assert psnr(crops(coarse, off), crops(full, boxes)) < psnr(found, crops(full, boxes)) - (
        10 if shrink == 8 else 3
    )


def test_a_file_is_decoded_once_for_all_kinds_of_crops(monkeypatch):
    decoded = []
    prepare = JpegImagePlugin.JpegImageFile.load_prepare
    monkeypatch.setattr(
        JpegImagePlugin.JpegImageFile,
        "load_prepare",
        lambda file: decoded.append(file.size) or prepare(file),
    )
    kinds = {
        name: transforms.MultiCrop(global_size=size, local_crops=0)
        for name, size in (("a", 24), ("b", 96), ("c", 48))
    }
    transforms.Views(kinds)({"image": encode(scene(400, 600))}, np.random.default_rng(0))
    assert decoded == [(300, 200)]


class Files:
    """24 JPEGs of different sizes, the fifth damaged."""

    def __init__(self):
        self.files = [encode(scene(60 + 7 * k, 90 + 5 * k, k)) for k in range(24)]
        self.files[5] = self.files[5][:-900]

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return {"image": self.files[index], "index": index}


def drawn(source, *, threads=0, processes=1, first=0):
    crops = transforms.Views(
        {"all": transforms.MultiCrop(global_size=16, local_crops=2, local_size=8)}
    )
    parts = []
    for process in range(processes):
        iterator = batches(
            source,
            batch=8,
            seed=3,
            transform=crops,
            threads=threads,
            rows=np.array_split(np.arange(8), processes)[process],
        )
        iterator.set_state({"global_next_index": 8 * first})
        parts.append([next(iterator) for _ in range(3)])
        iterator.close()
    return [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*parts)
    ]


def test_crops_depend_on_the_index_alone():
    """Not on threads, processes or restarts; a damaged file is replaced although it is only decoded
    here.
    """
    source = sources.Resilient(Files())
    want = drawn(source)
    assert set(source.bad) == {5} and "truncated" in source.bad[5]
    for options in (
        dict(threads=1),
        dict(threads=3),
        dict(processes=2),
        dict(processes=4, threads=2),
    ):
        for found, same in zip(drawn(source, **options), want, strict=True):
            assert found.keys() == same.keys()
            for name in same:
                np.testing.assert_array_equal(found[name], same[name])
    (later, *_), (_, second, _) = drawn(source, first=1), want
    np.testing.assert_array_equal(later["all/local"], second["all/local"])


@pytest.mark.parametrize(
    "make",
    [
        lambda: transforms.RandomResizedCrop(8, scale=(0.5, 0.2)),
        lambda: transforms.RandomResizedCrop(8, interpolation="cubic"),
        lambda: transforms.MultiCrop(global_size=16, local_crops=2, local_size=0),
    ],
)
def test_nonsense_is_refused(make):
    with pytest.raises(UserError):
        make()


def test_views_name_the_crops_of_each_kind():
    crop = {"global_size": 8, "local_crops": 1, "local_size": 4}
    views = transforms.Views({"b": transforms.MultiCrop(**crop), "a": transforms.MultiCrop(**crop)})
    record = views({"image": np.zeros((8, 8, 3), np.uint8), "index": 3}, np.random.default_rng(0))
    assert sorted(record) == ["a/global", "a/local", "b/global", "b/local", "index"]
    assert record["a/global"].shape == (2, 8, 8, 3)


@pytest.mark.parametrize("shape", [(16, 16), (48, 40), (20, 64)])
def test_views_have_the_image_itself_as_encoders_take_it(shape):
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    crop = transforms.MultiCrop(global_size=16, local_crops=0)
    views = transforms.Views({"a": crop}, plain=16)
    record = views({"image": image}, np.random.default_rng(0))
    np.testing.assert_array_equal(record["plain"], inputs.fit([image], size=16)[0])
    crops = transforms.Views({"a": crop})({"image": image}, np.random.default_rng(0))
    np.testing.assert_array_equal(record["a/global"], crops["a/global"])
