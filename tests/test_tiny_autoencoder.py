"""The tiny autoencoder: TAEF2's weights on real images, parity, and its files both ways."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import ROOT
from packages import import_or_skip
from test_cli import refused

from dlc_jax import cli
from dlc_jax.cli.weights import abstract
from dlc_jax.errors import UserError
from dlc_jax.interop import files, slots, tiny_names
from dlc_jax.models.tiny_autoencoder import TinyAutoencoder

_spec = importlib.util.spec_from_file_location("kodak", ROOT / "benchmarks" / "autoencoders.py")
autoencoders = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(autoencoders)

SMALL = {"channels": 8, "blocks": 1, "latent": 5, "groups": 4}


def drawn(model, scale=0.2):
    random = np.random.default_rng(0)
    shapes = abstract(model, (1, 8, 8, 3))
    return jax.tree.map(lambda leaf: scale * random.standard_normal(leaf.shape, np.float32), shapes)


@functools.partial(jax.jit, static_argnames=("model", "method"))
def apply(model, params, *args, method=None):
    return model.apply({"params": params}, *args, method=method)


def saved(folder, model, names=("decoder", "encoder")):
    """The two files of a model of random weights, float16."""
    params = {path: np.asarray(leaf) for path, leaf in slots.flat(drawn(model)).items()}
    table = tiny_names.table(slots.shapes_of(params))
    state = {name: slot.get(params[slot.path]) for name, slot in table.items()}
    paths = []
    for half in names:
        part = {name: state[name] for name in state if name.startswith(half)}
        part = {name.removeprefix(f"{half}."): part[name].astype(np.float16) for name in part}
        paths.append(folder / f"{half}.safetensors")
        files.save(paths[-1], part)
    return paths


def test_the_defaults_are_taef2():
    model = TinyAutoencoder()
    shapes = slots.shapes_of(abstract(model, (1, 8, 8, 3)))
    assert sum(np.prod(shape) for shape in shapes.values()) == 1_338_528 + 1_338_499
    table = tiny_names.table(shapes)
    assert {slot.path for slot in table.values()} == set(shapes) and len(table) == 158
    found = {name: slot.shape for name, slot in table.items()}
    own = {"channels": 64, "blocks": 3, "latent": 32, "groups": 4}
    assert tiny_names.section(found, "here") == own and model.stride == 8
    bare = slots.shapes_of(abstract(TinyAutoencoder(groups=0), (1, 8, 8, 3)))
    found = {name: slot.shape for name, slot in tiny_names.table(bare).items()}
    assert tiny_names.section(found, "here") == own | {"groups": 0}


def test_latents_are_an_eighth_and_scaled():
    model, other = TinyAutoencoder(**SMALL), TinyAutoencoder(**SMALL, scaling=2.0)
    params = drawn(model)
    images = np.random.default_rng(1).uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)
    found = apply(model, params, images, method="encode")
    assert set(found) == {"mean"} and found["mean"].shape == (2, 2, 3, 5)
    np.testing.assert_array_equal(other.latents(found["mean"]), 2 * found["mean"])
    once = apply(model, params, found["mean"], method="decode")
    assert once.shape == images.shape and np.std(once) > 0.1
    np.testing.assert_allclose(
        apply(other, params, 2 * found["mean"], method="decode"), once, atol=1e-6
    )
    # latents are squashed, so that one far outside does no more than one at the bound
    far = apply(model, params, 60 * jnp.sign(found["mean"]), method="decode")
    np.testing.assert_allclose(
        far, apply(model, params, 90 * jnp.sign(found["mean"]), method="decode"), atol=1e-6
    )
    with pytest.raises(UserError, match="images of 12x16 pixels have no latents.*multiples of 8"):
        model.init(jax.random.key(0), jnp.asarray(images[:, :12, :16]))


def test_both_files_come_in_and_go_out_as_they_were(tmp_path, capsys):
    decoder, encoder = saved(tmp_path, TinyAutoencoder(**SMALL))
    out = tmp_path / "tiny"
    assert cli.main(["import", "vae", str(decoder), str(encoder), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "name tiny, channels 8, blocks 1, latent 5, groups 4" in said
    assert f"path={out} --config.autoencoder.model.name=tiny" in said
    assert "model.channels=8" in said and "groups=" not in said  # the default
    back = [tmp_path / "e.safetensors", tmp_path / "d.safetensors"]
    assert cli.main(["export", "vae", str(out), "--out", *map(str, back)]) == 0
    for given, found in zip((encoder, decoder), back, strict=True):
        assert given.read_bytes() == found.read_bytes()
    coder = autoencoders.network(out)
    assert (coder.stride, coder.channels, coder.scaling) == (8, 5, 1.0)
    line = refused(capsys, "export", "vae", out, "--out", back[0])
    assert "--out must be two, the encoder and the decoder" in line
    line = refused(capsys, "import", "vae", encoder, encoder, "--out", tmp_path / "x")
    assert "are not the encoder and the decoder of a tiny autoencoder" in line
    assert "of a tiny one give both" in refused(
        capsys, "import", "vae", encoder, "--out", tmp_path / "x"
    )
    assert "holds no autoencoder" in refused(capsys, "export", "vae", tmp_path, "--out", back[0])


@pytest.fixture(scope="module")
def taef2(shared_data, tmp_path_factory):
    """TAEF2, imported."""
    out = tmp_path_factory.mktemp("weights") / "taef2"
    paths = [shared_data / "weights" / f"taef2_{half}.pth" for half in tiny_names.HALVES]
    assert cli.main(["import", "vae", *map(str, paths), "--out", str(out)]) == 0
    return out


@pytest.mark.slow
def test_kodak_s_images_come_back(taef2, shared_data):
    pixels = np.stack(list(autoencoders.crops(shared_data / "kodak").values()))
    back, latents = autoencoders.reconstructed(autoencoders.network(taef2), pixels)
    assert latents.shape == (8, 32, 32, 32) and 0.8 < latents.std() < 1.0
    each = autoencoders.psnr(pixels, back)
    assert each.mean() >= 25 and each.min() > 25, each


@pytest.mark.torch
@pytest.mark.parametrize("height, width", [(64, 64), (40, 72)])
def test_parity_with_the_same_layers_in_pytorch(height, width, taef2, shared_data):
    """Of the real weights, written down from the files' numbers: what is not there has none."""
    torch = import_or_skip("torch")
    from torch.nn import functional

    def block(x, layer):
        if "pool" in layer:
            y = functional.conv2d(x, layer["pool"]["0.weight"])
            y = functional.group_norm(y, 4, layer["pool"]["1.weight"], layer["pool"]["1.bias"])
            x = x + functional.conv2d(functional.relu(y), layer["pool"]["3.weight"])
        y = x
        for number in (0, 2, 4):
            weight, bias = (layer["conv"][f"{number}.{kind}"] for kind in ("weight", "bias"))
            y = functional.conv2d(y, weight, bias, padding=1)
            y = functional.relu(y) if number < 4 else y
        return functional.relu(x + y)

    def half(name):
        layers = {}
        state = torch.load(shared_data / "weights" / f"taef2_{name}.pth", weights_only=True)
        for key, tensor in state.items():
            number, *part = key.split(".")
            layer = layers.setdefault(int(number), {})
            for inner in part[:-2]:
                layer = layer.setdefault(inner, {})
            layer[".".join(part[-2:])] = tensor.float()
        return layers

    def conv(x, layer, stride=1):
        bias = layer.get("bias")
        return functional.conv2d(x, layer["weight"], bias, stride=stride, padding=1)

    def encode(x):
        layers = half("encoder")
        for _, layer in sorted(layers.items()):
            stride = 1 if "bias" in layer else 2
            x = block(x, layer) if "conv" in layer else conv(x, layer, stride)
        return x

    def decode(z):
        layers = half("decoder")
        x = functional.relu(conv(torch.tanh(z / 3) * 3, layers.pop(1)))
        for _, layer in sorted(layers.items()):
            if "weight" in layer and "bias" not in layer:
                x = functional.interpolate(x, scale_factor=2)
            x = block(x, layer) if "conv" in layer else conv(x, layer)
        return x

    images = autoencoders.crops(shared_data / "kodak")["kodim15"][None, :height, :width]
    coder = autoencoders.network(taef2)
    latents = jax.jit(coder.encode)(coder.params, images)["mean"]
    pictures = jax.jit(coder.decode)(coder.params, latents)
    with torch.no_grad():
        theirs = encode(torch.tensor(images).permute(0, 3, 1, 2) / 255)
        back = 2 * decode(theirs) - 1
    for ours, other in ((latents, theirs), (pictures, back)):
        other = other.permute(0, 2, 3, 1).numpy()
        assert other.std() > 0.1 and np.abs(ours - other).max() <= 1e-4
