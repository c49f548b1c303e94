"""SEDD in the files of DLC: bytes back, the average read and in order, what is refused."""

import shlex

import ml_dtypes
import numpy as np
import pytest
from foreign_sedd import DEPTH, HEADS, WIDTH, L, V, from_state, network, state, training
from packages import import_or_skip
from small_models import apply
from test_cli import refused
from test_interop_cli import ROOT, dlc, write

from dlc_jax import checkpoint, command, recipe, workdir
from dlc_jax.cli import priors
from dlc_jax.interop import files, sedd_names, slots, torch_zip
from dlc_jax.models.masked_transformer import MaskedTransformer

RECIPE = f"--config={ROOT / 'configs' / 'imagenet256.py'}"


def imported(capsys, file, out, *flags):
    return dlc(capsys, "import", "sedd", file, "--out", out, RECIPE, *flags)


def params_of(run):
    """{path: array} of the prior of a run."""
    config = recipe.of_run(run)
    model = recipe.build(MaskedTransformer, config.prior.model)
    found = checkpoint.load_params(run / "prior" / "checkpoints", priors.abstract(model))
    return model, {path: np.asarray(array) for path, array in slots.flat(found).items()}


def wrapped(found):
    return {f"_orig_mod.module.{name}": tensor for name, tensor in found.items()}


FILES = {
    "float32": (state(), {"format": "pt"}),
    "float16, wrapped": (wrapped(state(dtype=np.float16)), {}),
    "bfloat16": (state(dtype=ml_dtypes.bfloat16, buffer=False), {"heads": str(HEADS)}),
    "a table for each position": (state(per_position=True), {}),
}


@pytest.mark.parametrize("case", FILES)
def test_a_published_file_is_exported_as_it_came_and_started_from(case, tmp_path, capsys):
    found, metadata = FILES[case]
    file, run = write(tmp_path / "sedd.safetensors", found, metadata), tmp_path / "run"
    out = imported(capsys, file, run)
    dlc(capsys, "export", "sedd", run, "--out", tmp_path / "again.safetensors")
    again = files.load(tmp_path / "again.safetensors")
    assert again.metadata == metadata and again.shapes.keys() == found.keys()
    for name, tensor in found.items():
        there = again.read(name)
        assert there.dtype == tensor.dtype and there.tobytes() == tensor.tobytes(), name
    config, _ = command.parse(["dlc", RECIPE, *shlex.split(out.splitlines()[-1])])
    process, model = config.prior.process, recipe.build(MaskedTransformer, config.prior.model)
    assert (process.name, process.objective) == ("masked", "score")
    assert process.noise.schedule == "log_linear"
    checkpoint.check_start(config.prior.train.init_from, priors.abstract(model))
    config = recipe.of_run(run)  # all that reads codes reads these
    assert config.generator.model.positions == config.encoder.model.simplicial.positions == L
    assert config.prior.model.sigma_conditioning and (run / "prior" / "done.json").exists()


def test_of_a_file_of_training_the_average_is_read_by_the_order_of_its_names(tmp_path, capsys):
    found, file = training(prefix="_orig_mod."), tmp_path / "checkpoint.pth"
    torch_zip.write(file, found)
    imported(capsys, file, tmp_path / "run")
    _, read = params_of(tmp_path / "run")
    _, average = from_state(state(seed=1, buffer=True))
    assert all(np.array_equal(read[path], a) for path, a in slots.flat(average).items())
    dlc(capsys, "export", "sedd", tmp_path / "run", "--out", tmp_path / "again.pth")
    again, array = torch_zip.read(tmp_path / "again.pth")
    assert again["step"] == 500 and again["ema"]["num_updates"] == 12
    assert again["ema"]["decay"] == 0.9999 and again["model"].keys() == found["model"].keys()
    for name, tensor in found["model"].items():
        assert np.array_equal(array(again["model"][name]), tensor), name
    for one, two in zip(again["ema"]["shadow_params"], found["ema"]["shadow_params"], strict=True):
        assert np.array_equal(array(one), two)
    # and as a published file, whose names have no prefix
    hub = tmp_path / "hub.safetensors"
    dlc(capsys, "export", "sedd", tmp_path / "run", "--out", hub, "--layout", "hf")
    there = files.load(hub)
    assert there.shapes.keys() == state().keys()
    for name, tensor in state(seed=1).items():
        np.testing.assert_allclose(there.read(name), tensor, rtol=1e-6)
    # and back: without a second set, the average stands for the model
    imported(capsys, hub, tmp_path / "second")
    back = tmp_path / "back.pth"
    dlc(capsys, "export", "sedd", tmp_path / "second", "--out", back, "--layout", "local")
    again, array = torch_zip.read(back)
    names = [name for name in again["model"] if name != sedd_names.BUFFER]
    assert names == list(state(buffer=False))
    for name, tensor in zip(names, again["ema"]["shadow_params"], strict=True):
        assert np.array_equal(array(tensor), state(seed=1)[name])


def test_every_parameter_has_one_place_in_a_file():
    for per_position in (False, True):
        found = state(per_position=per_position, buffer=False)
        _, params = from_state(found, heads=HEADS)
        params = slots.flat(params)
        table = sedd_names.table({path: array.shape for path, array in params.items()})
        assert list(table) == list(found)
        entries = {path: np.zeros(array.shape) for path, array in params.items()}
        for slot in table.values():
            entries[slot.path][slot.index] += 1
        assert all((array == 1).all() for array in entries.values())


def test_the_published_network_has_the_published_shapes():
    model = MaskedTransformer(positions=512, values=256, sigma_conditioning=True)
    table = sedd_names.table(slots.shapes_of(priors.abstract(model)))
    shapes = {name: slot.shape for name, slot in table.items()}
    published = {
        "vocab_embed.embedding": (257, 1024),
        "pos_embed": (512, 1024),
        "sigma_map.mlp.0.weight": (128, 256),
        "blocks.23.attn_qkv.weight": (3072, 1024),
        "blocks.23.mlp.0.weight": (4096, 1024),
        "blocks.23.adaLN_modulation.weight": (6144, 128),
        "output_layer.norm_final.weight": (1024,),
        "output_layer.linear.weight": (257, 1024),
        "output_layer.adaLN_modulation.bias": (2048,),
    }
    assert {name: shapes[name] for name in published} == published
    assert len(shapes) == 2 + 4 + 24 * 10 + 5
    section = sedd_names.section(shapes, "here")  # no buffer: the heads of this width are known
    assert section == {
        "positions": 512,
        "values": 256,
        "width": 1024,
        "depth": 24,
        "heads": 16,
        "mlp_ratio": 4.0,
        "per_position": False,
        "sigma_conditioning": True,
        "dropout": 0.1,
    }


def test_an_imported_prior_joins_a_run_of_its_sizes(tmp_path, capsys):
    file, run = write(tmp_path / "sedd.safetensors", state()), tmp_path / "run"
    config, _ = command.parse(["dlc", RECIPE])
    run.mkdir()
    workdir.write(run / "config.json", workdir.plain(config.to_dict()))
    line = refused(capsys, "import", "sedd", file, "--out", run)
    assert "is a run of another config" in line and "prior.model.depth: 24 -> 2" in line
    out = imported(capsys, file, tmp_path / "first")
    flags = [flag for flag in shlex.split(out.splitlines()[-1]) if "init_from" not in flag]
    sizes = f"positions={L}", f"values={V}"
    flags += [f"--config.generator.model.{size}" for size in sizes]
    flags += [f"--config.encoder.model.simplicial.{size}" for size in sizes]
    config, _ = command.parse(["dlc", RECIPE, *flags])
    workdir.write(run / "config.json", workdir.plain(config.to_dict()))
    dlc(capsys, "import", "sedd", file, "--out", run)
    assert (run / "prior" / "done.json").exists()
    assert "is there already" in refused(capsys, "import", "sedd", file, "--out", run)
    (tmp_path / "second").mkdir()
    workdir.write(tmp_path / "second" / "config.json", workdir.plain(config.to_dict()))
    flag = "--config.prior.model.depth=2"
    line = refused(capsys, "import", "sedd", file, "--out", tmp_path / "second", flag)
    assert f"{flag} cannot change" in line


def test_a_prior_without_sigma_is_not_exported(tmp_path, capsys):
    score = "--config.prior.process.objective=score"
    config, _ = command.parse(["dlc", RECIPE, score])
    workdir.write(tmp_path / "config.json", workdir.plain(config.to_dict()))
    (tmp_path / "prior" / "checkpoints").mkdir(parents=True)
    line = refused(capsys, "export", "sedd", tmp_path, "--out", tmp_path / "x.safetensors")
    assert "sigma_conditioning=True" in line
    line = refused(capsys, "export", "sedd", tmp_path, "--out", tmp_path / "x.pt")
    assert "not a .safetensors file" in line
    config, _ = command.parse(["dlc", RECIPE])
    workdir.write(tmp_path / "config.json", workdir.plain(config.to_dict()))
    line = refused(capsys, "export", "sedd", tmp_path, "--out", tmp_path / "x.safetensors")
    assert "process.objective=score" in line


def broken(**parts):
    return training() | parts


EMA = training()["ema"]
SWAPPED = [0, 1, 3, 2, *range(4, len(EMA["shadow_params"]))]
REFUSED = {
    "no SEDD": ({"a": np.zeros(3, np.float32)}, "holds no SEDD"),
    "no positions": (
        {name: tensor for name, tensor in state().items() if name != "pos_embed"},
        "holds no SEDD",
    ),
    "another size": (
        state() | {"blocks.1.attn_out.weight": np.zeros((WIDTH, 8), np.float32)},
        f"is ({WIDTH}, 8) and not ({WIDTH}, {WIDTH})",
    ),
    "a block too few": (
        {name: t for name, t in state().items() if not name.startswith("blocks.0.attn")},
        "blocks.0.attn_qkv.weight is missing",
    ),
    "heads unknown": (state(buffer=False), "give --heads"),
    "another rotation": (
        state() | {"rotary_emb.inv_freq": np.float32([1, 0.5, 0.2, 0.1])},
        "rotary_emb.inv_freq is not",
    ),
    "not finite": (
        state() | {"output_layer.linear.bias": np.full(V + 1, np.nan, np.float32)},
        "not finite",
    ),
    "a list too short": (
        broken(ema=EMA | {"shadow_params": EMA["shadow_params"][:-1]}),
        f"has {len(EMA['shadow_params'])} parameters",
    ),
    "a list of another order": (
        broken(ema=EMA | {"shadow_params": [EMA["shadow_params"][at] for at in SWAPPED]}),
        "sigma_map.mlp.0.weight is (128,) and not (128, 256)",
    ),
    "names sorted": (broken(model=dict(sorted(training()["model"].items()))), "are sorted"),
    "an average of nothing": (broken(ema={}), "a list of 0 tensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case, tmp_path, capsys):
    found, words = REFUSED[case]
    if "model" in found:
        file = tmp_path / "checkpoint.pth"
        torch_zip.write(file, found)
    else:
        file = write(tmp_path / "sedd.safetensors", found)
    arguments = ("import", "sedd", file, "--out", tmp_path / "new", RECIPE)
    assert words in refused(capsys, *arguments)
    assert not (tmp_path / "new" / "prior").exists()


@pytest.mark.torch
@pytest.mark.parametrize("per_position", [False, True])
def test_equals_the_network_in_pytorch(per_position):
    torch = import_or_skip("torch")
    found, there = state(per_position=per_position), network(per_position=per_position)
    there.load_state_dict({name: torch.from_numpy(tensor) for name, tensor in found.items()})
    named = [name for name, _ in there.named_parameters()]
    assert named == [name for name in found if name != sedd_names.BUFFER]
    model, params = from_state(found)
    assert (model.heads, model.depth) == (HEADS, DEPTH)
    random = np.random.default_rng(1)
    codes = random.integers(V + 1, size=(8, L))
    sigma = np.float32([1e-4, 0.01, 0.1, 0.5, 1, 2, 4, 6.9])
    with torch.no_grad():
        expected = there(torch.from_numpy(codes), torch.from_numpy(sigma)).numpy()
    logits = apply(model, {"params": params}, codes, sigma)
    error = np.abs(logits - expected).max() / np.abs(expected).max()
    assert error <= 1e-5, error


@pytest.mark.torch
def test_pytorch_reads_what_is_written_and_writes_what_is_read(tmp_path, capsys):
    torch = import_or_skip("torch")
    torch_zip.write(tmp_path / "ours.pth", training())
    there = torch.load(tmp_path / "ours.pth", weights_only=True)
    assert there["step"] == 500 and there["ema"]["decay"] == 0.9999
    for name, tensor in training()["model"].items():
        assert np.array_equal(there["model"][name].numpy(), tensor), name
    module = network()
    module.load_state_dict(there["model"])
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.zeros(1, L, dtype=torch.long), torch.ones(1)).sum().backward()
    optimizer.step()
    average = [2 * parameter.detach().clone() for parameter in module.parameters()]
    ema = {"decay": 0.999, "num_updates": 3, "shadow_params": average}
    found = {"optimizer": optimizer.state_dict(), "model": module.state_dict(), "ema": ema}
    torch.save(found | {"step": 3}, tmp_path / "theirs.pth")
    imported(capsys, tmp_path / "theirs.pth", tmp_path / "run")
    _, read = params_of(tmp_path / "run")
    assert np.array_equal(read["pos_embed"], average[0].numpy())
    assert np.array_equal(read["final_modulation/bias"], average[-1].numpy())
