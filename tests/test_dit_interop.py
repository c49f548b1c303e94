"""DiT in the files of DLC, the public DiT and diffusers: forward, bytes back, what is refused."""

import shlex

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from foreign_dit import diffusers, from_state, layout_of, official
from small_models import apply, silu
from test_cli import refused
from test_interop_cli import ROOT, dlc, saved, write

from dlc_jax import checkpoint, command, recipe, workdir
from dlc_jax.cli import weights
from dlc_jax.interop import dit_names, files, slots
from dlc_jax.models.dit import DiT
from dlc_jax.typing import Given

L, V = 6, 5


def forward(state, x, n, c, *, heads, patch=2):
    """DiT of the public names in float64, from its description: x [b c y x], n of 1000 steps.

    c [b d] is what is added to the time embedding.
    """
    p = {name: np.asarray(tensor, np.float64) for name, tensor in state.items()}
    d = p["x_embedder.proj.bias"].size

    def linear(name, h):
        return h @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(h):
        return (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)

    angle = np.outer(n, np.exp(-np.log(1e4) * np.arange(128) / 128))
    time = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    c = silu(linear("t_embedder.mlp.2", silu(linear("t_embedder.mlp.0", time))) + c)
    b, channels, side, _ = x.shape
    grid = side // patch
    h = np.zeros((b, grid * grid, d))
    for row in range(grid):
        for column in range(grid):
            rows, columns = (slice(patch * at, patch * at + patch) for at in (row, column))
            product = np.einsum(
                "bcij,dcij->bd", x[:, :, rows, columns], p["x_embedder.proj.weight"]
            )
            h[:, row * grid + column] = product + p["x_embedder.proj.bias"]
    h = h + p["pos_embed"]
    depth = sum(name.endswith("attn.qkv.bias") for name in p)
    for block in (f"blocks.{number}" for number in range(depth)):
        parts = linear(f"{block}.adaLN_modulation.1", c)[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = np.split(parts, 6, axis=-1)
        qkv = linear(f"{block}.attn.qkv", norm(h) * (1 + scale1) + shift1)
        q, k, v = qkv.reshape(b, -1, 3, heads, d // heads).transpose(2, 0, 3, 1, 4)
        weight = np.exp(q @ k.swapaxes(2, 3) / np.sqrt(d // heads))
        y = (weight / weight.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(h.shape)
        h = h + gate1 * linear(f"{block}.attn.proj", y)
        y = linear(f"{block}.mlp.fc1", norm(h) * (1 + scale2) + shift2)
        y = y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        h = h + gate2 * linear(f"{block}.mlp.fc2", y)
    shift, scale = np.split(linear("final_layer.adaLN_modulation.1", c)[:, None], 2, axis=-1)
    h = linear("final_layer.linear", norm(h) * (1 + scale) + shift)
    out = np.zeros((b, 8, side, side))
    for row in range(side):
        for column in range(side):
            place = (row % patch) * patch + column % patch
            token = h[:, row // patch * grid + column // patch].reshape(b, patch * patch, 8)
            out[:, :, row, column] = token[:, place]
    return out


@pytest.mark.parametrize("kind", ["codes", "classes", "embedding"])
def test_official_weights_compute_what_the_paper_says(kind):
    random = np.random.default_rng(1)
    x, n = random.normal(size=(3, 4, 16, 16)), np.array([0, 300, 999])
    if kind == "codes":
        state, codes = official(codes=(L, V)), random.integers(V + 1, size=(3, L))
        c = state["sem_embedder.embedding_table"][np.arange(L), codes].mean(axis=1)
        given = Given(codes=jnp.asarray(codes))
    elif kind == "classes":
        state, label = official(classes=7), np.array([0, 7, 3])
        c, given = (
            state["y_embedder.embedding_table.weight"][label],
            Given(label=jnp.asarray(label)),
        )
    else:
        state, vector = official(embedding=9), random.normal(size=(3, 9)).astype(np.float32)
        drop = np.array([False, True, False])
        read = np.where(drop[:, None], state["y_embedder.fake_latent"], vector)
        c = read @ state["y_embedder.embedding_table.weight"].T
        given = Given(embedding=jnp.asarray(vector), drop=jnp.asarray(drop))
    model, params = from_state(state, heads=4)
    expected = forward(state, x, n, c, heads=4).transpose(0, 2, 3, 1)
    images = jnp.asarray(x.transpose(0, 2, 3, 1), jnp.float32)
    found = apply(model, {"params": params}, images, jnp.asarray(n / 1000, jnp.float32), given)
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


def test_every_parameter_has_one_place_in_a_file():
    for name, state in (
        ("official", official(codes=(L, V), classes=7)),
        ("official", official(embedding=9)),
        ("diffusers", diffusers(classes=7)),
    ):
        model, params = from_state(state, heads=4, image=16)
        params = slots.flat(params)
        layout = layout_of(model, {path: array.shape for path, array in params.items()}, name)
        entries = {path: np.zeros(array.shape) for path, array in params.items()}
        for slot in layout.table.values():
            entries[slot.path][slot.index] += 1
        assert all((array == 1).all() for array in entries.values())
        again = dit_names.written(params, layout, "here")
        assert again.keys() == state.keys()
        assert all(np.array_equal(again[key], state[key]) for key in state)


def wrapped(state):
    return {f"_orig_mod.{name}": tensor for name, tensor in state.items()}


FILES = {
    "codes, float32": (official(codes=(L, V)), {}),
    "codes, bfloat16, wrapped": (wrapped(official(codes=(L, V), dtype=ml_dtypes.bfloat16)), {}),
    "classes, float16": (official(classes=7, dtype=np.float16), {"heads": "4"}),
    "embedding": (official(embedding=9), {"format": "pt"}),
    "diffusers, float16": (diffusers(classes=7, dtype=np.float16), {"format": "pt"}),
}


@pytest.mark.parametrize("case", FILES)
def test_an_imported_dit_is_exported_as_it_came_and_started_from(case, tmp_path, capsys):
    state, metadata = FILES[case]
    file, folder = write(tmp_path / "dit.safetensors", state, metadata), tmp_path / "weights"
    out = dlc(capsys, "import", "dit", file, "--out", folder, "--heads", 4, "--image", 16)
    dlc(capsys, "export", "dit", folder, "--out", tmp_path / "new" / "again.safetensors")
    again = files.load(tmp_path / "new" / "again.safetensors")
    assert again.metadata == metadata and again.shapes.keys() == state.keys()
    for name, tensor in state.items():
        found = again.read(name)
        assert found.dtype == tensor.dtype and found.tobytes() == tensor.tobytes(), name
    flags = shlex.split(out.splitlines()[-1])
    config, _ = command.parse(["dlc", f"--config={ROOT / 'configs' / 'imagenet256.py'}", *flags])
    shapes = weights.abstract(recipe.build(DiT, config.generator.model), (1, 16, 16, 4), (1,))
    checkpoint.check_start(config.generator.train.init_from, shapes)


def test_a_trained_generator_is_exported_and_imported_with_its_format(tmp_path, capsys):
    flags = ("image=8", "channels=3", "patch=4", "width=32", "depth=2", "heads=2", "qk_norm=False")
    flags = [f"--config.generator.model.{flag}" for flag in flags]
    config, _ = command.parse(["dlc", f"--config={ROOT / 'configs' / 'quickstart.py'}", *flags])
    model = recipe.build(DiT, config.generator.model)
    random = np.random.default_rng(0)
    shapes = weights.shapes(model, (1, 8, 8, 3), (1,))
    flat = {path: random.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    workdir.write(tmp_path / "config.json", workdir.plain(config.to_dict()))
    saved(tmp_path / "generator", 3, {"ema": slots.nested(flat)}, {})
    file = tmp_path / "ours.safetensors"
    dlc(capsys, "export", "dit", tmp_path, "--out", file)
    dlc(capsys, "import", "dit", file, "--out", tmp_path / "weights")
    again = checkpoint.load_params(
        tmp_path / "weights" / "checkpoints", weights.abstract(model, (1, 8, 8, 3), (1,))
    )
    assert all(np.array_equal(array, flat[path]) for path, array in slots.flat(again).items())
    line = refused(capsys, "export", "dit", tmp_path, "--out", file, "--format", "diffusers")
    assert "no name for: code_table/table" in line
    config = recipe.changed(config, {"generator.model.block": "modern"})
    workdir.write(tmp_path / "config.json", workdir.plain(config.to_dict()))
    assert "modern block has no names" in refused(capsys, "export", "dit", tmp_path, "--out", file)


def test_one_format_becomes_the_other(tmp_path, capsys):
    file, folder = write(tmp_path / "dit.safetensors", diffusers(classes=7)), tmp_path / "weights"
    dlc(capsys, "import", "dit", file, "--out", folder, "--heads", 4, "--image", 16)
    file = tmp_path / "official.safetensors"
    dlc(capsys, "export", "dit", folder, "--out", file, "--format", "official")
    there = files.load(file)
    for name, tensor in official(classes=7).items():
        assert np.array_equal(there.read(name), tensor), name
    dlc(capsys, "import", "dit", file, "--out", tmp_path / "second")
    file = tmp_path / "transformer" / "back.safetensors"
    dlc(capsys, "export", "dit", tmp_path / "second", "--out", file, "--format", "diffusers")
    back = files.load(file)
    assert all(
        np.array_equal(back.read(key), tensor) for key, tensor in diffusers(classes=7).items()
    )
    # what diffusers has beside the file tells what its shapes leave open
    dlc(capsys, "import", "dit", file, "--out", tmp_path / "third")
    model = weights.record(tmp_path / "third")["model"]
    assert (model["heads"], model["image"], model["classes"]) == (4, 16, 7)


COPY = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
REFUSED = {
    "a copy differs": (
        diffusers(classes=7) | {COPY: np.zeros(64, np.float32)},
        ("--heads", "4", "--image", "16"),
        f"{COPY} differs",
    ),
    "trained positions": (
        official(classes=7) | {"pos_embed": np.zeros((1, 64, 64), np.float32)},
        ("--heads", "4"),
        "trained positions",
    ),
    "of another size": (
        official(classes=7) | {"final_layer.adaLN_modulation.1.bias": np.zeros(64, np.float32)},
        ("--heads", "4"),
        "is (64,) and not (128,)",
    ),
    "heads unknown": (official(classes=7), (), "give --heads"),
    "image unknown": (diffusers(classes=7), ("--heads", "4"), "give --image"),
    "another image": (official(classes=7), ("--heads", "4", "--image", "32"), "not --image=32"),
    "no DiT": ({"a": np.zeros(3, np.float32)}, (), "holds no DiT"),
    "not finite": (
        official(classes=7) | {"x_embedder.proj.bias": np.full(64, np.nan, np.float32)},
        ("--heads", "4"),
        "not finite",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case, tmp_path, capsys):
    state, flags, words = REFUSED[case]
    file = write(tmp_path / "dit.safetensors", state)
    assert words in refused(capsys, "import", "dit", file, "--out", tmp_path / "new", *flags)
    assert not (tmp_path / "new").exists()
