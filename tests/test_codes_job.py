"""The codes job on an encoder of random weights: its records, how it goes on, what it refuses.

And dlc codes info | verify.
"""

import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ROOT
from recipes import load
from test_cli import refused

from dlc_jax import agenda, checkpoint, cli, parallel, pipeline
from dlc_jax import recipe as recipes
from dlc_jax import workdir as home
from dlc_jax.data import codes, progress, sources
from dlc_jax.errors import UserError
from dlc_jax.models.autoencoder import Autoencoder
from dlc_jax.models.encoder import Encoder
from dlc_jax.networks import Networks
from dlc_jax.networks.autoencoder import AutoencoderNetwork
from dlc_jax.stages import STAGES

COUNT, SHARD = 50, 16  # the last shard holds two
VAE = dict(channels=(8, 16), residuals=1, latent=2, groups=4, scaling=1.0)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The quickstart with a narrow encoder, and an autoencoder."""
    encoder = {"backbone.width": 16, "backbone.depth": 1, "backbone.heads": 2}
    encoder |= {"simplicial.positions": 6, "simplicial.values": 8}
    encoder |= {"dino.prototypes": 8, "dino.hidden": 8, "dino.bottleneck": 4}
    lines = {f"encoder.model.{name}": value for name, value in encoder.items()}
    lines |= {f"autoencoder.model.{name}": value for name, value in VAE.items()}
    lines |= {"codes.splits": ("train",), "codes.batch": 8, "codes.shard_size": SHARD}
    lines |= {"autoencoder.path": str(tmp_path_factory.mktemp("weights") / "vae")}
    lines |= {"data.count": COUNT, "steps": ("encoder", "codes")}
    config = load("quickstart.py:tiny", lines)
    save(config.autoencoder.path, Autoencoder(**VAE), config.data.image, seed=1)
    return config


def shapes_of(model, image):
    inputs = jnp.zeros((1, image, image, 3))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), inputs)["params"])


def save(directory, model, image, *, seed):
    """A checkpoint of random weights, as training or an import leaves it."""
    shapes = shapes_of(model, image)
    random = np.random.default_rng(seed)
    tree = jax.tree.map(lambda leaf: 0.5 * random.standard_normal(leaf.shape, np.float32), shapes)
    saved = checkpoint.Checkpoints(f"{directory}/checkpoints")
    saved.save(24, {"ema": tree}, None, {"identity": {}})
    saved.close()


@pytest.fixture
def config(recipe):
    return recipe.copy_and_resolve_references()


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    """A workdir whose encoder is complete."""
    workdir = tmp_path_factory.mktemp("trained") / "W"
    model = recipes.build(Encoder, recipe.encoder.model)
    save(workdir / "encoder", model, recipe.data.image, seed=0)
    (workdir / "config.json").write_text(json.dumps(recipe.to_dict()))
    home.mark_done(workdir / "encoder", {"steps": 24})
    return workdir


@pytest.fixture
def workdir(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "W")


def make(config, workdir):
    return STAGES["codes"](config, step="codes", workdir=workdir)


def run(config, workdir, *, devices=1):
    (workdir / "codes").mkdir(exist_ok=True)
    mesh = parallel.make_mesh(devices=jax.devices()[:devices])
    return make(config, workdir).run(mesh, workdir / "codes")


def contents(workdir):
    paths = sorted((workdir / "codes" / "train").iterdir())
    return {path.name: path.read_bytes() for path in paths}


def images(config):
    source = sources.source(split="train", **config.data)
    return np.stack([source[index]["image"] for index in range(COUNT)])


def test_flipped_views_and_moments_are_fields_of_their_own(config, workdir):
    config.codes.update(dict(autoencoder="autoencoder", flip=True))
    found = run(config, workdir)
    assert found["codes/train_count"] == COUNT and found["codes/images_per_s"] > 0
    store = codes.CodeStore(workdir / "codes" / "train")
    latent, names, views = ["float16", [8, 8, 2]], ("mean", "logvar"), ("", "_flipped")
    moments = {f"latent_{name}{view}": latent for name in names for view in views}
    assert store.manifest["fields"] == moments | {"codes_flipped": ["uint8", [6]]}
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    coder = Networks(config, workdir, mesh, batch=8)["encoder"]
    model, rows = Autoencoder(**VAE), [store[index] for index in range(COUNT)]
    shapes = shapes_of(model, 16)
    placed = parallel.abstract(shapes, parallel.shardings(shapes, mesh, strict=False))
    params = checkpoint.load_params(f"{config.autoencoder.path}/checkpoints", placed)
    for view, seen in (("", images(config)), ("_flipped", images(config)[:, :, ::-1])):
        np.testing.assert_array_equal([row[f"codes{view}"] for row in rows], coder.encode(seen))
        expected = model.apply({"params": params}, jnp.asarray(seen) / 127.5 - 1, method="encode")
        for name in ("mean", "logvar"):
            stored = np.stack([row[f"latent_{name}{view}"] for row in rows])
            assert stored.dtype == np.float16 and stored.std() > 0.1
            np.testing.assert_allclose(stored, expected[name], rtol=2e-3, atol=2e-2)
    found = store.manifest["statistics"]["latent"]
    mean, logvar = (
        np.stack([row[f"latent_{name}{view}"] for row in rows for view in views]).astype(float)
        for name in names
    )
    std = np.sqrt(mean.var((0, 1, 2)) + np.exp(logvar).mean((0, 1, 2)))
    np.testing.assert_allclose(found["mean"], mean.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(found["std"], std, rtol=1e-6)
    assert found["count"] == 2 * COUNT * 8 * 8
    assert any((row["codes"] != row["codes_flipped"]).any() for row in rows)


def test_moments_need_weights(config, workdir):
    config.codes.autoencoder = "autoencoder"
    config.autoencoder.path = ""
    said = "autoencoder has no weights: make some by dlc import vae.*config.autoencoder.path"
    with pytest.raises(UserError, match=said):
        run(config, workdir)
    config.codes.autoencoder = "vae"
    with pytest.raises(UserError, match="codes.autoencoder='vae' is not a section"):
        make(config, workdir)
    config.encoder.model.simplicial["values"] = 65537
    with pytest.raises(UserError, match="codes of 65537 values cannot be stored; use 1 to 65536"):
        make(config, workdir)


@pytest.fixture
def with_latents(config, workdir):
    """A workdir whose store has latents."""
    config.codes.autoencoder = "autoencoder"
    run(config, workdir)
    return workdir


def test_latents_of_another_autoencoder_are_refused(config, with_latents, tmp_path):
    store = codes.CodeStore(with_latents / "codes" / "train")
    coder = AutoencoderNetwork(config, "autoencoder")
    coder.check(store)
    mean, std = (store.manifest["statistics"]["latent"][name] for name in ("mean", "std"))
    normalizer = coder.normalizer(store, 0.5)
    np.testing.assert_allclose(normalizer.mean, np.multiply(coder.scaling, mean), rtol=1e-6)
    np.testing.assert_allclose(normalizer.std, np.multiply(coder.scaling, std), rtol=1e-6)
    other = str(tmp_path / "other")
    save(other, Autoencoder(**VAE), config.data.image, seed=2)
    config.autoencoder.path = other
    said = "codes/train has latents of another autoencoder .* as autoencoder.path"
    with pytest.raises(UserError, match=said):
        AutoencoderNetwork(config, "autoencoder").check(store)
    with pytest.raises(UserError, match=said):  # what has other latents is not made over
        make(config, with_latents).is_intact(with_latents / "codes")
    config.codes.path = str(with_latents / "codes")
    with pytest.raises(UserError, match=said):
        run(config, with_latents)


def test_weights_of_another_model_are_refused_before_anything_is_trained(config, workdir, tmp_path):
    wrong = str(tmp_path / "wrong")
    save(wrong, Autoencoder(**VAE | {"latent": 3}), config.data.image, seed=1)
    config.codes.autoencoder, config.autoencoder.path = "autoencoder", wrong
    said = "autoencoder: 'ema' of .* does not fit .*; give --config.autoencoder.path and .model as"
    with pytest.raises(UserError, match=said):
        agenda_of(config, workdir)


def test_a_store_of_before_there_were_statistics_gets_them(config, with_latents):
    whole, path = contents(with_latents), with_latents / "codes" / "train" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["statistics"]
    for entry in manifest["shards"]:
        del entry["latent"]
    path.write_text(json.dumps(manifest))
    store = codes.CodeStore(path.parent)  # its codes are read as before
    assert len(store.codes([0, 1])) == 2
    with pytest.raises(UserError, match="no statistics of latents; run the codes step again"):
        AutoencoderNetwork(config, "autoencoder").normalizer(store)
    assert not make(config, with_latents).is_intact(with_latents / "codes")
    run(config, with_latents)
    assert contents(with_latents) == whole
    assert make(config, with_latents).is_intact(with_latents / "codes")


def test_latents_that_are_not_finite_are_refused(config, workdir, monkeypatch):
    encode = AutoencoderNetwork.encode

    def broken(self, params, images):
        found = encode(self, params, images)
        bright = images.mean(axis=(1, 2, 3)) == images.mean(axis=(1, 2, 3)).max()  # one in a batch
        return found | {"mean": jnp.where(bright[:, None, None, None], jnp.nan, found["mean"])}

    monkeypatch.setattr(AutoencoderNetwork, "encode", broken)
    config.codes.autoencoder = "autoencoder"
    first = int(np.argmax(images(config)[:8].astype(np.float32).mean((1, 2, 3))))
    said = f"encoding record {first} gave latent_mean that is not finite; look at that image"
    with pytest.raises(UserError, match=said):
        run(config, workdir)
    assert not (workdir / "codes" / "train" / "manifest.json").exists()


def killed_at(monkeypatch, dies_at):
    """The job dies at record `dies_at`, in the middle of a shard."""
    read = sources.DataSet.source

    class Dying:
        def __init__(self, source):
            self.source = source

        def __len__(self):
            return len(self.source)

        def __getitem__(self, index):
            if index == dies_at:
                raise KeyboardInterrupt
            return self.source[index]

    dying = lambda *args, **options: Dying(read(*args, **options))  # noqa: E731
    monkeypatch.setattr(sources.DataSet, "source", dying)


@pytest.mark.parametrize("dies_at", [0, 20, 49])
def test_killed_within_a_shard_it_goes_on_there_on_more_devices_with_the_same_bytes(
    dies_at, config, workdir, tmp_path, monkeypatch
):
    if dies_at == 20:  # and statistics of latents are the same
        config.codes.autoencoder = "autoencoder"
    if dies_at == 49:
        config.codes.embedding = "summary"
    whole = shutil.copytree(workdir, tmp_path / "whole")
    run(config, whole)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        killed_at(patch, dies_at)
        run(config, workdir)
    shards, names = workdir / "codes" / "train", contents(workdir)
    kept = {name: (shards / name).stat().st_ino for name in names if name.endswith("record")}
    assert len(kept) == dies_at // SHARD
    config.codes.batch = 16
    run(config, workdir, devices=2)
    assert contents(workdir) == contents(whole)
    assert all((shards / name).stat().st_ino == inode for name, inode in kept.items())


def processes(workdir, count):
    """Starts the command in `count` processes, each with one device and its share of the batch."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "dlc_jax.main", f"--config={workdir}/config.json"]
    command += [f"--config.codes.batch={8 * count}"]
    usual = os.environ | {
        "XLA_FLAGS": "",
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
    }
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    own = [usual | {"JAX_PROCESS_ID": str(p)} for p in range(count)]
    return [subprocess.Popen(command, env=each, **options) for each in own]


def ended(started):
    for process in started:
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err.decode()


@pytest.mark.slow
def test_two_processes_give_the_bytes_of_one(config, workdir, tmp_path):
    """Killed as soon as a shard is complete, then again to the end."""
    config.codes.update(dict(autoencoder="autoencoder", embedding="summary", flip=True))
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    whole = shutil.copytree(workdir, tmp_path / "whole")
    ended(processes(whole, 1))  # also a command: convolutions depend on XLA_FLAGS
    started = processes(workdir, 2)
    while all(process.poll() is None for process in started):
        if list(workdir.glob("codes/train/*.arrayrecord")):
            break
        time.sleep(0.01)
    for process in started:
        process.kill()
    for process in started:
        process.communicate()
    ended(processes(workdir, 2))
    assert contents(workdir) == contents(whole)


@pytest.fixture(scope="module")
def coded(recipe, trained, tmp_path_factory):
    """A workdir whose codes are complete too."""
    workdir = shutil.copytree(trained, tmp_path_factory.mktemp("coded") / "W")
    run(recipe.copy_and_resolve_references(), workdir)
    home.mark_done(workdir / "codes", agenda_of(recipe, workdir)["codes"].facts)
    return workdir


@pytest.fixture
def complete(coded, tmp_path):
    return shutil.copytree(coded, tmp_path / "complete")


def agenda_of(config, workdir):
    made = agenda.make(config, workdir, parallel.make_mesh(devices=jax.devices()[:1]))
    return {entry.name: entry for entry in agenda.read(config, workdir, made)}


def damaged(workdir, kind):
    """The first shard of a store, made worse."""
    path = workdir / "codes" / "train" / "codes-00000-of-00004.arrayrecord"
    data = path.read_bytes()
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(data[:-100])
    else:
        path.write_bytes(data[:300] + bytes([data[300] ^ 1]) + data[301:])
    return path


@pytest.mark.parametrize("kind", ["missing", "truncated", "changed"])
def test_damaged_shards_are_found_and_made_again_by_the_same_command(
    kind, config, complete, capsys
):
    want = contents(complete)
    assert agenda_of(config, complete)["codes"].skip == "complete"
    path = damaged(complete, kind)
    line = refused(capsys, "codes", "verify", complete)
    assert str(path) in line and ("delete it" in line) == (kind == "changed")
    with pytest.raises(UserError, match=path.name):
        codes.CodeStore(path.parent).codes()
    if kind == "changed":
        path.unlink()
    assert agenda_of(config, complete)["codes"].skip == ""
    run(config, complete)
    assert contents(complete) == want
    assert agenda_of(config, complete)["codes"].skip == "complete"


def test_codes_of_another_encoder_are_refused(config, complete, tmp_path, capsys):
    """Put in the place of one's own, and by `path` beside an encoder that did not make them."""
    other = tmp_path / "other"
    model = recipes.build(Encoder, config.encoder.model)
    save(other / "encoder", model, config.data.image, seed=5)
    home.mark_done(other / "encoder", {"steps": 24})
    (other / "config.json").write_text(json.dumps(config.to_dict()))
    config.codes.path = str(complete / "codes")
    said = "complete/codes/train was made by another encoder .*codes.path left out"
    with pytest.raises(UserError, match=said):
        run(config, other)
    # beside the one that did
    assert run(config, tmp_path / "complete")["codes/train_count"] == COUNT
    config.codes.path = ""
    shutil.copytree(complete / "codes", other / "codes", dirs_exist_ok=True)
    before = contents(other)
    with pytest.raises(UserError, match="other/codes/train was made by another encoder"):
        agenda_of(config, other)
    probe = ("probe", other, "--splits", "train", "--count", "8")
    for call in (("codes", "info", other), ("codes", "verify", other), probe):
        assert "was made by another encoder" in refused(capsys, *call)
    assert contents(other) == before


def test_info_and_verify_say_what_there_is(complete, capsys):
    assert cli.main(["codes", "info", str(complete)]) == 0
    out, encoder = capsys.readouterr().out, complete / "encoder" / "checkpoints"
    assert f"{complete}/codes/train: 50 codes in 4 shards" in out
    assert "6 positions of 8 values, uint8" in out and '"split": "train"' in out
    assert checkpoint.identity_of(encoder) in out
    assert cli.main(["codes", "verify", str(complete)]) == 0
    assert capsys.readouterr().out == f"verified 50 codes in 4 shards of {complete}/codes\n"


def without_dtype(workdir, train):
    """A complete run from before codes had a dtype: neither recipe nor manifest says one."""
    for path in (workdir / "config.json", workdir / "codes" / "train" / "manifest.json"):
        found = json.loads(path.read_text())
        found.pop("computed", None)
        if "encoder" in found:
            del found["codes"]["dtype"]
            found["encoder"]["train"]["dtype"] = train
        path.write_text(json.dumps(found))
    return recipes.of_run(workdir)


def test_codes_are_of_the_dtype_that_the_recipe_and_the_manifest_say(config, workdir, capsys):
    config.codes.dtype = "bfloat16"
    run(config, workdir)
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    store = codes.CodeStore(workdir / "codes" / "train")
    assert store.manifest["computed"] == store.origin["computed"] == "bfloat16"
    assert cli.main(["codes", "info", str(workdir)]) == 0
    assert "computed in bfloat16\n" in capsys.readouterr().out
    p = pipeline.load(workdir, batch=8)
    np.testing.assert_array_equal(p.encode(images(config)), store.codes())
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves(p.networks["encoder"].params)}
    assert kinds == {"bfloat16", "float32"}
    config.codes.dtype = "float16"
    said = "codes.dtype='float16' is unknown; known: float32, bfloat16"
    with pytest.raises(UserError, match=said):
        make(config, workdir)


def test_codes_of_another_dtype_are_refused(config, complete):
    """In one's own place, where the recipe says otherwise now, and by `path`."""
    made = agenda.make(config, complete, parallel.make_mesh(devices=jax.devices()[:1]))
    home.remember(complete, config.to_dict(), agenda.operational(made))
    config.codes.dtype = "bfloat16"
    with pytest.raises(UserError, match='another config .codes.dtype: "float32" -> "bfloat16"'):
        home.remember(complete, config.to_dict(), agenda.operational(made))
    wrong = "was computed in float32, and codes.dtype is bfloat16: give --config.codes.dtype="
    wrong += "float32"
    with pytest.raises(UserError, match=wrong):
        agenda_of(config, complete)
    config.codes.path = str(complete / "codes")
    with pytest.raises(UserError, match=wrong):
        run(config, complete)


@pytest.mark.parametrize("train", ["float32", "bfloat16"])
def test_a_run_of_before_codes_had_a_dtype_is_read_as_it_was_made(train, complete, capsys):
    config = without_dtype(complete, train)
    assert agenda_of(config, complete)["codes"].skip == "complete"
    assert cli.main(["codes", "info", str(complete)]) == 0
    after = {"float32": "\n", "bfloat16": " throughout, the residual stream too"}[train]
    assert f"computed in {train}{after}" in capsys.readouterr().out
    params = pipeline.load(complete).networks["encoder"].params
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {train}
    damaged(complete, "missing")
    run(config, complete)
    assert "computed" not in codes.CodeStore(complete / "codes" / "train").manifest


def test_what_there_is_nothing_to_verify_of(workdir, complete, capsys):
    assert "no complete code store" in refused(capsys, "codes", "verify", workdir)
    config = json.loads((complete / "config.json").read_text())
    (complete / "config.json").write_text(json.dumps({**config, "codes": {}}))
    assert "no section with stage='codes'" in refused(capsys, "codes", "info", complete)


def test_progress_tells_images_a_second_and_the_time_left(config, workdir, capsys, monkeypatch):
    seconds = itertools.count()
    clock = types.SimpleNamespace(monotonic=lambda: float(next(seconds)))
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run(config, workdir)
    drawn = capsys.readouterr().err.split("\r")
    shown = re.compile(r"codes: 40/50 images, \d+ images/s, \d+ s left *")
    assert any(map(shown.fullmatch, drawn)), drawn
