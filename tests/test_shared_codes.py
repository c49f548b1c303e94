"""One code store feeds many runs: by `path`, checked against the model, the data, and what was read before. And grids on the way."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image
from test_configs import ROOT, load

from dlc_jax import parallel
from dlc_jax.data import code_writer, codes, sources
from dlc_jax.errors import UserError
from dlc_jax.stages import STAGES
from dlc_jax.step import make_init

POSITIONS, VALUES = 36, 16


def write(directory, config, *, identity="the encoder", seed=0, positions=POSITIONS):
    """A store of random codes, as a codes job leaves it."""

    def encode(start, stop):
        return {"codes": np.random.default_rng(seed + start).integers(0, VALUES, (stop - start, positions))}

    for split in config.codes.splits:
        source = sources.identity(split=split, **config.data)
        count = len(sources.source(split=split, **config.data))
        code_writer.write(directory / split, encode, total=count, positions=positions, values=VALUES, identity=identity, source=source)


@pytest.fixture
def config(tmp_path):
    made = load(ROOT / "configs" / "quickstart.py", "tiny")
    made.codes.path = str(tmp_path / "W1" / "codes")
    made.codes.splits = ("train", "validation")
    for name in ("generator", "without_codes"):
        made[name].model.update(dict(width=32, depth=1, heads=2))
        made[name].grid.update(dict(count=6, sampling_steps=2))
        made[name].train.batch = 16
    return made


def make(config, step, workdir):
    return STAGES[config[step].stage](config, step=step, workdir=workdir)


def check(config, workdir):
    """Runs the codes job of a workdir."""
    (workdir / "codes").mkdir(parents=True, exist_ok=True)
    return make(config, "codes", workdir).run(parallel.make_mesh(), workdir / "codes")


def test_readers_of_another_workdir_get_its_codes(config, tmp_path):
    write(tmp_path / "W1" / "codes", config)
    stored = codes.CodeStore(tmp_path / "W1" / "codes" / "train").codes()
    for step in ("prior", "generator"):
        stage = make(config, step, tmp_path / "W2")
        batch = next(stage.batches("train"))
        assert {tuple(row) for row in batch["codes"]} <= {tuple(row) for row in stored.astype(np.int32)}
        assert stage.reads()["store"]["encoder"] == "the encoder"
    assert not (tmp_path / "W2").exists()


def test_the_codes_job_checks_and_measures_them_and_encodes_nothing(config, tmp_path):
    write(tmp_path / "W1" / "codes", config)
    found = check(config, tmp_path / "W2")
    assert found["codes/train_count"] == 1024 and 0.9 < found["codes/perplexity"] <= 1
    usage = json.loads((tmp_path / "W2" / "codes" / "usage.json").read_text())
    assert len(usage["perplexity"]) == POSITIONS and sum(usage["by_rank"]) == pytest.approx(1, abs=1e-3)
    assert not list((tmp_path / "W2").rglob("*.arrayrecord"))
    check(config, tmp_path / "W2")
    (tmp_path / "W1").rename(tmp_path / "moved")  # the same codes at another place are the same codes
    config.codes.path = str(tmp_path / "moved" / "codes")
    check(config, tmp_path / "W2")


def test_codes_that_do_not_fit_are_refused(config, tmp_path):
    with pytest.raises(UserError, match="no complete code store in .*W1/codes/train"):
        check(config, tmp_path / "W2")
    write(tmp_path / "W1" / "codes", config)
    check(config, tmp_path / "W2")
    write(tmp_path / "W3" / "codes", config, identity="another encoder")
    config.codes.path = str(tmp_path / "W3" / "codes")
    with pytest.raises(UserError, match='store.encoder: "the encoder" -> "another encoder"'):
        check(config, tmp_path / "W2")
    config.data.count = 1000
    with pytest.raises(UserError, match="made from other data .*count: 1024 there, 1000 here"):
        check(config, tmp_path / "W4")
    config.data.count = 1024
    write(tmp_path / "W5" / "codes", config, positions=4)
    config.codes.path = str(tmp_path / "W5" / "codes")
    for step in ("prior", "generator"):
        with pytest.raises(UserError, match=rf"^{step} reads codes of 36 positions with 16 values; .* have 4 with 16"):
            make(config, step, tmp_path / "W2").reads()


def test_codes_of_the_encoder_as_it_was_before_are_made_anew(config, tmp_path, monkeypatch):
    """The encoder was trained longer since: a half-made or complete store of before must not stand in the way."""
    from dlc_jax.stages import codes as job

    old = tmp_path / "W1" / "codes"
    write(old, config)
    job._drop_others(old / "train", "the encoder")
    assert (old / "train" / "manifest.json").exists()
    for text in ("[]", "null", '"x"', "half a mani"):  # damaged: nothing says that they are others
        (old / "validation" / "codes-0.json").write_text(text)
        job._drop_others(old / "validation", "the encoder")
        (old / "validation" / "codes-0.json").unlink()
    job._drop_others(old / "train", "the encoder, longer")
    assert not (old / "train").exists()
    (old / "validation" / "manifest.json").rename(old / "validation" / "manifest.bak")
    name = next(path.name for path in (old / "validation").glob("*.arrayrecord"))
    (old / "validation" / f"{name}.json").write_text(json.dumps({"description": {"identity": "the encoder"}, "shard": {}}))
    job._drop_others(old / "validation", "the encoder, longer")
    assert not (old / "validation").exists()


@pytest.mark.parametrize("step", ["generator", "without_codes"])
def test_grids_are_drawn_from_the_same_codes_with_the_same_noise(step, config, tmp_path):
    write(tmp_path / "W1" / "codes", config)
    stage = make(config, step, tmp_path / "W2")
    (grid,) = stage.evals
    assert (grid.name, grid.every) == ("grid", 12)
    mesh, directory = parallel.make_mesh(devices=jax.devices()[:2]), tmp_path / "W2" / step
    state = jax.jit(make_init(stage))(jax.random.key(0))

    def disturbed(ema, seed):  # the last layer begins at zero: whatever the noise, the picture would be the same
        random = np.random.default_rng(seed)
        return jax.tree.map(lambda leaf: leaf + 0.05 * random.normal(size=leaf.shape).astype(np.float32), ema)

    state = dataclasses.replace(state, ema=disturbed(state.ema, 0))
    later = dataclasses.replace(state, ema=disturbed(state.ema, 1), step=state.step + 12)
    with jax.set_mesh(mesh):
        first, again, moved = (grid.run(at, {}, mesh, directory)["samples"] for at in (state, state, later))
    np.testing.assert_array_equal(first, again)
    assert first.dtype == np.uint8 and (first != moved).any() and first.std() > 5
    pictures = directory / "pictures"
    assert sorted(path.name for path in pictures.iterdir()) == ["captions.json", "step_0.png", "step_12.png"]
    np.testing.assert_array_equal(np.asarray(Image.open(pictures / "step_12.png")), moved)
    captions = json.loads((pictures / "captions.json").read_text())
    assert captions["step_12.png"].startswith("After 12 steps: ") and set(captions) == {"step_0.png", "step_12.png"}


def test_latents_have_no_grid(config, tmp_path):
    config.generator.latents = True
    assert make(config, "generator", tmp_path).evals == ()


def test_a_wrong_grid_is_refused(config, tmp_path):
    config.generator.grid.every = -1
    with pytest.raises(UserError, match="generator.grid: every"):
        make(config, "generator", tmp_path)
