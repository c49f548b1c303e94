"""configs/image_folder.py by its command: every kind of place trains, and real sets do too.

Equal images give equal codes.
"""

import io
import itertools
import json
import subprocess

import jax
import numpy as np
import pytest
from commands import train as train_command
from PIL import Image
from recipes import load
from test_images import KINDS, convert, write_folder

from dlc_jax import parallel, train
from dlc_jax.data.codes import CodeStore
from dlc_jax.errors import UserError
from dlc_jax.stage import Stage
from dlc_jax.stages import STAGES

STEPS = ("encoder", "codes", "probe", "prior", "generator", "samples")
COUNT = 96  # images that are made here
SHORT = (
    "--config.encoder.train.steps=3",
    "--config.encoder.train.validate_batches=1",
    "--config.steps=('encoder','codes','probe')",
)


def slow(test):
    """Slow, and far from its limit even where other work keeps the cores busy."""
    return pytest.mark.slow(pytest.mark.timeout(900)(test))


def run(workdir, path, *fields, variant="tiny"):
    """Runs the command; its output."""
    location = () if path is None else (f"--config.data.path={path}",)
    recipe = f"configs/image_folder.py:{variant}"
    return subprocess.run(**train_command(workdir, *location, *fields, recipe=recipe), timeout=600)


def trained(workdir, path, *fields, **options):
    """Results of a run that must succeed."""
    done = run(workdir, path, *fields, **options)
    assert done.returncode == 0, done.stderr
    return json.loads((workdir / "results.json").read_text())


def images():
    """{relative name: bytes} of COUNT images in three classes and two splits.

    Colored discs, of any size as photographs are.
    """
    rng = np.random.default_rng(0)
    found = {}
    for k in range(COUNT):
        height, width = rng.integers(30, 60, 2)
        y, x = np.mgrid[:height, :width]
        inside = (y - height / 2) ** 2 + (x - width / 2) ** 2 < (5 + 4 * (k % 3)) ** 2
        disc, ground = rng.integers(0, 256, 3), rng.integers(0, 256, 3)
        pixels = np.where(inside[..., None], disc, ground).astype(np.uint8)
        split = "val" if k % 4 == 3 else "train"
        found[f"{split}/{('ant', 'bee', 'cat')[k % 3]}/{k:02d}.png"] = encoded(pixels)
    return found


def encoded(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def of_folder(once):
    """A folder, the workdir of its short run, and that run's results."""

    def make(place):
        trained(place / "run", write_folder(place / "images", images()), *SHORT)

    place = once("of_folder", make)
    results = json.loads((place / "run" / "results.json").read_text())
    return place / "images", place / "run", results


@slow
def test_a_folder_trains_to_the_end(tmp_path):
    folder = write_folder(tmp_path / "images", images())
    results = trained(tmp_path / "run", folder)
    losses = ("prior/validation/loss", "generator/validation/loss")
    for key in ("probe/label", "probe_knn/label", "codes/perplexity", *losses):
        assert np.isfinite(results[key]), key
    counts = ("codes/train_count", "codes/validation_count", "probe/count")
    assert [results[key] for key in counts] == [72, 24, 24]
    for name in ("unconditional", "reconstruction", "composition", "composition_of_three"):
        picture = Image.open(tmp_path / "run" / "samples" / "pictures" / f"{name}.png")
        assert np.asarray(picture).std() > 5, name
    assert (tmp_path / "run" / "report.html").read_text().count("data:image/png;base64,") >= 5
    again = run(tmp_path / "run", folder)
    assert all(f"{step}: complete" in again.stdout for step in STEPS)
    moved = folder.rename(tmp_path / "elsewhere")  # the place may change, not what is in it
    assert run(tmp_path / "run", moved).returncode == 0
    sides = ("--config.data.image=64", "--config.generator.model.image=64")
    refused = run(tmp_path / "run", moved, *sides)
    assert refused.returncode == 2 and "data.image: 32 -> 64" in refused.stderr


@slow
@pytest.mark.parametrize("kind", ["zip", "tfds", "records"])
def test_other_kinds_of_places_train_to_the_same_codes(kind, of_folder, tmp_path):
    """Some by the command; test_images.py reads the same batches from all."""
    folder, other, expected = of_folder
    if kind == "records":
        path = convert(folder, tmp_path / "records")
    else:
        path = KINDS[kind](tmp_path, images())
    found = trained(tmp_path / "run", path, *SHORT)
    counts = ("codes/train_count", "codes/validation_count")
    for key in ("encoder/validation/loss", "probe/label", *counts):
        assert found[key] == expected[key], key
    for split in ("train", "validation"):
        codes = CodeStore(tmp_path / "run" / "codes" / split).codes()
        np.testing.assert_array_equal(codes, CodeStore(other / "codes" / split).codes())


@slow
def test_files_without_classes_train_without_a_probe(tmp_path):
    flat = {name.replace("/", "_"): data for name, data in images().items()}
    results = trained(tmp_path / "run", write_folder(tmp_path / "images", flat), *SHORT)
    assert results["codes/train_count"] + results["codes/validation_count"] == COUNT
    assert "probe/label" not in results


@slow
@pytest.mark.parametrize(
    "place, variant, counts",
    [
        ("cifar10_jpeg/cifar10_train50k_test5k.tar.xz", "tiny", (50_000, 5_000)),
        ("fashion_mnist", "28px,tiny", (60_000, 10_000)),
    ],
    ids=["cifar10", "fashion_mnist"],
)
def test_real_sets_train(place, variant, counts, shared_data, tmp_path):
    results = trained(tmp_path / "run", shared_data / place, *SHORT, variant=variant)
    assert (results["codes/train_count"], results["codes/validation_count"]) == counts
    assert results["probe/label"] > 0.2  # chance is 0.1; that of random weights is above 0.25


def test_without_a_path(tmp_path):
    done = run(tmp_path / "run", None)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "say where they are, --config.data.path=PATH" in done.stderr


def test_variants(tmp_path):
    def config(words):
        return load(f"image_folder.py:{words}", {"data.path": str(tmp_path)})

    usual = config("").encoder.train.steps
    for words, image, patch in (
        ("", 32, 8),
        ("28px", 28, 7),
        ("64px", 64, 8),
        ("tiny,64px", 64, 8),
    ):
        found = config(words)
        encoder, generator = found.encoder.model.backbone, found.generator.model
        crop = found.encoder.crops["all"].global_size
        assert {found.data.image, encoder.image, crop, generator.image} == {image}
        assert {encoder.patch, generator.patch} == {patch}
        assert found.encoder.train.steps == (24 if "tiny" in words else usual)
    long = config("28px,long")
    assert long.encoder.crops["all"].local_size == 14 and long.encoder.train.steps > usual
    models = (long.encoder.model.simplicial, long.prior.model, long.generator.model)
    assert {model.positions for model in models} == {64}
    assert config("long,tiny").encoder.train.steps == 24
    large = config("latent256")
    assert large.data.image == 256 and large.generator.latents
    assert large.codes.image == large.encoder.model.backbone.image == 224
    with pytest.raises(UserError, match="unknown variant 'large'"):
        config("large")


@slow
@pytest.mark.parametrize(
    "variant, step", list(itertools.product(("28px", "64px", "28px,long", "latent256"), STEPS))
)
def test_variants_lower(variant, step, tmp_path):
    config = load(f"image_folder.py:{variant}", {"data.path": str(tmp_path)})
    made = STAGES[config[step].stage](config, step=step, workdir=tmp_path)
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    if isinstance(made, Stage):
        lowered = [train.lower(made, mesh)]
    else:
        lowered = [each.lower(mesh) for each in made.programs.values()]
    assert all("dot_general" in each.as_text() for each in lowered)
