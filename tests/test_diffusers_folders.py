"""A generator of classes in a folder of diffusers: both ways, and what it cannot hold."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from foreign_official import IMAGE, LATENT, generator
from packages import import_or_skip
from small_models import apply
from test_cli import refused
from test_interop_cli import dlc
from test_official import imported, same

from dlc_jax import checkpoint, recipe, workdir
from dlc_jax.cli import autoencoders, weights
from dlc_jax.models.dit import DiT
from dlc_jax.typing import Given

CLASSES, LAST = 7, 0.015
NAMES = ("transformer", "vae", "scheduler", "model_index.json")


@pytest.fixture
def run(tmp_path, capsys):
    """A workdir of the public generator of classes, tiny."""
    generator(tmp_path / "dit", classes=CLASSES, scheduler={"beta_end": LAST})
    out = imported(capsys, "--generator", tmp_path / "dit", "--out", tmp_path / "run")
    assert "dlc sample -w" in out and "dlc encode" not in out
    return tmp_path / "run"


def test_the_public_generator_of_classes_becomes_a_run_and_comes_back(run, tmp_path, capsys):
    config = recipe.of_run(run)
    model = config.generator.model
    assert (model.classes, model.positions, model.image, model.heads) == (CLASSES, 0, LATENT, 4)
    assert (config.generator.latents, config.generator.normalize) == (True, False)
    assert config.generator.process.beta_last == LAST
    line = refused(capsys, "export", "official", "-w", run, "--out", tmp_path / "official")
    assert "generator.process.beta_last=0.015: pipelines of this format" in line
    out = tmp_path / "back"
    dlc(capsys, "export", "diffusers", "-w", run, "--out", out)
    assert {path.name for path in out.iterdir()} == set(NAMES)
    for part in ("transformer", "vae"):
        same(tmp_path / "dit" / part, out / part)
    # and a folder of a pipeline is taken by dlc import dit and dlc import vae too
    said = dlc(capsys, "import", "dit", out, "--out", tmp_path / "weights")
    assert f"generator.process.beta_last={LAST}" in said and "generator.model.classes=7" in said
    said = dlc(capsys, "import", "vae", out / "vae", "--out", tmp_path / "vae")
    assert "model.scaling=0.5" in said and "model.groups=4" in said


REFUSED = {
    "codes": (
        {"generator.model.positions": 6, "generator.model.values": 5},
        "generator reads codes (generator.model.positions=6), which DiTTransformer2DModel does not",
    ),
    "no classes": ({"generator.model.classes": 0}, "generator.model.classes=0"),
    "another process": ({"generator.process.name": "linear"}, "draw with process.name='ddpm'"),
    "pixels": ({"generator.latents": False}, "generator.latents=False"),
    "normalized latents": ({"generator.normalize": True}, "generator.normalize=True"),
    "the modern block": ({"generator.model.block": "modern"}, "modern block has no names"),
    "no autoencoder": ({"autoencoder.path": ""}, "its autoencoder has no weights"),
    "a tiny autoencoder": ({"autoencoder.model.name": "tiny"}, "a tiny autoencoder"),
}


def test_what_the_folder_cannot_hold_is_refused_by_name(run, tmp_path, capsys):
    config = recipe.of_run(run)
    for case, (changes, words) in REFUSED.items():
        if case == "a tiny autoencoder":
            changed = config.to_dict()
            changed["autoencoder"]["model"] = {"name": "tiny", "channels": 8}
            changed = recipe.expand(recipe.flat(changed))
        else:
            changed = recipe.changed(config, changes)
        workdir.write(run / "config.json", workdir.plain(changed.to_dict()))
        line = refused(capsys, "export", "diffusers", "-w", run, "--out", tmp_path / "new")
        assert words in line, (case, line)
        assert not (tmp_path / "new").exists()
    (run / "generator" / "done.json").unlink()
    line = refused(capsys, "export", "diffusers", "-w", run, "--out", tmp_path / "new")
    assert "generator is not complete" in line
    line = refused(capsys, "export", "diffusers", "-w", run, "--out", run)
    assert "is there already" in line


@pytest.mark.torch
def test_diffusers_loads_what_is_exported_and_gives_the_same(run, tmp_path, capsys):
    torch, diffusers = import_or_skip("torch"), import_or_skip("diffusers")
    out = tmp_path / "out"
    assert "downscale_freq_shift" in dlc(capsys, "export", "diffusers", "-w", run, "--out", out)
    pipe = diffusers.DiTPipeline.from_pretrained(out)
    capsys.readouterr()
    assert isinstance(pipe.scheduler, diffusers.DDPMScheduler)
    config = recipe.of_run(run)
    tables = config.generator.process
    betas = np.linspace(tables.beta_first, tables.beta_last, tables.steps)
    np.testing.assert_allclose(pipe.scheduler.betas.numpy(), betas, rtol=1e-6)
    random = np.random.default_rng(0)
    x = random.normal(size=(3, LATENT, LATENT, 4)).astype(np.float32)
    steps, label = np.array([0, 500, 999]), np.array([0, CLASSES - 1, CLASSES])
    times = jnp.asarray(steps / 1000, jnp.float32)
    model = recipe.build(DiT, config.generator.model)
    shapes = weights.abstract(model, x.shape, (3,))
    params = checkpoint.load_params(run / "generator" / "checkpoints", shapes)
    given = Given(codes=None, label=jnp.asarray(label), embedding=None)
    found = np.asarray(apply(model, {"params": params}, jnp.asarray(x), times, given))
    with torch.no_grad():
        transformer = pipe.transformer.eval()
        for block in transformer.transformer_blocks:  # as the export says
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        inputs = torch.from_numpy(x.transpose(0, 3, 1, 2))
        wanted = transformer(inputs, torch.from_numpy(steps), torch.from_numpy(label)).sample
        wanted = wanted.numpy().transpose(0, 2, 3, 1)
    error = np.abs(found - wanted).max() / np.abs(wanted).max()
    assert error <= 1e-5, error
    section = config.autoencoder
    ours = autoencoders._network(section.model.to_dict())
    vae = checkpoint.load_params(
        tmp_path / "run" / "autoencoder" / "checkpoints", autoencoders._abstract(ours)
    )
    found = np.asarray(apply(ours, {"params": vae}, jnp.asarray(x), method="decode"))
    with torch.no_grad():
        wanted = pipe.vae.eval().decode(inputs / pipe.vae.config.scaling_factor).sample
    wanted = wanted.numpy().transpose(0, 2, 3, 1)
    assert found.shape == (3, IMAGE, IMAGE, 3)
    error = np.abs(found - wanted).max() / np.abs(wanted).max()
    assert error <= 1e-5, error
    # what diffusers saves is imported
    pipe.save_pretrained(tmp_path / "saved")
    capsys.readouterr()
    imported(capsys, "--generator", tmp_path / "saved", "--out", tmp_path / "again")
    same(tmp_path / "saved" / "transformer", out / "transformer")
    saved = json.loads((tmp_path / "saved" / "vae" / "config.json").read_text())
    written = json.loads((out / "vae" / "config.json").read_text())
    assert all(saved[key] == value for key, value in written.items() if key != "sample_size")
