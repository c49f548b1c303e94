"""One code store feeds many runs: by `path`, checked against the model, the data, and before.

And grids on the way.
"""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image
from recipes import load

from dlc_jax import parallel
from dlc_jax.data import code_writer, codes, sources
from dlc_jax.errors import UserError
from dlc_jax.stages import STAGES
from dlc_jax.stages.codes.export import drop_others
from dlc_jax.step import make_init

POSITIONS, VALUES = 36, 16


def write(directory, config, *, identity="the encoder", seed=0, positions=POSITIONS):
    """A store of random codes, as a codes job leaves it."""

    def encode(start, stop):
        random = np.random.default_rng(seed + start)
        return {"codes": random.integers(0, VALUES, (stop - start, positions))}

    for split in config.codes.splits:
        source = sources.identity(split=split, **config.data)
        sizes = {"total": len(sources.source(split=split, **config.data)), "values": VALUES}
        sizes |= {"positions": positions}
        code_writer.write(directory / split, encode, identity=identity, source=source, **sizes)


@pytest.fixture
def config(tmp_path):
    lines = {"codes.path": str(tmp_path / "W1" / "codes"), "codes.splits": ("train", "validation")}
    small = {"model.width": 32, "model.depth": 1, "model.heads": 2, "train.batch": 16}
    small |= {"grid.count": 6, "grid.sampler.steps": 2}
    for name in ("generator", "without_codes"):
        lines |= {f"{name}.{field}": value for field, value in small.items()}
    return load("quickstart.py:tiny", lines)


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
        known = {tuple(row) for row in stored.astype(np.int32)}
        assert {tuple(row) for row in batch["codes"]} <= known
        assert stage.reads()["store"]["encoder"] == "the encoder"
    assert not (tmp_path / "W2").exists()


def test_the_codes_job_checks_and_measures_them_and_encodes_nothing(config, tmp_path):
    write(tmp_path / "W1" / "codes", config)
    found = check(config, tmp_path / "W2")
    assert found["codes/train_count"] == 1024 and 0.9 < found["codes/perplexity"] <= 1
    usage = json.loads((tmp_path / "W2" / "codes" / "usage.json").read_text())
    assert len(usage["perplexity"]) == POSITIONS
    assert sum(usage["by_rank"]) == pytest.approx(1, abs=1e-3)
    assert not list((tmp_path / "W2").rglob("*.arrayrecord"))
    check(config, tmp_path / "W2")
    (tmp_path / "W1").rename(tmp_path / "moved")  # the same codes at another place
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
        said = rf"^{step} reads codes of 36 positions with 16 values; .* have 4 with 16"
        with pytest.raises(UserError, match=said):
            make(config, step, tmp_path / "W2").reads()


def test_codes_of_the_encoder_as_it_was_before_are_made_anew(config, tmp_path, monkeypatch):
    """The encoder was trained longer since: its earlier store, half-made or complete, goes."""
    old = tmp_path / "W1" / "codes"
    write(old, config)
    drop_others(old / "train", "the encoder")
    assert (old / "train" / "manifest.json").exists()
    for text in ("[]", "null", '"x"', "half a mani"):  # damaged: nothing says that they are others
        (old / "validation" / "codes-0.json").write_text(text)
        drop_others(old / "validation", "the encoder")
        (old / "validation" / "codes-0.json").unlink()
    drop_others(old / "train", "the encoder, longer")
    assert not (old / "train").exists()
    (old / "validation" / "manifest.json").rename(old / "validation" / "manifest.bak")
    name = next(path.name for path in (old / "validation").glob("*.arrayrecord"))
    about = {"description": {"identity": "the encoder"}, "shard": {}}
    (old / "validation" / f"{name}.json").write_text(json.dumps(about))
    drop_others(old / "validation", "the encoder, longer")
    assert not (old / "validation").exists()


@pytest.mark.parametrize("step", ["generator", "without_codes"])
def test_grids_are_drawn_from_the_same_codes_with_the_same_noise(step, config, tmp_path):
    write(tmp_path / "W1" / "codes", config)
    stage = make(config, step, tmp_path / "W2")
    (grid,) = stage.evals
    assert (grid.name, grid.every) == ("grid", 12)
    mesh, directory = parallel.make_mesh(devices=jax.devices()[:2]), tmp_path / "W2" / step
    state = jax.jit(make_init(stage))(jax.random.key(0))

    def disturbed(ema, seed):  # the last layer begins at zero, and would draw the same of any noise
        random = np.random.default_rng(seed)

        def disturb(leaf):
            return leaf + 0.05 * random.normal(size=leaf.shape).astype(np.float32)

        return jax.tree.map(disturb, ema)

    state = dataclasses.replace(state, ema=disturbed(state.ema, 0))
    later = dataclasses.replace(state, ema=disturbed(state.ema, 1), step=state.step + 12)
    with jax.set_mesh(mesh):
        states = (state, state, later)
        first, again, moved = (grid.run(at, {}, mesh, directory)["samples"] for at in states)
    np.testing.assert_array_equal(first, again)
    assert first.dtype == np.uint8 and (first != moved).any() and first.std() > 5
    pictures = directory / "pictures"
    names = sorted(path.name for path in pictures.iterdir())
    assert names == ["captions.json", "step_0.png", "step_12.png"]
    np.testing.assert_array_equal(np.asarray(Image.open(pictures / "step_12.png")), moved)
    captions = json.loads((pictures / "captions.json").read_text())
    assert set(captions) == {"step_0.png", "step_12.png"}
    assert captions["step_12.png"].startswith("After 12 steps: ")


def test_latents_have_a_grid_too(config, tmp_path):
    config.generator.latents = True
    (grid,) = make(config, "generator", tmp_path).evals
    assert grid.name == "grid"


def test_a_wrong_grid_is_refused(config, tmp_path):
    config.generator.grid.every = -1
    with pytest.raises(UserError, match="generator.grid: every"):
        make(config, "generator", tmp_path)
