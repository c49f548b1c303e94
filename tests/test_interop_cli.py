"""dlc import and dlc export as a person runs them.

What is imported is exported byte for byte, started from, and loaded by transformers.
"""

import json
import pathlib
import re
import shlex

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from foreign_weights import POSITIONS, VALUES, official, transformers
from packages import import_or_skip
from PIL import Image
from safetensors import numpy as safetensors_numpy
from safetensors import safe_open
from test_cli import refused, run

from dlc_jax import checkpoint, cli, command, pipeline, recipe, stages, workdir
from dlc_jax.cli import weights
from dlc_jax.interop import files, slots
from dlc_jax.models.encoder import Encoder
from dlc_jax.models.vit import ViT

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECIPE = f"--config={ROOT / 'configs' / 'quickstart.py'}:tiny"


def write(path, state, metadata=None):
    files.save(path, state, metadata)
    return path


def dlc(capsys, *arguments):
    """Standard output of a verb that must succeed."""
    assert cli.main([str(argument) for argument in arguments]) == 0, capsys.readouterr()
    out, err = capsys.readouterr()
    assert err == "", err
    return out


def import_sem(capsys, tmp_path, state, *flags, metadata=None):
    file = write(tmp_path / "sem.safetensors", state, metadata)
    return dlc(capsys, "import", "sem", file, "--out", tmp_path / "run", RECIPE, *flags)


def chunked(state):
    """As a wrapped training run names them: prefixes, and blocks in chunks of one."""

    def named(name):
        name = re.sub(r"^blocks\.(\d+)\.", r"blocks.\1.\1.", name)
        return name if name.startswith("dino") else f"backbone._orig_mod.{name}"

    return {named(name): tensor for name, tensor in state.items()}


CASES = {
    "plain float32": (official(readout="plain", head=True), ["--positions", POSITIONS], None),
    "plain float16": (
        official(readout="plain", dtype=np.float16),
        [],
        {"L": str(POSITIONS), "V": str(VALUES)},
    ),
    "shared bfloat16": (
        official(readout="shared", head=2, dtype=ml_dtypes.bfloat16),
        [],
        {"format": "pt"},
    ),
    "pos-shared chunked": (chunked(official(readout="pos-shared", head=True)), [], None),
    "pos-shared swiglu": (official(readout="pos-shared", mlp="swiglu", dtype=np.float16), [], None),
    "plain without registers": (
        official(readout="plain", registers=0, dtype=ml_dtypes.bfloat16),
        ["--values", VALUES],
        None,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_imported_encoder_is_exported_as_it_came(case, tmp_path, capsys):
    state, flags, metadata = CASES[case]
    if "float32" in case:  # types may differ within a file
        state = state | {"norm.weight": state["norm.weight"].astype(np.float16)}
    out = import_sem(capsys, tmp_path, state, *flags, metadata=metadata)
    assert "6 x 8" in out and case.split()[0] in out and "sem_cls_norm.weight" in out
    assert ("no DINO head" in out) == (not any(name.startswith("dino_head") for name in state))
    dlc(capsys, "export", "sem", tmp_path / "run", "--out", tmp_path / "back.safetensors")
    with safe_open(tmp_path / "back.safetensors", "numpy") as file:
        assert (file.metadata() or None) == metadata
    back = safetensors_numpy.load_file(tmp_path / "back.safetensors")
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape), name
        assert back[name].tobytes() == tensor.tobytes(), name


def test_an_imported_run_encodes_and_its_encoder_is_complete(tmp_path, capsys):
    import_sem(capsys, tmp_path, official(readout="pos-shared", head=True))
    image = np.random.default_rng(0).integers(256, size=(16, 16, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    out = dlc(capsys, "encode", "-w", tmp_path / "run", tmp_path / "a.png")
    assert len(out.splitlines()[-1].partition(": ")[2].split()) == POSITIONS
    # positions are for 12 pixels, but the recipe's crops have 16, and at that size it is read
    config, loaded = recipe.of_run(tmp_path / "run"), pipeline.load(tmp_path / "run")
    assert (loaded.size, config.encoder.model.backbone.image) == (16, 12)
    assert re.search("encoder +complete", dlc(capsys, "info", tmp_path / "run"))
    assert config.prior.model.positions == config.generator.model.positions == POSITIONS
    assert config.prior.model["values"] == config.generator.model["values"] == VALUES
    assert config.without_codes.model.positions == 0  # one that reads no codes goes on reading none
    assert stages.STAGES["codes"](config, step="codes", workdir=tmp_path / "run").programs


@pytest.mark.slow
def test_later_steps_go_on_from_an_imported_encoder(tmp_path, capsys):
    import_sem(capsys, tmp_path, official(readout="pos-shared", head=True))
    flags = (f"--config={tmp_path / 'run' / 'config.json'}", "--config.steps=('encoder','codes')")
    code, out, err = run("dlc_jax.cli", "train", *flags)
    assert (code, err) == (0, "") and "encoder: complete" in out, out + err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["codes/train_count"] == 1024


@pytest.mark.parametrize("recipe_name", ["imagenet256", "image_folder", "quickstart"])
@pytest.mark.parametrize(
    "layout, head", [("official", False), ("official", True), ("transformers", False)]
)
def test_the_flags_that_import_prints_start_training_from_it(
    layout, head, recipe_name, tmp_path, capsys
):
    state = official(head=head)
    if layout == "transformers":
        state = transformers(state)
    write(tmp_path / "vit.safetensors", state)
    folder = tmp_path / "weights"
    out = dlc(capsys, "import", "dinov2", tmp_path / "vit.safetensors", "--out", folder)
    headless = "dino_head.mlp.0.bias" not in state
    untrained = """'--config.encoder.train.init_new=("simplicial.*","(patch_)?head.*")'"""
    assert (untrained in out) == headless
    assert ("--config.encoder.model.dino.prototypes=40" in out) == (not headless)
    flags = shlex.split(out.splitlines()[-1])
    file = f"--config={ROOT / 'configs' / recipe_name}.py"
    config, _ = command.parse(["dlc", file, *flags])
    small = {"simplicial.positions": 2, "simplicial.values": 4, "separate_head": headless}
    small |= {"dino.prototypes": 8} if headless else {}
    changes = {f"encoder.model.{name}": value for name, value in small.items()}
    model = recipe.build(Encoder, recipe.changed(config, changes).encoder.model)
    shapes = weights.abstract(model, (1, 12, 12, 3))
    fresh = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)
    train = config.encoder.train
    started = checkpoint.warm_start(train.init_from, fresh, new=train.init_new)
    found, before = slots.flat(started), slots.flat(fresh)
    norm = state["norm.weight" if layout == "official" else "layernorm.weight"]
    assert (found["vit/norm/scale"] == norm).all()
    new = ("simplicial", "head", "patch_head") if headless else ("simplicial",)
    assert all((found[path] is before[path]) == path.startswith(new) for path in found)


def saved(directory, step, parameters, identity):
    """A checkpoint of these {part: parameters}."""
    checkpoints = checkpoint.Checkpoints(directory / "checkpoints")
    checkpoints.save(step, parameters, None, {"identity": identity})
    checkpoints.close()


def test_an_encoder_of_ours_is_exported_and_imported(tmp_path, capsys):
    """Of a small recipe: no LayerScale, fixed positions, heads of other widths."""
    backbone = {"width": 32, "depth": 2, "heads": 4, "pos": "sincos", "layer_scale": None}
    code = {"positions": POSITIONS, "values": VALUES}
    small = recipe.flat({"encoder.model": {"backbone": backbone, "simplicial": code}})
    config = recipe.changed(command.parse(["dlc", RECIPE])[0], small)
    model = recipe.build(Encoder, config.encoder.model)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)), jnp.float32)
    random = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(size=leaf.shape), jnp.float32),
        weights.abstract(model, images.shape),
    )
    workdir.write(tmp_path / "config.json", workdir.plain(config.to_dict()))
    saved(tmp_path / "encoder", 3, {"params": params, "ema": params}, {})
    file, folder = tmp_path / "ours.safetensors", tmp_path / "run"
    dlc(capsys, "export", "sem", tmp_path, "--out", file)
    dlc(capsys, "import", "sem", file, "--out", folder, RECIPE)
    section = pipeline.load(folder, batch=8).config.encoder.model
    assert (section.backbone.heads, section.backbone.pos) == (4, "learned")
    assert (section.simplicial.positions, section.simplicial["values"]) == (POSITIONS, VALUES)
    again = recipe.build(Encoder, section)
    shapes = weights.abstract(again, (1, 16, 16, 3))
    theirs = checkpoint.load_params(folder / "encoder" / "checkpoints", shapes)
    expected, found = (
        jax.jit(network.apply)({"params": tree}, images)
        for network, tree in ((model, params), (again, theirs))
    )
    for name in ("logits", "prototypes", "patches"):
        atol = 1e-5 * float(np.abs(expected[name]).max())
        np.testing.assert_allclose(found[name], expected[name], atol=atol)
    config = recipe.changed(config, {"encoder.model.backbone.qk_norm": True})
    workdir.write(tmp_path / "config.json", workdir.plain(config.to_dict()))
    line = refused(capsys, "export", "sem", tmp_path, "--out", tmp_path / "no.safetensors")
    assert "does not fit" in line


def test_what_an_earlier_version_imported_is_read(tmp_path, capsys):
    """Its config and its checkpoint's identity had all of the encoder's fields side by side."""
    import_sem(capsys, tmp_path, official(readout="pos-shared", head=True))
    new, old = tmp_path / "run", tmp_path / "old"
    config = workdir.read_config(new)
    parts = config["encoder"]["model"]
    flat = {**parts["backbone"], **parts["simplicial"], **parts["dino"]}
    flat["separate_head"] = parts["separate_head"]
    del flat["name"]
    config["encoder"]["model"] = flat
    del config["codes"]["dtype"]  # codes had none, and were computed in that of training
    (old / "encoder").mkdir(parents=True)
    workdir.write(old / "config.json", config)
    loaded = pipeline.load(new, batch=8)
    shapes = weights.abstract(recipe.build(Encoder, loaded.config.encoder.model), (1, 12, 12, 3))
    params = checkpoint.load_params(new / "encoder" / "checkpoints", shapes)
    saved(old / "encoder", 24, {"ema": params}, {"model": flat})
    for name in (weights.RECORD, weights.ASIDE, "done.json"):
        (old / "encoder" / name).write_bytes((new / "encoder" / name).read_bytes())

    images = np.random.default_rng(0).integers(256, size=(3, 16, 16, 3), dtype=np.uint8)
    codes = [each.encode(images) for each in (loaded, pipeline.load(old, batch=8))]
    np.testing.assert_array_equal(*codes)
    dlc(capsys, "export", "sem", old, "--out", tmp_path / "back.safetensors")
    came, back = (tmp_path / f"{name}.safetensors" for name in ("sem", "back"))
    assert back.read_bytes() == came.read_bytes()
    # published networks were trained on exact codes, whatever recipe an encoder is put in
    file, third = tmp_path / "sem.safetensors", tmp_path / "third"
    dlc(capsys, "import", "sem", file, "--out", third, f"--config={old / 'config.json'}")
    dtypes = [recipe.of_run(each).codes.dtype for each in (old, third)]
    assert dtypes == ["", "float32"]
    # it has no state that training could resume from, in either form
    for folder in (old, new):
        flags = ("--config.steps=('encoder',)", "--config.encoder.train.steps=40")
        line = refused(capsys, "train", f"--config={folder / 'config.json'}", *flags)
        assert "has weights only" in line


@pytest.mark.torch
@pytest.mark.parametrize("registers, mlp", [(4, "gelu"), (0, "gelu"), (4, "swiglu")])
def test_transformers_loads_what_is_exported_and_gives_the_same(registers, mlp, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    hub = import_or_skip("transformers")
    state = official(registers=registers, mlp=mlp, readout="plain")
    import_sem(capsys, tmp_path, state, "--positions", POSITIONS)
    out = dlc(capsys, "export", "dinov2", tmp_path / "run", "--out", tmp_path / "hf")
    name = "Dinov2WithRegistersModel" if registers else "Dinov2Model"
    written = {path.name for path in (tmp_path / "hf").iterdir()}
    assert name in out and written == {"config.json", "model.safetensors"}
    model = getattr(hub, name)
    theirs, report = model.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values()), report
    capsys.readouterr()
    # and what transformers saves is imported
    theirs.save_pretrained(tmp_path / "saved")
    capsys.readouterr()
    file, folder = tmp_path / "saved" / "model.safetensors", tmp_path / "weights"
    dlc(capsys, "import", "dinov2", file, "--out", folder)
    meta = checkpoint.arrays.read_json(folder / "checkpoints" / "0" / "meta")
    section = meta["identity"]["model"]["backbone"]
    assert section.pop("name") == "vit"
    ours = ViT(**section)
    shapes = {"vit": weights.abstract(ours, (1, 12, 12, 3))}
    params = {"params": checkpoint.load_params(folder / "checkpoints", shapes)["vit"]}
    for side in (12, 20):  # that of the positions, and one that they are resized for
        images = np.random.default_rng(side).standard_normal((3, side, side, 3)).astype(np.float32)
        with torch.no_grad():
            pixels = torch.from_numpy(images.transpose(0, 3, 1, 2))
            expected = theirs(pixels).last_hidden_state.numpy()
        tokens = jax.jit(ours.apply)(params, images)
        patches = ours.apply(params, tokens["patches"], method="normalize")
        found = np.concatenate([tokens["vector"][:, None], patches], axis=1)
        expected = np.delete(expected, range(1, 1 + registers), axis=1)
        for part in (slice(1), slice(1, None)):  # the class token, the patches
            error = np.abs(found - expected)[:, part].max()
            assert error <= 1e-5 * np.abs(expected[:, part]).max()


def test_as_a_command(tmp_path):
    write(tmp_path / "vit.safetensors", official())
    code, out, err = run(
        "dlc_jax.cli", "import", "dinov2", "vit.safetensors", "--out", "weights", cwd=tmp_path
    )
    assert (
        (code, err) == (0, "")
        and out.startswith("wrote weights: ")
        and "--config.encoder.train.init_from=weights" in out
    )
    code, out, err = run(
        "dlc_jax.cli", "import", "dinov2", "weights", "--out", "other", cwd=tmp_path
    )
    assert (code, out) == (
        2,
        "",
    ) and err == "dlc_jax: weights is a folder; give the file of tensors in it\n"
