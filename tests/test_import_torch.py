"""dlc import torch: what dlc export torch wrote is a run again, byte for byte, and used as one."""

import json
import shutil

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy
from test_cli import refused
from test_codes_job import VAE
from test_export_torch import STEPS, TINY, export, latents, make

from dlc_jax import cli, pipeline, recipe, workdir
from dlc_jax.models.autoencoder import Autoencoder
from dlc_jax.models.tiny_autoencoder import TinyAutoencoder


def take(capsys, folder, out):
    assert cli.main(["import", "torch", str(folder), "--out", str(out)]) == 0, capsys.readouterr()
    return capsys.readouterr().out


def same(one, two):
    """Every file of two exported folders but what tells of the training: the card, the recipe."""
    names = [path.relative_to(one) for path in one.rglob("*") if path.is_file()]
    assert len(names) > 8
    assert names == [path.relative_to(two) for path in two.rglob("*") if path.is_file()]
    for name in names:
        if name.name not in ("model_card.md", "config.json", "run.json") or name.parent.name:
            assert (one / name).read_bytes() == (two / name).read_bytes(), name


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(a run, the folder that PyTorch loads of it)."""
    place = tmp_path_factory.mktemp("run") / "W"
    place.mkdir()
    lines = {"prior.model.sigma_conditioning": True, "prior.process.noise.schedule": "log_linear"}
    lines |= {"samples.sampler.times": "cosine", "samples.code_sampler.temperature": 0.7}
    make(place, lines)
    out = place.parent / "out"
    assert cli.main(["export", "torch", "-w", str(place), "--out", str(out)]) == 0
    return place, out


def test_a_run_comes_back(exported, tmp_path, capsys):
    """All files are the same when it is exported again, and it draws what the run drew."""
    place, folder = exported
    out = take(capsys, folder, tmp_path / "back")
    for verb in ("encode", "sample", "compose"):
        assert f"dlc {verb} -w {tmp_path / 'back'}" in out
    export(capsys, tmp_path / "back", tmp_path / "again")
    same(folder, tmp_path / "again")
    config, ours = recipe.of_run(tmp_path / "back"), recipe.of_run(place)
    assert config.samples.sampler == ours.samples.sampler
    assert config.samples.code_sampler == ours.samples.code_sampler
    images = np.random.default_rng(0).integers(256, size=(2, 16, 16, 3), dtype=np.uint8)
    found = []
    for run in (place, tmp_path / "back"):
        with pipeline.load(run, batch=8) as p:
            codes = p.encode(images)
            mixed = p.compose([codes[:1], codes[1:]], seed=1).codes
            found.append((codes, mixed, p.decode(mixed, seed=2), p.sample(2, seed=3)))
    for one, two in zip(*found, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_part_in_a_narrow_type(dtype, exported, tmp_path, capsys):
    flags = ("--dtype", dtype, "--steps", "prior")
    export(capsys, exported[0], tmp_path / "narrow", *flags)
    assert "nothing runs from it alone" in take(capsys, tmp_path / "narrow", tmp_path / "back")
    export(capsys, tmp_path / "back", tmp_path / "again", *flags)
    same(tmp_path / "narrow", tmp_path / "again")


def test_the_demo_is_a_run_again(tmp_path, capsys):
    """It is of float16, and the package has its code."""
    take(capsys, "demo", tmp_path / "back")
    export(capsys, tmp_path / "back", tmp_path / "again", "--dtype", "float16", "--no-code")
    same(workdir.DEMO, tmp_path / "again")


@pytest.mark.parametrize("name", ["tiny", "kl"])
def test_latents_come_back(name, tmp_path, capsys):
    """With what they were normalized by, to the last bit."""
    fields, kind = (TINY, TinyAutoencoder) if name == "tiny" else (VAE, Autoencoder)
    place, _ = latents(name, tmp_path, fields, kind(**fields))
    export(capsys, place, tmp_path / "out")
    take(capsys, tmp_path / "out", tmp_path / "back")
    (tmp_path / "vae").rename(tmp_path / "away")
    export(capsys, tmp_path / "back", tmp_path / "again")
    same(tmp_path / "out", tmp_path / "again")


def edited(change):
    """Of a config.json, by a function of what it holds."""

    def edit(path):
        found = json.loads(path.read_text())
        change(found)
        path.write_text(json.dumps(found))

    return edit


def tensors(change):
    def edit(path):
        found = safetensors_numpy.load_file(path)
        change(found)
        safetensors_numpy.save_file(found, path)

    return edit


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def overlapping(path):
    """Two tensors of the file lie in the same bytes."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    head = json.loads(raw[8 : 8 + size])
    one, two = [name for name in head if name.startswith("blocks.") and "qkv" in name][:2]
    head[two]["data_offsets"] = head[one]["data_offsets"]
    said = json.dumps(head).encode().ljust(size)
    path.write_bytes(raw[:8] + said + raw[8 + size :])


def index(path):
    """A shard that the index names is missing."""
    names = {name: "model-1.safetensors" for name in safetensors_numpy.load_file(path)}
    path.with_name("model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    path.unlink()


def pickled(path):
    path.unlink()
    path.with_name("pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")


def half(found):
    found["final.bias"] = found["final.bias"].astype(np.float16)


WEIGHTS, CONFIG = "prior/model.safetensors", "prior/config.json"
REFUSED = {
    "is damaged, or not a safetensors file": (WEIGHTS, cut),
    "not a safetensors file (SafetensorError": (WEIGHTS, overlapping),
    "1 of 1 shards are missing (model-1.safetensors)": (WEIGHTS, index),
    "is a pickle of more than tensors": (WEIGHTS, pickled),
    "final.weight is missing": (WEIGHTS, tensors(lambda found: found.pop("final.weight"))),
    "final.bias is float16, and others are float32": (WEIGHTS, tensors(half)),
    "more has no place in this model": (
        WEIGHTS,
        tensors(lambda found: found.update(more=np.ones(2, np.float32))),
    ),
    "prior/config.json cannot be read": (CONFIG, cut),
    "it is no JSON object": (CONFIG, lambda path: path.write_text("[]")),
    "lacks or misspells 'depth'": (CONFIG, edited(lambda found: found["model"].pop("depth"))),
    "blocks.2.norm1.weight is missing": (
        CONFIG,
        edited(lambda found: found["model"].update(depth=3)),
    ),
    "are no recipe: prior.model.width": (
        CONFIG,
        edited(lambda found: found["model"].update(width="x")),
    ),
    "prior/config.json: more is 1, and a run of it has None": (
        CONFIG,
        edited(lambda found: found.update(more=1)),
    ),
    "'uniform': PyTorch's code": (
        CONFIG,
        edited(lambda found: found["process"].update(name="uniform", noise={})),
    ),
    "config.json is not one that dlc export torch of this version wrote": (
        "config.json",
        edited(lambda found: found.pop("data")),
    ),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_is_not_of_an_export_is_refused(said, exported, tmp_path, capsys):
    """In one line, and nothing is left of the run."""
    if "pickle" in said:
        pytest.importorskip("torch")
    shutil.copytree(exported[1], tmp_path / "folder", ignore=shutil.ignore_patterns("*.py"))
    for part in set(STEPS) - {"prior"}:
        shutil.rmtree(tmp_path / "folder" / part)
    name, damage = REFUSED[said]
    damage(tmp_path / "folder" / name)
    flags = ("import", "torch", tmp_path / "folder", "--out", tmp_path / "run")
    assert said in refused(capsys, *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_places_that_are_none_in_one_line(exported, tmp_path, capsys):
    flags = ("import", "torch", exported[1], "--out", exported[0])
    assert "is there already" in refused(capsys, *flags)
    flags = ("--out", tmp_path / "run")
    assert "is not a folder" in refused(capsys, "import", "torch", tmp_path / "no", *flags)
    assert "has none of encoder" in refused(capsys, "import", "torch", tmp_path, *flags)
