"""dlc import and dlc export as a person runs them: byte for byte there and back, started from, loaded by transformers, refused in one line."""

import json
import pathlib
import re
import shlex

import jax
import jax.numpy as jnp
import ml_collections
import ml_dtypes
import numpy as np
import pytest
from foreign_weights import POSITIONS, VALUES, official, transformers
from PIL import Image
from safetensors import numpy as safetensors_numpy
from safetensors import safe_open
from test_cli import refused, run

from dlc_jax import checkpoint, cli, command, pipeline, stages, workdir
from dlc_jax.cli import weights
from dlc_jax.interop import files, slots
from dlc_jax.models.autoencoder import Autoencoder
from dlc_jax.models.simplicial import Encoder
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
    write(tmp_path / "sem.safetensors", state, metadata)
    return dlc(
        capsys,
        "import",
        "sem",
        tmp_path / "sem.safetensors",
        "--out",
        tmp_path / "run",
        RECIPE,
        *flags,
    )


def chunked(state):
    """As a wrapped training run names them: prefixes, and blocks in chunks of one."""
    named = {
        re.sub(r"^blocks\.(\d+)\.", r"blocks.\1.\1.", name): tensor
        for name, tensor in state.items()
    }
    return {
        f"backbone._orig_mod.{name}" if not name.startswith("dino") else name: tensor
        for name, tensor in named.items()
    }


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
    state = official(readout="pos-shared", head=True)
    import_sem(capsys, tmp_path, state)
    image = np.random.default_rng(0).integers(256, size=(16, 16, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    out = dlc(capsys, "encode", "-w", tmp_path / "run", tmp_path / "a.png")
    assert len(out.splitlines()[-1].partition(": ")[2].split()) == POSITIONS
    # positions are for 12 pixels, but the recipe's crops have 16, and at that size it is read
    loaded = pipeline.load(tmp_path / "run")
    assert (loaded.size, loaded.config.encoder.model.image) == (16, 12)
    assert re.search("encoder +complete", dlc(capsys, "info", tmp_path / "run"))
    config = ml_collections.ConfigDict(workdir.read_config(tmp_path / "run"))
    assert config.prior.model.positions == config.generator.model.positions == POSITIONS
    assert config.prior.model["values"] == config.generator.model["values"] == VALUES
    assert config.without_codes.model.positions == 0  # one that reads no codes goes on reading none
    assert stages.STAGES["codes"](config, step="codes", workdir=tmp_path / "run").programs


@pytest.mark.slow
def test_later_steps_go_on_from_an_imported_encoder(tmp_path, capsys):
    import_sem(capsys, tmp_path, official(readout="pos-shared", head=True))
    code, out, err = run(
        "dlc_jax.cli",
        "train",
        f"--config={tmp_path / 'run' / 'config.json'}",
        "--config.steps=('encoder','codes')",
    )
    assert (code, err) == (0, "") and "encoder: complete" in out, out + err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["codes/train_count"] == 1024


@pytest.mark.parametrize("recipe", ["imagenet256", "image_folder", "quickstart"])
@pytest.mark.parametrize(
    "layout, head", [("official", False), ("official", True), ("transformers", False)]
)
def test_the_flags_that_import_prints_start_training_from_it(
    layout, head, recipe, tmp_path, capsys
):
    state = official(head=head)
    if layout == "transformers":
        state = transformers(state)
    write(tmp_path / "vit.safetensors", state)
    out = dlc(
        capsys, "import", "dinov2", tmp_path / "vit.safetensors", "--out", tmp_path / "weights"
    )
    headless = "dino_head.mlp.0.bias" not in state
    assert (
        """'--config.encoder.train.init_new=("simplicial.*","(patch_)?head.*")'""" in out
    ) == headless
    flags = shlex.split(out.splitlines()[-1])
    config, _ = command.parse(
        [
            "dlc",
            f"--config={ROOT / 'configs' / recipe}.py",
            *flags,
            "--config.encoder.model.positions=2",
        ]
    )
    config.encoder.model.update(
        {"values": 4, "prototypes": 8 if headless else 40, "separate_head": headless}
    )
    model = Encoder(**config.encoder.model)
    fresh = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape), weights.abstract(model, (1, 12, 12, 3))
    )
    train = config.encoder.train
    started = checkpoint.warm_start(train.init_from, fresh, new=train.init_new)
    found, before = slots.flat(started), slots.flat(fresh)
    assert (
        found["vit/norm/scale"]
        == state["norm.weight" if layout == "official" else "layernorm.weight"]
    ).all()
    new = ("simplicial", "head", "patch_head") if headless else ("simplicial",)
    assert all((found[path] is before[path]) == path.startswith(new) for path in found)


def test_an_encoder_of_ours_is_exported_and_imported(tmp_path, capsys):
    """Of a small recipe: no LayerScale, fixed positions, heads of other widths."""
    config, _ = command.parse(["dlc", RECIPE])
    small = {
        "width": 32,
        "depth": 2,
        "heads": 4,
        "pos": "sincos",
        "layer_scale": None,
        "positions": POSITIONS,
        "values": VALUES,
    }
    config.encoder.model.update(small)
    model = Encoder(**config.encoder.model)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)), jnp.float32)
    random = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(random.normal(size=leaf.shape), jnp.float32),
        weights.abstract(model, images.shape),
    )
    workdir.write(tmp_path / "config.json", workdir.plain(config.to_dict()))
    saved = checkpoint.Checkpoints(tmp_path / "encoder" / "checkpoints")
    saved.save(3, {"params": params, "ema": params}, None, {"identity": {}})
    saved.close()
    dlc(capsys, "export", "sem", tmp_path, "--out", tmp_path / "ours.safetensors")
    dlc(capsys, "import", "sem", tmp_path / "ours.safetensors", "--out", tmp_path / "run", RECIPE)
    loaded = pipeline.load(tmp_path / "run", batch=8)
    section = loaded.config.encoder.model
    assert (section.heads, section.positions, section["values"], section.pos) == (
        4,
        POSITIONS,
        VALUES,
        "learned",
    )
    theirs = checkpoint.load_params(
        tmp_path / "run" / "encoder" / "checkpoints",
        weights.abstract(Encoder(**section), (1, 16, 16, 3)),
    )
    expected, found = (
        jax.jit(network.apply)({"params": tree}, images)
        for network, tree in ((model, params), (Encoder(**section), theirs))
    )
    for name in ("logits", "prototypes", "patches"):
        np.testing.assert_allclose(
            found[name], expected[name], atol=1e-5 * float(np.abs(expected[name]).max())
        )
    config.encoder.model.qk_norm = True
    workdir.write(tmp_path / "config.json", workdir.plain(config.to_dict()))
    assert "does not fit" in refused(
        capsys, "export", "sem", tmp_path, "--out", tmp_path / "no.safetensors"
    )


@pytest.mark.torch
@pytest.mark.parametrize("registers, mlp", [(4, "gelu"), (0, "gelu"), (4, "swiglu")])
def test_transformers_loads_what_is_exported_and_gives_the_same(registers, mlp, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    hub = pytest.importorskip("transformers")
    import_sem(
        capsys,
        tmp_path,
        official(registers=registers, mlp=mlp, readout="plain"),
        "--positions",
        POSITIONS,
    )
    out = dlc(capsys, "export", "dinov2", tmp_path / "run", "--out", tmp_path / "hf")
    name = "Dinov2WithRegistersModel" if registers else "Dinov2Model"
    assert name in out and {path.name for path in (tmp_path / "hf").iterdir()} == {
        "config.json",
        "model.safetensors",
    }
    theirs, report = getattr(hub, name).from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report.values()), report
    capsys.readouterr()
    # and what transformers saves is imported
    theirs.save_pretrained(tmp_path / "saved")
    capsys.readouterr()
    dlc(
        capsys,
        "import",
        "dinov2",
        tmp_path / "saved" / "model.safetensors",
        "--out",
        tmp_path / "weights",
    )
    again = checkpoint.arrays.read_json(tmp_path / "weights" / "checkpoints" / "0" / "meta")
    section = again["identity"]["model"]
    model = ViT(**section)
    params = checkpoint.load_params(
        tmp_path / "weights" / "checkpoints", {"vit": weights.abstract(model, (1, 12, 12, 3))}
    )["vit"]
    for side in (12, 20):  # that of the positions, and one that they are resized for
        images = np.random.default_rng(side).standard_normal((3, side, side, 3)).astype(np.float32)
        with torch.no_grad():
            expected = theirs(
                torch.from_numpy(images.transpose(0, 3, 1, 2))
            ).last_hidden_state.numpy()
        tokens = jax.jit(model.apply)({"params": params}, images)
        vector, patches = (
            tokens["vector"],
            model.apply({"params": params}, tokens["patches"], method="normalize"),
        )
        for ours, other in ((vector, expected[:, 0]), (patches, expected[:, 1 + registers :])):
            assert np.abs(ours - other).max() <= 1e-5 * np.abs(other).max()


def test_import_vae(tmp_path, capsys):
    from dlc_jax.interop import vae_names

    shapes = weights.shapes(Autoencoder(channels=(32, 32), residuals=1), (1, 4, 4, 3))
    random = np.random.default_rng(0)
    state = {
        name: random.standard_normal(slot.shape, np.float32)
        for name, slot in vae_names.table(shapes).items()
    }
    write(
        tmp_path / "vae.safetensors",
        {name.replace("to_q", "query"): tensor for name, tensor in state.items()},
    )
    out = dlc(capsys, "import", "vae", tmp_path / "vae.safetensors", "--out", tmp_path / "vae")
    assert "channels (32, 32), residuals 1, latent 4" in out
    abstract = weights.abstract(Autoencoder(channels=(32, 32), residuals=1), (1, 4, 4, 3))
    params = checkpoint.load_params(tmp_path / "vae" / "checkpoints", abstract)
    assert (params["quant"]["kernel"][0, 0] == state["quant_conv.weight"][:, :, 0, 0].T).all()
    assert (
        params["encoder_middle"]["attention"]["qkv"]["kernel"][:, 0, 0]
        == state["encoder.mid_block.attentions.0.to_q.weight"].T
    ).all()
    assert "encoder.mid_block" in refused(
        capsys,
        "import",
        "vae",
        write(
            tmp_path / "x.safetensors",
            {name: tensor for name, tensor in state.items() if "to_k" not in name},
        ),
        "--out",
        tmp_path / "x",
    )


# ---- what is refused


@pytest.mark.parametrize("verb", ["import", "export"])
def test_help_has_examples(verb, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([verb, "--help"])
    assert (
        left.value.code == 0
        and f"\n  dlc {verb} sem " in capsys.readouterr().out.partition("example")[2]
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("import", "ACTION"),
        ("import dinov2", "FILE"),
        ("import dinov2 {here}/vit.safetensors", "--out"),
        (
            "import dinov2 {here}/nothing.safetensors --out {here}/new",
            "nothing.safetensors does not exist",
        ),
        (
            "import dinov2 {here}/text.safetensors --out {here}/new",
            "text.safetensors is damaged, or not a safetensors file",
        ),
        ("import dinov2 {here}/text.npz --out {here}/new", "neither .safetensors"),
        ("import dinov2 {here}/vit.safetensors --out {here}", "is there already"),
        ("import dinov2 {here}/vit.safetensors --out {here}/new --sed 3", "--sed"),
        ("import dinov2 {here}/vit.safetensors --out {here}/text.npz/new", "text.npz"),
        (
            "import dinov2 {here}/sem.safetensors --out {here}/new",
            "sem_embed.weight), which is no part of DINOv2; dlc import sem takes it",
        ),
        ("import vae {here}/vit.safetensors --out {here}/new", "no autoencoder"),
        ("import sem {here}/vit.safetensors --out {here}/new {recipe}", "no simplicial head"),
        (
            "import sem {here}/sem.safetensors --out {here}/new {recipe}",
            "48 numbers before the softmax, L x V: give --positions",
        ),
        ("import sem {here}/sem.safetensors --out {here}/new --positions 0 {recipe}", "0"),
        ("import sem {here}/sem.safetensors --out {here}/new --positions 7 {recipe}", "not 7 x 6"),
        (
            "import sem {here}/headless.safetensors --out {here}/new {recipe} --config.seed=-1",
            "seed=-1",
        ),
        (
            "import sem {here}/wide.safetensors --out {here}/new --positions 1 {recipe}",
            "values=70000 is more than 65536",
        ),
        (
            "import sem {here}/sem.safetensors --out {here}/new --positions 6 --config=nowhere.py",
            "nowhere.py",
        ),
        (
            "import sem {here}/sem.safetensors --out {here}/new --positions 6 {recipe} --config.seeed=1",
            "seeed",
        ),
        (
            "import sem {here}/sem.safetensors --out {here}/new --positions 6 {recipe} --config.encoder.crops.form.global_size=18",
            "patches of 4",
        ),
        (
            "import sem {here}/sem.safetensors --out {here}/text.npz/new --positions 6 {recipe}",
            "give another --out",
        ),
        ("export sem {here}/nowhere --out {here}/x.safetensors", "nowhere does not exist"),
        ("export sem {here} --out {here}/x.pth", "x.pth is no .safetensors"),
        ("export dinov2 {here} --out {here}/new", "no run"),
        ("export dinov2 {here}/nowhere --out {here}", "is there already"),
    ],
)
def test_refused_in_one_line(arguments, words, tmp_path, capsys):
    write(tmp_path / "vit.safetensors", official())
    write(tmp_path / "sem.safetensors", official(readout="plain", head=True))
    write(tmp_path / "headless.safetensors", official(readout="shared"))
    write(
        tmp_path / "wide.safetensors",
        official(readout="plain", positions=1, values=70_000, registers=0),
    )
    (tmp_path / "text.safetensors").write_text("no tensors at all")
    (tmp_path / "text.npz").write_text("")
    before = sorted(tmp_path.rglob("*"))
    assert words in refused(capsys, *arguments.format(here=tmp_path, recipe=RECIPE).split())
    assert sorted(tmp_path.rglob("*")) == before  # nothing is left behind


def test_a_run_that_has_an_encoder_takes_no_other(tmp_path, capsys):
    state = official(readout="shared", head=True)
    import_sem(capsys, tmp_path, state)
    again = ("import", "sem", tmp_path / "sem.safetensors", "--out", tmp_path / "run", RECIPE)
    assert "encoder is there already" in refused(capsys, *again)


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
