"""dlc export torch as a person runs it: what is in the folder, what PyTorch makes of it alone."""

import ast
import json
import os
import subprocess
import sys

import hub_folders
import jax
import numpy as np
import pytest
import recipes
from hub_folders import close, modeling
from packages import import_or_skip
from safetensors import numpy as safetensors_numpy
from test_cli import refused
from test_codes_job import VAE

from dlc_jax import checkpoint, cli, recipe, workdir
from dlc_jax.cli import export_torch, weights
from dlc_jax.diffusion import sample
from dlc_jax.errors import UserError
from dlc_jax.interop import hub_card, hub_names, slots
from dlc_jax.models.autoencoder import Autoencoder
from dlc_jax.models.tiny_autoencoder import TinyAutoencoder
from dlc_jax.networks import KINDS, GeneratorNetwork
from dlc_jax.networks.network import keys
from dlc_jax.parallel import make_mesh

SMALL = {"width": 32, "depth": 2, "heads": 2}
LINES = {f"*.model*.{name}": value for name, value in SMALL.items()}
LINES |= {"*.model*positions": 6, "*.model*values": 8, "encoder.model.dino.prototypes": 8}
LINES["samples.sampler.guidance.scale"] = 1.5
TINY = {"channels": 8, "blocks": 1, "latent": 2, "groups": 2}
STEPS = ("encoder", "prior", "generator")


def make(place, lines=()):
    """A run whose networks are complete, with random weights; its config."""
    config = recipes.load("quickstart.py:tiny", {**LINES, **dict(lines)})
    workdir.remember(place, config.to_dict(), present=recipe.read_back)
    for step in STEPS:
        save(place / step, slots.shapes_of(kind(config, place, step).shapes), 0.3)
        workdir.mark_done(place / step, {"steps": 24, "after": {}, "settings": {}})
    workdir.merge_results(place, {"codes/entropy": 2.5, "seconds/total": 8.0, "commit": "abc"})
    return config


def save(place, shapes, scale):
    """A checkpoint of random weights."""
    random = np.random.default_rng(0)
    params = {
        path: scale * random.standard_normal(shape, np.float32) for path, shape in shapes.items()
    }
    weights.save(place, params, step=24, model={})


def kind(config, place, step, mesh=None):
    settings = {"mesh": mesh, "batch": 8, "dtype": None}
    return KINDS[config[step].stage](config, place, step, **settings)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    place = tmp_path_factory.mktemp("run") / "W"
    place.mkdir()
    return place, make(place)


def export(capsys, place, out, *flags):
    arguments = ["export", "torch", "-w", place, "--out", out, *flags]
    assert cli.main([str(argument) for argument in arguments]) == 0, capsys.readouterr()
    return capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_is_what_was_trained(dtype, finished, tmp_path, capsys):
    """Every parameter of every network, under its name, byte for byte."""
    place, config = finished
    out = tmp_path / "out"
    said = export(capsys, place, out, "--dtype", dtype, "--license", "cc0-1.0")
    assert f"wrote {out}" in said and dtype in said
    tables = {"encoder": hub_names.encoder}
    for step in STEPS:
        shapes = kind(config, place, step).shapes
        params = checkpoint.load_params(place / step / "checkpoints", shapes)
        params = {path: np.asarray(array) for path, array in slots.flat(params).items()}
        heads = ("head/",) if step == "encoder" else ()
        params = {path: array for path, array in params.items() if not path.startswith(heads)}
        own = {path: array.shape for path, array in params.items()}
        table = tables.get(step, hub_names.network)(own)
        constants = hub_names.scales(own) if step == "encoder" else {}
        file = out / step / "model.safetensors"
        found = hub_names.read(file, table, own, constants)
        assert found.keys() == params.keys()
        for path, array in params.items():
            array = array.astype(weights.dtype(dtype))
            assert (found[path].dtype, found[path].tobytes()) == (array.dtype, array.tobytes())
        raw = safetensors_numpy.load_file(file)
        assert {array.dtype for array in raw.values()} == {np.dtype(weights.dtype(dtype))}
    block = params["blocks/attention/qkv/kernel"][1].reshape(32, -1).T
    np.testing.assert_array_equal(
        raw["blocks.1.attention.qkv.weight"].astype(np.float32),
        block.astype(weights.dtype(dtype)).astype(np.float32),
    )
    files = {path.name for path in out.iterdir()}
    code = {"modeling_dlc.py", "networks_dlc.py", "transformers_dlc.py", "pipeline.py"}
    rest = {"config.json", "model_index.json", "model_card.md", "run.json"}
    assert files == {*STEPS, *code, *rest}
    card = (out / "model_card.md").read_text()
    for part in ("license: cc0-1.0", "abc", "codes/entropy | 2.5", "shapes", "from_pretrained"):
        assert part in card
    assert "seconds" not in card and str(tmp_path) not in card
    assert not [path for path in tmp_path.iterdir() if path != out]


def test_what_is_damaged_is_refused(finished, tmp_path, capsys):
    place, config = finished
    export(capsys, place, tmp_path / "out", "--steps", "prior")
    assert {path.name for path in (tmp_path / "out").iterdir()}.isdisjoint({"encoder", "generator"})
    file = tmp_path / "out" / "prior" / "model.safetensors"
    shapes = slots.shapes_of(kind(config, place, "prior").shapes)
    table = hub_names.network(shapes)
    tensors = safetensors_numpy.load_file(file)
    good = hub_names.read(file, table, shapes, {})
    for name in ("encoder.layer.0.layer_scale1.lambda1", "final.bias"):
        rest = {key: row for key, row in table.items() if key != name}
        with pytest.raises(UserError, match=f"{name} is not what it is made of"):
            hub_names.read(file, rest, shapes, {name: np.ones(8, np.float32)})
    for name, change in {"pos_embed": lambda x: x[:-1], "final.weight": lambda x: None}.items():
        other = tensors | {name: change(tensors[name])}
        kept = {name: np.ascontiguousarray(x) for name, x in other.items() if x is not None}
        safetensors_numpy.save_file(kept, file)
        with pytest.raises(UserError, match=f"{name} is"):
            hub_names.read(file, table, shapes, {})
    for other in (good["pos_embed"] + 1, good["pos_embed"].view(np.int32)):
        with pytest.raises(UserError, match="pos_embed was not written as it is"):
            hub_names.check(good | {"pos_embed": other}, good, file)


def test_nothing_is_left_of_an_export_that_fails(finished, tmp_path, capsys, monkeypatch):
    def check(found, params, where):
        raise UserError("a disk that forgets")

    monkeypatch.setattr(hub_names, "check", check)
    flags = ("export", "torch", "-w", finished[0], "--out", tmp_path / "out")
    assert "a disk that forgets" in refused(capsys, *flags)
    assert not list(tmp_path.iterdir())


def changed(finished, place, lines):
    """The run with another recipe: links to its networks."""
    place.mkdir()
    for step in STEPS:
        (place / step).symlink_to(finished[0] / step)
    config = recipe.changed(finished[1], lines)
    workdir.remember(place, config.to_dict(), present=recipe.read_back)
    return place


REFUSED = {
    "prior.process.name='uniform'": {"prior.process.name": "uniform"},
    "samples.sampler.method='sde'": {"samples.sampler.method": "sde"},
    "samples.sampler.churn=2.0": {"samples.sampler.churn": 2.0},
    "samples.sampler.guidance.base='runs/small'": {"samples.sampler.guidance.base": "runs/small"},
    "samples.code_sampler.method='maskgit'": {"samples.code_sampler.method": "maskgit"},
    "samples.code_sampler.method='auto'": {
        "samples.code_sampler.method": "auto",
        "samples.code_sampler.calls": 3,
    },
    "samples.code_sampler.nucleus=0.9": {"samples.code_sampler.nucleus": 0.9},
    "encoder.model.backbone: 'vit' of 1 channels": {"encoder.model.backbone.channels": 1},
    "step 'generator' of": {"generator.train.steps": 48},
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_pytorch_has_not_is_refused_by_name(said, finished, tmp_path, capsys):
    place = changed(finished, tmp_path / "W", REFUSED[said])
    flags = ("export", "torch", "-w", place, "--out", tmp_path / "out")
    assert said in refused(capsys, *flags)
    assert not (tmp_path / "out").exists()
    if said.endswith(("'sde'", "'runs/small'")):
        export(capsys, place, tmp_path / "out", "--plain-samplers", "--steps", "generator")
        how = json.loads((tmp_path / "out" / "generator" / "config.json").read_text())["sampler"]
        assert how["method"] == "heun" and how["guidance"] == (1.0 if "base" in said else 1.5)


def test_bad_input_in_one_line(finished, tmp_path, capsys):
    flags = ("export", "torch", "-w", finished[0], "--out", tmp_path)
    (tmp_path / "there").touch()
    assert "is there already" in refused(capsys, *flags)
    flags = ("export", "torch", "-w", finished[0], "--out", tmp_path / "out", "--steps")
    assert "--steps=head is none of encoder" in refused(capsys, *flags, "head")
    assert "has no autoencoder" in refused(capsys, *flags, "encoder,autoencoder")
    flags = ("export", "torch", "--out", tmp_path / "out", "-w")
    assert "does not exist" in refused(capsys, *flags, tmp_path / "nowhere")
    place = changed(finished, tmp_path / "W", {"codes.dtype": "bfloat16"})
    (place / "prior").unlink()
    assert "step 'prior' of" in refused(capsys, *flags, place)
    said = export(capsys, place, tmp_path / "out", "--steps", "encoder,generator")
    assert "codes were computed in bfloat16, here in float32" in said


ALONE = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("jax", "jaxlib", "flax", "dlc_jax", "numpy", "diffusers"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
sys.path.insert(0, sys.argv[1])
import torch
from modeling_dlc import DLCPipeline

torch.set_num_threads(1)
p = DLCPipeline.from_pretrained(sys.argv[1])
a, b = torch.randint(256, (2, 1, 16, 16, 3), dtype=torch.uint8, generator=torch.manual_seed(0))
assert p.compose([a, b], "refine", seed=1).shape == (1, 6)
zeros, ones = torch.zeros(64, 6, dtype=int), torch.ones(64, 6, dtype=int)
for operator in ("coin", "infill", "refine"):
    codes = p.compose([zeros, ones], operator, keep=[0], seed=1, temperature=0.5, weights=[1, 2])
    assert (codes[:, 0] == 0).all(), operator
    images = p.decode(codes, seed=2)
    assert (images.shape, images.dtype) == ((64, 16, 16, 3), torch.uint8)
    assert images.float().std() > 1
    copied = {value: (codes[:, 1:] == value).float().mean() for value in (0, 1)}
    if operator == "coin":
        assert abs(copied[1] - 2 / 3) < 0.08 and copied[0] + copied[1] == 1
whole = p.compose([zeros, ones], "infill", share=1.0, seed=1)
assert torch.equal(whole, p.compose([zeros, ones], seed=1)) and whole.max() == 1
part = p.compose([zeros, ones], "infill", share=0.5, seed=1)
assert ((part == whole).sum(1) >= 3).all() and (part != whole).any()  # 3 of 6 at least are kept
drawn = p.redraw(zeros, 0.5, keep=[2], seed=3)
assert ((drawn == 0).sum(1) >= 3).all() and (drawn != 0).any() and (drawn[:, 2] == 0).all()
last = p.redraw(zeros, 1 / 6, keep=range(5), seed=3)[:, 5]
assert (last != 0).float().mean() > 0.5  # of those that are not kept the least likely
again = p.decode(codes, seed=2)
assert torch.equal(images, again) and not torch.equal(images, p.decode(codes, seed=3))
assert p.sample(3, code_how={"steps": 2}, steps=2, guidance=1).shape == (3, 16, 16, 3)
narrow = DLCPipeline.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
wide, narrow = p.decode(codes, seed=2).int(), narrow.decode(codes, seed=2).int()
assert (wide - narrow).abs().float().mean() < 20
print(sorted(name for name in sys.modules if name in ("jax", "dlc_jax", "flax")))
"""


@pytest.mark.torch
def test_pytorch_alone_composes_images(finished, tmp_path, capsys):
    """By all operators, where neither jax nor dlc_jax can be imported."""
    pytest.importorskip("torch", reason="parity needs the extra torch")
    export(capsys, finished[0], tmp_path / "out")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    call = [sys.executable, "-c", ALONE, str(tmp_path / "out")]
    done = subprocess.run(call, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def latents(name, folder, fields, model):
    """A run of normalized latents by an autoencoder of this name, with random weights."""
    lines = {f"autoencoder.model.{key}": value for key, value in fields.items()}
    lines |= {"autoencoder.model.name": name, "autoencoder.path": str(folder / "vae")}
    lines["autoencoder.model.scaling"] = 0.18215
    side = 2 if name == "tiny" else 8
    lines |= {"codes.autoencoder": "autoencoder", "generator.latents": True}
    lines |= {"generator.normalize": True, "generator.model.image": side}
    lines |= {"generator.model.patch": side // 2, "generator.model.channels": 2}
    lines |= {"generator.process.name": "edm"}
    place = folder / "W"
    place.mkdir()
    config = make(place, lines)
    save(folder / "vae", weights.shapes(model, (1, 16, 16, 3)), 0.15)
    _store(place, folder / "vae", config)
    return place, config


@pytest.mark.torch
@pytest.mark.parametrize("name", ["tiny", "kl"])
def test_images_of_latents(name, tmp_path, capsys):
    """Normalized latents of the same noise, by the tiny decoder and by diffusers' AutoencoderKL."""
    fields, kind = (TINY, TinyAutoencoder) if name == "tiny" else (VAE, Autoencoder)
    place, config = latents(name, tmp_path, fields, kind(**fields))
    if name == "kl":
        import_or_skip("diffusers")
    export(capsys, place, tmp_path / "out")
    found = modeling().DLCPipeline.from_pretrained(tmp_path / "out")
    network = GeneratorNetwork(config, place, "generator", mesh=make_mesh(), batch=8, dtype=None)
    codes, side = np.random.default_rng(0).integers(8, size=(8, 6)), config.generator.model.image
    shape = (side, side, 2)
    sampler = recipe.build(sample.Sampler, config.samples.sampler)
    expected = network.decode(codes, seed=5, sampler=sampler)
    noise = np.array(sample._normal(keys(5, 8), shape))
    import torch

    images = found.decode(torch.tensor(codes), noise=torch.tensor(noise)).numpy()
    assert ((expected > 0) & (expected < 255)).mean() > 0.3
    assert np.abs(images.astype(int) - expected).max() <= 2
    found.autoencoder = None
    with pytest.raises(ValueError, match="has no autoencoder"):
        found.decode(torch.tensor(codes))


def _store(place, vae, config):
    """What a code store says of its latents."""
    identity = checkpoint.identity_of(vae / "checkpoints")
    manifest = {"format": 1, "dtype": "uint8", "positions": 6, "shards": [], "shard_size": 8}
    manifest |= {"fields": {"latent_mean": ["float16", [2, 2, 2]]}}
    manifest |= {"view": {"latents": {"autoencoder": identity}}}
    manifest |= {"statistics": {"latent": {"mean": [0.1, -0.2], "std": [0.7, 1.3], "count": 9}}}
    (place / "codes" / "train").mkdir(parents=True)
    (place / "codes" / "train" / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.torch
def test_hubs_load_the_folder(finished, tmp_path, capsys, monkeypatch):
    """transformers the encoder, with its head or the backbone alone; diffusers the pipeline."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers, diffusers = import_or_skip("transformers"), import_or_skip("diffusers")
    import torch

    for where in ("transformers.dynamic_module_utils", "diffusers.utils.dynamic_modules_utils"):
        monkeypatch.setattr(f"{where}.HF_MODULES_CACHE", str(tmp_path / "modules"))
    out = tmp_path / "exported"
    export(capsys, finished[0], out)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.manual_seed(0))
    encoder = modeling().DLCEncoder.from_pretrained(out / "encoder")
    expected = encoder(pixels)
    how = {"subfolder": "encoder", "trust_remote_code": True}
    with torch.no_grad():
        whole = transformers.AutoModel.from_pretrained(out, **how)(pixels)
        plain = transformers.Dinov2WithRegistersModel.from_pretrained(out / "encoder")(pixels)
    close(whole["logits"], expected["logits"])
    close(plain.last_hidden_state, encoder.layernorm(expected["tokens"]))
    pipeline = diffusers.DiffusionPipeline.from_pretrained(out, trust_remote_code=True)
    assert [image.size for image in pipeline(count=2, seed=1).images] == [(16, 16)] * 2


def test_names_are_of_one_to_one(finished):
    """The table of every network names each of its parameters, and no entry of one twice."""
    for step in STEPS:
        params = slots.flat(kind(finished[1], finished[0], step).shapes)
        table = hub_names.network(slots.shapes_of(slots.nested(params)))
        assert {row.path for row in table.values()} == params.keys()
        count = {path: np.zeros(leaf.shape, int) for path, leaf in params.items()}
        for row in table.values():
            count[row.path][row.index] += 1
        assert all((array == 1).all() for array in jax.tree.leaves(count))


def test_pytorchs_code_is_short_and_imports_nothing_of_ours():
    files = list((hub_folders.ROOT / "dlc_jax/interop/hub").glob("*.py"))
    assert {path.name for path in files} == set(hub_card.CODE)
    known = {"torch", "safetensors", "json", "math", "pathlib", "functools", "modeling_dlc"}
    known |= {"networks_dlc", "transformers", "diffusers", "huggingface_hub", "PIL"}
    for path in files:
        source = path.read_text()
        lines = source.splitlines()
        assert len(lines) < 500 and max(map(len, lines)) <= 100, path
        for node in ast.walk(ast.parse(source)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= known, path


def test_the_recipe_of_a_folder_names_its_parts():
    student = {"stage": "encoder", "teacher": "encoder"}
    config = {"seed": 0, "encoder": {"stage": "encoder"}, "student": student}
    config["samples"] = {"stage": "samples", "encoder": "student"}
    found = export_torch._renamed(config, {"encoder": "student"})
    assert found["encoder"] is student and "student" not in found
    assert student["teacher"] == ""  # which was another step, whose name this one has now
    assert found["samples"]["encoder"] == "encoder"
