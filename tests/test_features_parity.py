"""Feature networks and their protocols against the programs that they are named after.

Random weights are loaded into both; the heads of LPIPS are the published ones where they are there.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_vit_parity
from packages import import_or_skip

from dlc_jax import features
from dlc_jax.features import lpips, resize

pytestmark = pytest.mark.torch
torch = import_or_skip("torch")

SIZES = [(32, 32), (64, 64), (299, 299), (256, 320), (501, 400)]


def images(number, rows, columns):
    shape = (number, rows, columns, 3)
    return np.random.default_rng(rows).integers(0, 256, shape, dtype=np.uint8)


def drawn(module):
    """The module's state with nothing at zero, at one or alike, of outputs around 1."""
    random = np.random.default_rng(0)
    state = {}
    for name, tensor in module.state_dict().items():
        if name.endswith("num_batches_tracked"):
            value = np.array(7)
        elif name.endswith("running_var") or ("bn" in name and name.endswith("weight")):
            value = random.uniform(0.6, 1.4, tensor.shape)
        elif tensor.ndim > 1:
            value = random.normal(size=tensor.shape) * (2 / np.prod(tensor.shape[1:])) ** 0.5
        else:
            value = 0.3 * random.normal(size=tensor.shape)
        state[name] = torch.from_numpy(np.asarray(value)).to(tensor.dtype)
    module.load_state_dict(state)
    return state


def relative(found, expected):
    """Largest difference over the largest entry."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / np.abs(expected).max()


def planes(pixels):
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_protocols(size, capsys):
    interpolation = import_or_skip("torch_fidelity.interpolate_compat_tensorflow")
    cleanfid = import_or_skip("cleanfid.resize")
    pixels = images(2, *size)
    floats, given = planes(pixels).float(), jnp.asarray(pixels, jnp.float32)
    adm = interpolation.interpolate_bilinear_2d_like_tensorflow1x(
        floats, size=(299, 299), align_corners=False
    )
    centers = torch.nn.functional.interpolate(
        floats, (299, 299), mode="bilinear", align_corners=False
    )
    clean = np.stack([cleanfid.build_resizer("clean")(image) for image in pixels])
    expected = {
        "adm": adm.permute(0, 2, 3, 1).numpy(),
        "torch": centers.permute(0, 2, 3, 1).numpy(),
        "clean": clean,
    }
    found = {
        "adm": resize.bilinear(given, 299, centers=False),
        "torch": resize.bilinear(given, 299, centers=True),
        "clean": resize.clean(pixels, 299),
    }
    errors = {name: np.abs(found[name] - expected[name]).max() / 255 for name in expected}
    with capsys.disabled():
        print(f"\n{size}:", {name: f"{error:.1e}" for name, error in errors.items()})
    assert errors["clean"] == 0 and max(errors.values()) < 1e-6


@pytest.fixture(scope="module")
def inceptions(tmp_path_factory):
    """Path of random weights; those of torch-fidelity and of pytorch-fid that have them."""
    ours = import_or_skip("torch_fidelity.feature_extractor_inceptionv3")
    theirs = import_or_skip("pytorch_fid.inception")
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    empty = torch.nn.Module.load_state_dict
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(
            torch.nn.Module, "load_state_dict", lambda self, state: empty(self, state, strict=False)
        )
        fidelity = ours.FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"])
    torch.save(drawn(fidelity), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: torch.load(path))
        fid = theirs.InceptionV3().eval()
    return path, fidelity, fid


def computed(extractor, pixels):
    return jax.jit(extractor.apply)(extractor.params, extractor.prepare(pixels))


@torch.no_grad()
def test_inception(inceptions, capsys):
    path, fidelity, fid = inceptions
    pixels, kept = images(2, 64, 80), {}
    branch = fidelity.Mixed_6d.branch1x1  # mixed_6/conv of the graph
    handle = branch.register_forward_hook(lambda module, given, y: kept.update(spatial=y[:, :7]))
    pool, logits = fidelity(planes(pixels))
    handle.remove()
    expected = {
        "pool": pool,
        "logits": logits,
        "spatial": kept["spatial"].permute(0, 2, 3, 1).flatten(1),
    }
    found = computed(features.load("inception", weights=path, protocol="adm"), pixels)
    errors = {name: relative(found[name], expected[name]) for name in expected}
    extractor = features.load("inception", weights=path, protocol="torch")
    errors["pytorch-fid"] = relative(
        computed(extractor, pixels)["pool"], fid(planes(pixels).float() / 255)[0][..., 0, 0]
    )
    # as clean-fid: its own resize, then (x - 128) / 128 into the layers
    cleaned = planes(resize.clean(pixels, 299))
    given = (cleaned / 255, (cleaned - 128) / 128)
    fid.resize_input = fid.normalize_input = False
    extractor = features.load("inception", weights=path, protocol="clean")
    errors["clean-fid"] = relative(computed(extractor, pixels)["pool"], fid(given[1])[0][..., 0, 0])
    fid.resize_input = fid.normalize_input = True
    with capsys.disabled():
        print("\ninception:", {name: f"{error:.1e}" for name, error in errors.items()})
    assert max(errors.values()) < 1e-5


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2(registers, tmp_path, capsys):
    model = test_vit_parity.reference(128, 3, 2, registers)
    path = tmp_path / "model.safetensors"
    model.save_pretrained(tmp_path)
    extractor = features.load("dinov2", weights=path)
    pixels = images(2, 200, 256)
    prepared = extractor.prepare(pixels)
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    given = planes(((prepared / 255 - mean) / deviation).astype(np.float32))
    with torch.no_grad():
        expected = model(given).last_hidden_state[:, 0]
    error = relative(computed(extractor, pixels)["cls"], expected)
    with capsys.disabled():
        print(f"\ndinov2, {registers} registers: {error:.1e}")
    assert extractor.outputs == {"cls": 128} and error < 1e-5


@pytest.mark.parametrize("version", lpips.VERSIONS)
@pytest.mark.parametrize("trunk", lpips.LAYERS)
def test_lpips(trunk, version, shared_data, tmp_path, capsys):
    package = import_or_skip("lpips")
    heads = shared_data / "weights" / f"lpips_v{version}_{trunk}.pth"
    model = package.LPIPS(
        net=trunk, version=version, pnet_rand=True, model_path=str(heads), verbose=False
    )
    state = drawn(model.net)
    # slices of the trunk have its numbers
    names = {name: f"features.{name.partition('.')[2]}" for name in state}
    path = tmp_path / "trunk.pth"
    torch.save({names[name]: tensor for name, tensor in state.items()}, path)
    metric = lpips.load(trunk, weights=path, heads=heads, version=version)
    assert metric.published == {"trunk": False, "heads": True}
    a, b = (images(3, *size) / np.float32(127.5) - 1 for size in ((64, 80), (64, 80)))
    b = np.clip(a + 0.1 * np.random.default_rng(1).normal(size=a.shape), -1, 1).astype(np.float32)
    with torch.no_grad():
        expected = model(planes(a), planes(b))[:, 0, 0, 0]
    error = relative(jax.jit(metric.distance)(metric.params, a, b), expected)
    with capsys.disabled():
        print(f"\nLPIPS {version} of {trunk}: {error:.1e}, of {expected.mean():.3f}")
    assert error < 1e-5
