"""configs/image_folder.py by its command: every kind of place trains, equal images give equal codes, and real sets do too."""

import gzip
import io
import itertools
import json
import struct
import subprocess

import jax
import numpy as np
import pytest
from commands import train as train_command
from PIL import Image
from test_configs import ROOT, load
from test_images import KINDS, convert, write_folder

from dlc_jax import parallel, train
from dlc_jax.data.codes import CodeStore
from dlc_jax.stage import Stage
from dlc_jax.stages import STAGES

CONFIG = ROOT / "configs" / "image_folder.py"
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
    """{relative name: bytes} of COUNT images in three classes and two splits: colored discs, as photographs of any size."""
    rng = np.random.default_rng(0)
    found = {}
    for k in range(COUNT):
        height, width = rng.integers(30, 60, 2)
        y, x = np.mgrid[:height, :width]
        inside = (y - height / 2) ** 2 + (x - width / 2) ** 2 < (5 + 4 * (k % 3)) ** 2
        pixels = np.where(inside[..., None], rng.integers(0, 256, 3), rng.integers(0, 256, 3)).astype(np.uint8)
        split = "val" if k % 4 == 3 else "train"
        found[f"{split}/{('ant', 'bee', 'cat')[k % 3]}/{k:02d}.png"] = encoded(pixels)
    return found


def encoded(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_idx(place):
    """A pair of IDX files for each split, as Fashion-MNIST has them; its folder."""
    place.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (COUNT, 28, 28), np.uint8)
    for name, part in (("train", pixels[:64]), ("t10k", pixels[64:])):
        with gzip.open(place / f"{name}-images-idx3-ubyte.gz", "wb") as file:
            file.write(struct.pack(">IIII", 0x803, len(part), 28, 28) + part.tobytes())
        with gzip.open(place / f"{name}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(struct.pack(">II", 0x801, len(part)) + bytes(k % 10 for k in range(len(part))))
    return place


@pytest.fixture(scope="session")
def of_folder(once):
    """A folder, the workdir of its short run, and that run's results."""
    place = once("of_folder", lambda place: trained(place / "run", write_folder(place / "images", images()), *SHORT))
    return place / "images", place / "run", json.loads((place / "run" / "results.json").read_text())


@slow
def test_a_folder_trains_to_the_end(tmp_path):
    folder = write_folder(tmp_path / "images", images())
    results = trained(tmp_path / "run", folder)
    for key in ("probe/label", "probe_knn/label", "codes/perplexity", "prior/validation/loss", "generator/validation/loss"):
        assert np.isfinite(results[key]), key
    assert (results["codes/train_count"], results["codes/validation_count"], results["probe/count"]) == (72, 24, 24)
    for name in ("unconditional", "reconstruction", "composition", "composition_of_three"):
        assert np.asarray(Image.open(tmp_path / "run" / "samples" / "pictures" / f"{name}.png")).std() > 5, name
    assert (tmp_path / "run" / "report.html").read_text().count("data:image/png;base64,") >= 5
    again = run(tmp_path / "run", folder)
    assert all(f"{step}: complete" in again.stdout for step in STEPS)
    moved = folder.rename(tmp_path / "elsewhere")  # where the images are may change, what they are may not
    assert run(tmp_path / "run", moved).returncode == 0
    refused = run(tmp_path / "run", moved, "--config.data.image=64")
    assert refused.returncode == 2 and "data.image: 32 -> 64" in refused.stderr


@slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "folder"] + ["records"])
def test_every_kind_of_place_trains_to_the_same_codes(kind, of_folder, tmp_path):
    folder, other, expected = of_folder
    path = convert(folder, tmp_path / "records") if kind == "records" else KINDS[kind](tmp_path, images())
    found = trained(tmp_path / "run", path, *SHORT)
    for key in ("encoder/validation/loss", "probe/label", "codes/train_count", "codes/validation_count"):
        assert found[key] == expected[key], key
    for split in ("train", "validation"):
        codes = CodeStore(tmp_path / "run" / "codes" / split).codes()
        np.testing.assert_array_equal(codes, CodeStore(other / "codes" / split).codes())


@slow
def test_idx_files_train(tmp_path):
    results = trained(tmp_path / "run", write_idx(tmp_path / "idx"), *SHORT, variant="28px,tiny")
    assert (results["codes/train_count"], results["codes/validation_count"]) == (64, 32) and "probe/label" in results


@slow
def test_files_without_classes_train_without_a_probe(tmp_path):
    folder = write_folder(tmp_path / "images", {name.replace("/", "_"): data for name, data in images().items()})
    results = trained(tmp_path / "run", folder, *SHORT)
    assert results["codes/train_count"] + results["codes/validation_count"] == COUNT and "probe/label" not in results


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


def test_variants():
    for word, image, patch in (("", 32, 8), ("28px", 28, 7), ("64px", 64, 8), ("tiny,64px", 64, 8)):
        config = load(CONFIG, word)
        sides = (
            config.data.image,
            config.encoder.model.image,
            config.encoder.crops["all"].global_size,
            config.generator.model.image,
        )
        assert set(sides) == {image} and {config.encoder.model.patch, config.generator.model.patch} == {patch}
        assert config.encoder.train.steps == (24 if "tiny" in word else load(CONFIG).encoder.train.steps)
    long = load(CONFIG, "28px,long")
    assert long.encoder.crops["all"].local_size == 14 and long.encoder.train.steps > load(CONFIG).encoder.train.steps
    assert {long[name].model.positions for name in ("encoder", "prior", "generator")} == {64}
    assert load(CONFIG, "long,tiny").encoder.train.steps == 24
    large = load(CONFIG, "latent256")
    assert large.data.image == 256 and large.generator.latents and large.codes.view.image == large.encoder.model.image == 224
    for wrong in ("28px,64px", "latent256,tiny", "32px,latent256", "long,latent256"):
        with pytest.raises(
            ValueError, match="does not go together: one of 28px, 32px, 64px, latent256; tiny and long with the first three"
        ):
            load(CONFIG, wrong)
    with pytest.raises(ValueError, match="unknown variant 'large'"):
        load(CONFIG, "large")


@slow
@pytest.mark.parametrize("variant, step", list(itertools.product(("28px", "64px", "28px,long", "latent256"), STEPS)))
def test_variants_lower(variant, step, tmp_path):
    config = load(CONFIG, variant)
    made = STAGES[config[step].stage](config, step=step, workdir=tmp_path)
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    lowered = [train.lower(made, mesh)] if isinstance(made, Stage) else [each.lower(mesh) for each in made.programs.values()]
    assert all("dot_general" in each.as_text() for each in lowered)


@slow
def test_the_encoder_of_latent256_trains_at_reduced_size(of_folder, tmp_path):
    fields = {"model.width": 64, "model.depth": 2, "model.heads": 2, "model.hidden": 64, "model.prototypes": 64}
    fields |= {"model.positions": 16, "train.batch": 4}
    fields |= {f"objective.{group}_group": 4 for group in ("koleo", "mask", "drop_path")}
    fields |= {"train.steps": 2, "train.validate_batches": 1}
    smaller = [f"--config.encoder.{name}={value}" for name, value in fields.items()]
    alike = [f"--config.{step}.model.positions=16" for step in ("prior", "generator")]
    steps = ("--config.steps=('encoder','codes')", "--config.codes.batch=32", "--config.codes.autoencoder=")
    results = trained(tmp_path / "run", of_folder[0], *smaller, *alike, *steps, variant="latent256")
    assert results["codes/train_count"] == 72 and np.isfinite(results["encoder/validation/loss"])
