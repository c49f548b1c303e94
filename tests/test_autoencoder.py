"""The autoencoder: its published size, what its parts must do, and parity with diffusers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packages import import_or_skip
from test_cli import refused

from dlc_jax import cli
from dlc_jax.checkpoint import load_params
from dlc_jax.cli.weights import abstract
from dlc_jax.errors import UserError
from dlc_jax.interop import files, slots, vae_names, weights
from dlc_jax.models.autoencoder import Autoencoder

SMALL = {"channels": (8, 16, 16), "residuals": 1, "groups": 4}


def shapes_of(model):
    found = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    return slots.shapes_of(found), found


def drawn(model, seed=0):
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.2 * random.normal(size=leaf.shape), jnp.float32),
        shapes_of(model)[1],
    )


def images(*shape):
    return jnp.asarray(np.random.default_rng(3).uniform(-1, 1, shape), jnp.float32)


@functools.partial(jax.jit, static_argnames=("model", "method"))
def apply(model, params, *args, method=None):
    return model.apply({"params": params}, *args, method=method)


def test_the_defaults_are_the_published_network():
    shapes, _ = shapes_of(Autoencoder())
    assert sum(np.prod(shape) for shape in shapes.values()) == 83_653_863
    moments = jax.eval_shape(
        lambda x: Autoencoder().init_with_output(jax.random.key(0), x, method="encode")[0],
        images(1, 64, 64, 3),
    )
    assert {name: leaf.shape for name, leaf in moments.items()} == {
        "mean": (1, 8, 8, 4),
        "logvar": (1, 8, 8, 4),
    }


def test_the_table_names_every_parameter_once():
    shapes, _ = shapes_of(Autoencoder())
    table = vae_names.table(shapes)
    assert sum(np.prod(slot.shape) for slot in table.values()) == 83_653_863 and len(table) == 248
    assert {slot.path for slot in table.values()} == set(shapes)
    assert vae_names.section({name: slot.shape for name, slot in table.items()}, "here") == {
        "channels": (128, 256, 512, 512),
        "residuals": 2,
        "latent": 4,
    }


def test_decode_undoes_the_scaling_and_log_variances_are_clipped():
    model = Autoencoder(**SMALL)
    params = drawn(model)
    x = images(2, 16, 16, 3)
    moments = apply(model, params, x, method="encode")
    mean, logvar = moments["mean"], moments["logvar"]
    once = apply(model, params, model.scaling * mean, method="decode")
    np.testing.assert_allclose(once, apply(model, params, x), atol=1e-6)
    other = Autoencoder(**SMALL, scaling=2.0)
    np.testing.assert_allclose(once, apply(other, params, 2.0 * mean, method="decode"), atol=1e-5)
    noise = images(*mean.shape)
    expected = model.scaling * (
        np.asarray(mean) + np.sqrt(np.exp(np.asarray(logvar))) * np.asarray(noise)
    )
    np.testing.assert_allclose(
        apply(model, params, mean, logvar, noise, method="latents"), expected, rtol=1e-5, atol=1e-6
    )
    params["quant"]["bias"] = jnp.array([0.0] * 4 + [-99.0, 99.0, -99.0, 99.0])
    logvar = apply(model, params, x, method="encode")["logvar"]
    assert (logvar[..., ::2] == -30).all() and (logvar[..., 1::2] == 20).all()


def test_a_side_that_does_not_halve_is_refused():
    with pytest.raises(UserError, match="multiples of 4"):
        Autoencoder(**SMALL).init(jax.random.key(0), images(1, 18, 18, 3))


def test_bfloat16_parameters_give_float32_moments_and_images():
    model = Autoencoder(**SMALL)
    params, x = drawn(model), images(1, 16, 16, 3)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    exact, found = (apply(model, tree, x, method="encode")["mean"] for tree in (params, narrow))
    assert (
        found.dtype == jnp.float32 and 0 < np.abs(found - exact).max() < 0.05 * np.abs(exact).max()
    )
    assert apply(model, narrow, found, method="decode").dtype == jnp.float32


@pytest.mark.torch
def test_parity_with_diffusers(tmp_path):
    torch = pytest.importorskip("torch")
    diffusers = import_or_skip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
    ).eval()
    for name, weight in theirs.named_parameters():
        torch.nn.init.normal_(weight, 1.0 if "norm" in name and "weight" in name else 0.0, 0.2)
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    former = {
        "to_q": "query",
        "to_k": "key",
        "to_v": "value",
        "to_out.0": "proj_attn",
    }  # as the published file has them
    renamed = {
        functools.reduce(lambda name, pair: name.replace(*pair), former.items(), name): state[name]
        for name in state
    }
    assert len(renamed.keys() - state.keys()) == 16
    files.save(tmp_path / "vae.safetensors", renamed)
    found = weights.Weights(tmp_path / "vae.safetensors", vae_names.clean)
    model = Autoencoder(**vae_names.section(found.shapes, "here"), groups=4)
    shapes, _ = shapes_of(model)
    table = vae_names.table(shapes)
    flat = found.params(table, shapes)
    params = slots.nested(flat)
    for height, width in ((24, 32), (40, 16)):
        x, z = images(2, height, width, 3), images(2, height // 4, width // 4, 4)
        with torch.no_grad():
            posterior = theirs.encode(torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)).latent_dist
            pictures = theirs.decode(torch.tensor(np.asarray(z)).permute(0, 3, 1, 2)).sample
        moments = apply(model, params, x, method="encode")
        for ours, other in (
            (moments["mean"], posterior.mean),
            (moments["logvar"], posterior.logvar),
            (apply(model, params, model.scaling * z, method="decode"), pictures),
        ):
            other = other.permute(0, 2, 3, 1).numpy()
            largest = np.abs(other).max()
            assert largest > 0.1 and np.abs(ours - other).max() <= 1e-5 * largest
    back = weights.tensors(flat, table, "here")
    assert set(back) == set(state) and all(
        (back[name] == tensor).all() for name, tensor in state.items()
    )


def test_dlc_import_vae(tmp_path, capsys):
    shapes = abstract(Autoencoder(channels=(32, 32), residuals=1), (1, 4, 4, 3))
    table = vae_names.table(slots.shapes_of(shapes))
    random = np.random.default_rng(0)
    state = {name: random.standard_normal(slot.shape, np.float32) for name, slot in table.items()}
    file, folder = tmp_path / "vae.safetensors", tmp_path / "vae"
    files.save(file, {name.replace("to_q", "query"): tensor for name, tensor in state.items()})
    assert cli.main(["import", "vae", str(file), "--out", str(folder)]) == 0
    assert "channels (32, 32), residuals 1, latent 4" in capsys.readouterr().out
    params = load_params(folder / "checkpoints", shapes)
    assert (params["quant"]["kernel"][0, 0] == state["quant_conv.weight"][:, :, 0, 0].T).all()
    queries = params["encoder_middle"]["attention"]["qkv"]["kernel"][:, 0, 0]
    assert (queries == state["encoder.mid_block.attentions.0.to_q.weight"].T).all()
    back = tmp_path / "back.safetensors"
    assert cli.main(["export", "vae", str(folder), "--out", str(back)]) == 0
    assert back.read_bytes() == file.read_bytes()
    files.save(file, {name: tensor for name, tensor in state.items() if "to_k" not in name})
    line = refused(capsys, "import", "vae", file, "--out", tmp_path / "x")
    assert "encoder.mid_block" in line
