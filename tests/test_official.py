"""The published networks as one run: sampled from, exported as they came, and what is refused."""

import json
import zipfile

import foreign_sedd
import numpy as np
import pytest
from foreign_official import IMAGE, LATENT, VAE, L, V, encoder, generator, published, put
from PIL import Image
from test_cli import refused
from test_interop_cli import ROOT, dlc

from dlc_jax import pipeline, recipe
from dlc_jax.interop import files, torch_names

CROPS = [f"--config.encoder.crops.all.{size}" for size in ("global_size=16", "local_size=8")]
RECIPE = [f"--config={ROOT / 'configs' / 'imagenet256.py'}", *CROPS]


def imported(capsys, *flags):
    return dlc(capsys, "import", "official", *flags, *RECIPE)


def same(one, two):
    """Names, types and bytes of two files are equal."""
    one, two = files.load(one), files.load(two)
    assert one.shapes == two.shapes and one.metadata == two.metadata
    for name in one.shapes:
        there, here = one.read(name), two.read(name)
        assert there.dtype == here.dtype and there.tobytes() == here.tobytes(), name


def test_the_published_networks_become_one_run_and_come_back(tmp_path, capsys):
    flags, run, back = published(tmp_path, "transformers"), tmp_path / "run", tmp_path / "back"
    out = imported(capsys, *flags, "--out", run)
    assert "2 kept aside, since nothing reads them: sem_cls_norm.weight" in out
    assert "1 kept aside, since nothing reads them: pos_embed" in out
    assert all(f"{part}: {tmp_path}" in out for part in ("encoder", "prior", "generator", "vae"))
    assert "dlc sample -w" in out and "dlc encode -w" in out and "dlc compose -w" in out
    assert "not complete" not in dlc(capsys, "info", run)
    config = recipe.of_run(run)
    assert (config.data.image, config.generator.model.image) == (IMAGE, LATENT)
    assert config.autoencoder.model.scaling == VAE["scaling"]
    assert config.autoencoder.model.groups == VAE["groups"]
    assert config.prior.model.positions == config.generator.model.positions == L
    assert config.generator.process.name == "ddpm"
    assert not (tmp_path / "run.partial").exists()
    dlc(capsys, "export", "official", "-w", run, "--out", back)
    for came, went in (("sem", "encoder"), ("sedd", "prior")):
        same(tmp_path / came, back / went)
    for part in ("transformer", "vae"):
        same(tmp_path / "dit" / part, back / "generator" / part)
    # what is written is read again
    flags = [f"--{part}={back / part}" for part in ("encoder", "prior", "generator")]
    imported(capsys, *flags, "--out", tmp_path / "again")
    again = recipe.of_run(tmp_path / "again")
    assert again.generator == config.generator and again.encoder == config.encoder
    # what is there is not written over, and what is unfinished not exported
    line = refused(capsys, "import", "official", *flags, "--out", run, *RECIPE)
    assert "is there already" in line
    export = ("export", "official", "-w", run, "--out")
    assert "is there already" in refused(capsys, *export, run)
    (run / "generator" / "done.json").unlink()
    assert "generator is not complete" in refused(capsys, *export, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    dlc(capsys, *export, tmp_path / "one", "--parts", "encoder")
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["encoder"]
    (run / "config.json").unlink()
    assert "holds no run" in refused(capsys, *export, tmp_path / "new")


@pytest.mark.slow
def test_an_encoder_of_one_layout_is_written_in_the_other(tmp_path, capsys):
    there = encoder(tmp_path / "hf", "transformers")
    later = {"attention.query": "q_proj", "attention.key": "k_proj", "attention.value": "v_proj"}
    later |= {"output.dense": "o_proj"}

    def renamed(name):
        """As the modules of transformers 5 have it, which its files do not."""
        old = next((old for old in later if f".attention.{old}." in name), None)
        return name.replace(f".attention.{old}.", f".attention.{later[old]}.") if old else name

    there = {renamed(name): tensor for name, tensor in there.items()}
    assert "encoder.layer.1.attention.o_proj.bias" in there
    put(tmp_path / "hf", "model.safetensors", there)
    here = encoder(tmp_path / "training")
    imported(capsys, "--encoder", tmp_path / "hf", "--out", tmp_path / "one")
    flags = ("--positions", L, "--out", tmp_path / "two")
    imported(capsys, "--encoder", tmp_path / "training", *flags)
    unused = {"sem_cls_norm.weight", "sem_cls_norm.bias"}
    for run, layout, wanted in (("one", "official", here), ("two", "transformers", there)):
        file = tmp_path / f"{layout}.safetensors"
        dlc(capsys, "export", "sem", tmp_path / run, "--out", file, "--layout", layout)
        found = files.load(file)
        names = found.shapes.keys()  # the head that the import drew is none of them
        wanted = {torch_names.clean(name): tensor for name, tensor in wanted.items()}
        assert names == wanted.keys() - unused
        assert all(np.array_equal(found.read(name), wanted[name]) for name in names)
    back = tmp_path / "back.safetensors"
    dlc(capsys, "export", "sem", tmp_path / "one", "--out", back)
    same(tmp_path / "hf", back)
    codes = []
    images = np.random.default_rng(0).integers(256, size=(3, 16, 16, 3), dtype=np.uint8)
    for run in ("one", "two"):
        with pipeline.load(tmp_path / run, batch=4) as loaded:
            codes.append(loaded.encode(images))
    np.testing.assert_array_equal(*codes)


@pytest.mark.slow
def test_the_run_encodes_samples_and_composes(tmp_path, capsys):
    run = tmp_path / "run"
    imported(capsys, *published(tmp_path, "official"), "--out", run)  # the prior tells L
    for name in "ab":
        image = np.random.default_rng(ord(name)).integers(256, size=(20, 20, 3), dtype=np.uint8)
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    pair = tmp_path / "a.png", tmp_path / "b.png"
    out = dlc(capsys, "encode", "-w", run, *pair)
    assert len(out.splitlines()[-1].partition(": ")[2].split()) == L
    steps = "--sampler.steps=2"
    dlc(capsys, "sample", "-w", run, "-n", 2, "--npz", tmp_path / "s.npz", steps)
    images = np.load(tmp_path / "s.npz")["arr_0"]
    assert images.shape == (2, IMAGE, IMAGE, 3) and images.std() > 0
    dlc(capsys, "compose", "-w", run, *pair, "--out", tmp_path / "c.png", steps)
    assert (tmp_path / "c.png").exists()


def test_shards_are_one_file(tmp_path, capsys):
    state = foreign_sedd.state()
    names, folder = sorted(state), tmp_path / "sedd"
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, part in halves.items():
        put(folder, shard, {name: state[name] for name in part})
    index = {"weight_map": {name: shard for shard, part in halves.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    found = files.load(folder)
    assert found.shapes.keys() == state.keys()
    assert all(np.array_equal(found.read(name), state[name]) for name in names)
    imported(capsys, "--prior", folder, "--out", tmp_path / "run")
    put(tmp_path, "whole.safetensors", state)
    dlc(capsys, "export", "sedd", tmp_path / "run", "--out", tmp_path / "back.safetensors")
    same(tmp_path / "whole.safetensors", tmp_path / "back.safetensors")

    def rejected(change=None, *words):
        changed = json.loads(json.dumps(index))
        if change:
            change(changed["weight_map"])
        (folder / "model.safetensors.index.json").write_text(json.dumps(changed))
        line = refused(capsys, "import", "official", "--prior", folder, "--out", tmp_path / "no")
        assert all(word in line for word in words), line
        assert not (tmp_path / "no").exists() and not (tmp_path / "no.partial").exists()

    first = names[0]
    rejected(lambda found: found.pop(first), f"{first} is not in the index")
    rejected(
        lambda found: found.update({first: "model-2.safetensors"}),
        f"{first} is in model-2.safetensors by the index, yet it is in this file",
    )
    rejected(lambda found: found.update(more="model-2.safetensors"), "more is not in model-2")
    rejected(
        lambda found: found.update({first: "../model-1.safetensors"}), "not an index of shards"
    )
    # a tensor that two shards have
    put(folder, "model-2.safetensors", {name: state[name] for name in [first, *names[1::2]]})
    rejected(None, f"model-2.safetensors: {first} is in model-1.safetensors by the index")
    (folder / "model-2.safetensors").unlink()
    rejected(None, "1 of 2 shards are missing (model-2.safetensors); fetch them too")


def test_an_autoencoder_that_was_imported_before_is_taken(tmp_path, capsys):
    generator(tmp_path / "dit")
    dlc(capsys, "import", "vae", tmp_path / "dit" / "vae", "--out", tmp_path / "vae")
    bare = tmp_path / "dit" / "transformer"
    out = imported(capsys, "--generator", bare, "--out", tmp_path / "none")
    assert "images need an autoencoder: import again with --vae" in out
    flags = ("--generator", bare, "--vae", tmp_path / "vae")
    out = imported(capsys, *flags, "--out", tmp_path / "run")
    assert "images need" not in out and not (tmp_path / "run" / "autoencoder").exists()
    section = recipe.of_run(tmp_path / "run").autoencoder
    assert section.path == str(tmp_path / "vae") and section.model.channels == VAE["channels"]


def damaged(path, change):
    """A safetensors file with another header, or fewer bytes."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    data = change(header, data)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def overlapping(header, data):
    one, two = [name for name in header if name != "__metadata__"][:2]
    header[two]["data_offsets"] = header[one]["data_offsets"]
    header[two]["shape"], header[two]["dtype"] = header[one]["shape"], header[one]["dtype"]
    return data


@pytest.mark.parametrize("change", [overlapping, lambda header, data: data[:-4]])
def test_truncated_and_overlapping_files_are_refused(change, tmp_path, capsys):
    file = put(tmp_path, "sedd.safetensors", foreign_sedd.state())
    damaged(file, change)
    line = refused(capsys, "import", "official", "--prior", file, "--out", tmp_path / "run")
    assert "is damaged, or not a safetensors file" in line
    assert not (tmp_path / "run").exists()


REFUSED = {
    "nothing": ([], "give --encoder, --prior, --generator or --vae"),
    "a pickle of more than tensors": (["--prior", "sedd/evil.pth"], "is a pickle of more than"),
    "shards of PyTorch": (["--prior", "sharded"], "is a folder; give the file of tensors"),
    "not finite": (["--encoder", "hf", "--prior", "nan"], "is not finite everywhere"),
    "another part": (["--encoder", "sedd"], "does not hold this kind of model"),
    "a file of no kind": (["--prior", "sedd/text.npz"], "neither .safetensors"),
    "a folder without tensors": (["--prior", "."], "is a folder; give the file of tensors"),
    "codes of other sizes": (
        ["--prior", "sedd", "--generator", "wide"],
        f"their codes differ (generator {L} x {V + 1}, prior {L} x {V})",
    ),
    "another prediction": (
        ["--generator", "velocity"],
        "prediction_type='v_prediction', and DDPM here has 'epsilon'",
    ),
    "other variances": (
        ["--generator", "scaled"],
        "beta_schedule='scaled_linear', and DDPM here has 'linear'",
    ),
    "another autoencoder": (["--vae", "shifted"], "shift_factor=0.1, and the autoencoder here"),
    "an autoencoder of other sizes": (
        ["--vae", "sizes"],
        "block_out_channels=[8, 8], and its tensors have [8, 16]",
    ),
    "settings that are no JSON": (["--vae", "broken"], "config.json cannot be read"),
    "L that is told otherwise": (
        ["--encoder", "hf", "--positions", "3"],
        f"has dlc_L={L}, not 3; leave --positions out",
    ),
    "L that nothing tells": (["--encoder", "sem"], "give --positions or --values"),
    "a recipe without latents": (
        ["--generator", "scaled/../plain", f"--config={ROOT / 'configs' / 'quickstart.py'}:tiny"],
        "give another --config, such as configs/imagenet256.py",
    ),
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """Folders that fit badly."""
    from foreign_dit import official
    from foreign_official import BETAS, vae, vae_settings

    here = tmp_path_factory.mktemp("bad")
    put(here / "sedd", "model.safetensors", foreign_sedd.state())
    (here / "sedd" / "text.npz").write_text("")
    with zipfile.ZipFile(here / "sedd" / "evil.pth", "w") as archive:
        archive.writestr("archive/data.pkl", b"cos\nsystem\n(S'exit 1'\ntR.")
    nan = foreign_sedd.state() | {"output_layer.linear.bias": np.full(V + 1, np.nan, np.float32)}
    put(here / "nan", "model.safetensors", nan)
    (here / "sharded").mkdir()
    (here / "sharded" / "pytorch_model.bin.index.json").write_text("{}")
    encoder(here / "sem")
    encoder(here / "hf", "transformers")
    put(here / "wide", "model.safetensors", official(codes=(L, V + 1), width=384, depth=1))
    generator(here / "plain")
    generator(here / "velocity", scheduler={"prediction_type": "v_prediction"})
    generator(here / "scaled", scheduler=BETAS | {"beta_schedule": "scaled_linear"})
    for name, change in {
        "shifted": {"shift_factor": 0.1},
        "sizes": {"block_out_channels": [8, 8]},
        "broken": {},
    }.items():
        put(here / name, "model.safetensors", vae(), vae_settings() | change)
    (here / "broken" / "config.json").write_text("{")
    return here


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case, bad, tmp_path, capsys):
    flags, words = REFUSED[case]
    flags = [flag if flag.startswith("-") or flag.isdecimal() else bad / flag for flag in flags]
    recipe = [] if any(str(flag).startswith("--config=") for flag in flags) else RECIPE
    line = refused(capsys, "import", "official", *flags, "--out", tmp_path / "run", *recipe)
    assert words in line and not list(tmp_path.iterdir()), line
