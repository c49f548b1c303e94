"""Feature networks without other programs: published accuracies, precision, what is refused."""

import csv
import io
import tarfile

import foreign_weights
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dlc_jax import features
from dlc_jax.errors import UserError
from dlc_jax.features import inception, layers, lpips, resize, resnet, squeezenet, weights
from dlc_jax.interop import files, slots
from dlc_jax.models import positions

PRODUCTS = ("dot_general", "conv_general_dilated")


def drawn(shapes):
    """Random parameters of these shapes, of outputs around 1; variances are positive."""
    random = np.random.default_rng(0)

    def draw(path, leaf):
        fan = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 100
        values = random.normal(size=leaf.shape) * (2 / fan) ** 0.5
        return (1 + np.abs(values) if "variance" in str(path) else values).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def file_of(path, module, side, name, change=None):
    """A file of random weights under the names of the published one."""
    flat = slots.flat(drawn(weights.abstract(module, 1, side, side, 3)))
    form = {4: "conv", 2: "linear"}
    shapes = {name: leaf.shape for name, leaf in flat.items()}
    table = {
        name(own): slots.slot(shapes, own, form=form.get(leaf.ndim, "same"))
        for own, leaf in flat.items()
    }
    tensors = {given: slot.get(flat[slot.path]) for given, slot in table.items()}
    if change:
        change(tensors)
    files.save(path, tensors)
    return path


def resnet_file(path, change=None):
    return file_of(path, resnet.ResNet(20), 32, resnet._name, change)


# ---- resizing and layers


def test_bilinear_by_its_definition():
    corners = [[1, 0], [0.5, 0.5], [0, 1], [0, 1]]
    centers = [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]
    np.testing.assert_array_equal(resize.matrix(2, 4, centers=False), corners)
    np.testing.assert_array_equal(resize.matrix(2, 4, centers=True), centers)
    # 4 to 2 without antialiasing: two pixels of four are read, or the means of neighbors
    np.testing.assert_array_equal(resize.matrix(4, 2, centers=False), np.eye(4)[[0, 2]])
    halves = [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]
    np.testing.assert_array_equal(resize.matrix(4, 2, centers=True), halves)


def test_clean_antialiases_and_keeps_the_range():
    checkers = np.indices((64, 64)).sum(0) % 2 * 255
    image = np.repeat(checkers[..., None], 3, -1).astype(np.uint8)
    small = resize.clean([image], 16)[0]
    assert small.dtype == np.float32 and np.abs(small - 127.5).max() < 1
    edge = np.zeros((8, 8, 3), np.uint8)
    edge[:, 4:] = 255
    large = resize.clean([edge, edge[:4]], 32)  # sizes may differ
    assert large.shape == (2, 32, 32, 3) and large.min() == 0 and large.max() == 255


def test_normalization_by_its_definition():
    random, layer = np.random.default_rng(0), layers.ConvNorm(5, eps=0.1)
    x = random.normal(size=(2, 3, 3, 4)).astype(np.float32)
    params = drawn(weights.abstract(layer, *x.shape))
    y = (x @ params["kernel"][0, 0] - params["mean"]) / np.sqrt(params["variance"] + 0.1)
    expected = y * params["scale"] + params["bias"]
    np.testing.assert_allclose(layer.apply({"params": params}, x), expected, atol=1e-5)


def test_averages_count_no_padding():
    block = inception.Block((), "average", 16)
    x = np.ones((1, 4, 4, 3), np.float32)
    y = block.apply({"params": drawn(weights.abstract(block, *x.shape))}, x)
    np.testing.assert_allclose(y, np.broadcast_to(y[:, 1:2, 1:2], y.shape), rtol=1e-6)
    assert np.abs(y).max() > 0


def test_ceil_keeps_a_window_at_the_edge():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    assert layers.max_pool(x).ravel().tolist() == [10]
    assert layers.max_pool(x, ceil=True).ravel().tolist() == [10, 11, 14, 15]


# ---- precision


def precisions(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name in PRODUCTS:
            yield equation.params["precision"]
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda each: hasattr(each, "jaxpr")
        ):
            if hasattr(inner, "jaxpr"):
                yield from precisions(inner.jaxpr)
            elif hasattr(inner, "eqns"):
                yield from precisions(inner)


def test_products_have_the_highest_precision(tmp_path):
    extractor = features.load("resnet20", weights=resnet_file(tmp_path / "r.safetensors"))
    x = np.zeros((2, 32, 32, 3), np.uint8)
    found = list(precisions(jax.make_jaxpr(extractor.apply)(extractor.params, x).jaxpr))
    highest = (jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)
    assert len(found) == 20 and set(found) == {highest}


def test_lpips_is_a_distance(tmp_path):
    """0 of an image to itself, symmetric, larger for a larger change; small images are refused."""
    trunk, heads = tmp_path / "trunk.safetensors", tmp_path / "heads.safetensors"
    file_of(trunk, lpips.Trunk("squeeze"), 64, lpips._name)
    ones = {
        f"{name}.model.1.weight": np.ones((1, head.shape[2], 1, 1), np.float32)
        for name, head in lpips._heads("squeeze").items()
    }
    files.save(heads, ones)
    metric = lpips.load("squeeze", weights=trunk, heads=heads)
    random = np.random.default_rng(0)
    a, noise = (random.uniform(-1, 1, (2, 48, 40, 3)).astype(np.float32) for _ in range(2))
    distance = jax.jit(metric.distance)
    same, near, far = (distance(metric.params, a, a + part * noise) for part in (0, 0.05, 0.5))
    assert (np.array(same) == 0).all() and (np.array(near) > 0).all()
    assert (np.array(far) > 2 * np.array(near)).all()
    back = distance(metric.params, a + 0.5 * noise, a)
    np.testing.assert_allclose(back, far, rtol=1e-5)
    found = precisions(jax.make_jaxpr(metric.distance)(metric.params, a, a).jaxpr)
    assert set(found) == {(jax.lax.Precision.HIGHEST, jax.lax.Precision.HIGHEST)}
    with pytest.raises(UserError, match="too small for this network: 1 x 1 are left where"):
        metric.distance(metric.params, a[:, :8, :8], a[:, :8, :8])
    with pytest.raises(UserError, match="lin0.model.1.weight is .* expected is squeeze.pth"):
        lpips.load("squeeze", weights=trunk, heads=trunk)


# ---- what is found, and what is refused


def test_what_an_extractor_says(tmp_path):
    path = resnet_file(tmp_path / "r.safetensors")
    extractor = features.load("resnet20", weights=path)
    assert (extractor.protocol, extractor.frechet_name) == ("native", "fd_resnet20")
    assert extractor.published is False and len(extractor.weights_sha256) == 64
    images = [np.full((32, 32, 3), level, np.uint8) for level in (0, 200)]
    found = extractor.apply(extractor.params, extractor.prepare(images))
    assert {name: y.shape for name, y in found.items()} == {
        name: (2, width) for name, width in extractor.outputs.items()
    }
    with pytest.raises(UserError, match="resnet20 reads images of 32 x 32 pixels, not of 32 x 40"):
        extractor.prepare([np.zeros((32, 40, 3), np.uint8)])


@pytest.mark.parametrize("registers, offset", [(0, 0.1), (4, None)])
def test_positions_of_dinov2_are_resized_as_in_its_own_code(registers, offset, tmp_path):
    state, path = foreign_weights.official(registers=registers), tmp_path / "d.safetensors"
    files.save(path, state)
    found = features.load("dinov2", weights=path).params["pos_embed"]
    cls, patches = np.split(state["pos_embed"][0], [1])
    side = 224 // foreign_weights.PATCH
    if offset:
        patches = positions.resize(jnp.asarray(patches), side, antialias=False, offset=offset)
    np.testing.assert_allclose(found, np.concatenate([cls, patches]), atol=1e-6)
    files.save(path, foreign_weights.transformers(state))
    found = features.load("dinov2", weights=path).params["pos_embed"]
    np.testing.assert_array_equal(found, state["pos_embed"][0])  # by the network, as for any size


def test_only_inception_gives_the_fid():
    made = {"protocol": "", "weights_sha256": "", "published": None, "outputs": {}, "params": {}}
    names = {
        name: features.Extractor(name=name, **made, prepare=len, apply=len).frechet_name
        for name in features.NETWORKS
    }
    assert names.pop("inception") == "fid"
    assert names == {name: f"fd_{name}" for name in names}


def test_first_digits_are_those_in_the_published_names():
    for network in features.NETWORKS.values():
        file, _, digits = network.published
        stem = file.rpartition(".")[0].rpartition("-")[2]
        assert not (digits and len(stem) == 8) or digits.startswith(stem)


WRONG = [
    (lambda tensors: tensors.pop("layer2.0.bn1.weight"), "layer2.0.bn1.weight is missing"),
    (
        lambda tensors: tensors.update({"conv1.weight": np.zeros((8, 3, 3, 3), np.float32)}),
        r"conv1.weight is \(8, 3, 3, 3\) and not \(16, 3, 3, 3\)",
    ),
    (
        lambda tensors: tensors.update(fc=np.zeros(3, np.float32)),
        "fc has no place in this model",
    ),
    (lambda tensors: tensors["linear.bias"].fill(np.nan), "linear.bias is not finite"),
]


@pytest.mark.parametrize("change, words", WRONG, ids=["missing", "shape", "more", "nan"])
def test_weights_of_something_else(change, words, tmp_path):
    path = resnet_file(tmp_path / "r.safetensors", change)
    with pytest.raises(UserError, match=words) as error:
        features.load("resnet20", weights=path)
    assert "expected is resnet20-12fca82f.th (SHA-256 12fca82f…), published at" in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_refused(tmp_path):
    where = "give the path of pt_inception-2015-12-05-6726825d.pth .SHA-256 6726825d…., published"
    for given, words in ((None, "no file was given"), (tmp_path / "no.pth", "is not a file")):
        with pytest.raises(UserError, match=f"inception: .*{words}; {where}"):
            features.load("inception", weights=given)
    with pytest.raises(UserError, match="features 'vgg' are unknown; known are inception, "):
        features.load("vgg", weights=None)
    with pytest.raises(UserError, match="inception has no protocol 'crop'; choose one of adm, "):
        features.load("inception", weights=None, protocol="crop")
    with pytest.raises(UserError, match="trunks are alex, vgg, squeeze, versions 0.1, 0.0"):
        lpips.load("alex", weights=None, heads=None, version="0.2")
    with pytest.raises(UserError, match="LPIPS, trunk: no file .* alexnet-owt-7be5be79.pth"):
        lpips.load("alex", weights=None, heads=None)
    path = tmp_path / "damaged.npz"
    for content in (b"", b"PK\3\4 and no more", b"text"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="damaged, or not an .npz of arrays.*; expected is squ"):
            features.load("squeezenet", weights=path)


# ---- real weights


def photographs(folder):
    """(images, indexes of their classes) of `imagenet_samples`."""
    rows = list(csv.DictReader((folder / "index.tsv").open(), delimiter="\t"))
    with tarfile.open(folder / "imagenet_144x1.tar") as archive:
        read = [archive.extractfile(row["file"]).read() for row in rows]
    images = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in read]
    return images, np.array([int(row["class_index"]) for row in rows])


@pytest.mark.slow
def test_squeezenet_knows_photographs(shared_data, capsys):
    """As published with the weights: 58.3 % and 79.2 % of the 144."""
    path = shared_data / "weights" / "squeezenet_v1.0_decoded_OIHW.npz"
    images, labels = photographs(shared_data / "imagenet_samples")
    squares = [np.asarray(Image.fromarray(image).resize((227, 227))) for image in images]
    right = {}
    for protocol in squeezenet.PROTOCOLS:
        extractor = features.load("squeezenet", weights=path, protocol=protocol)
        apply, parts = jax.jit(extractor.apply), np.array_split(np.arange(len(images)), 4)
        logits = []
        for part in parts:
            given = [(images if protocol == "crop" else squares)[number] for number in part]
            logits.append(apply(extractor.params, extractor.prepare(given))["logits"])
        order = np.argsort(-np.concatenate(logits), axis=-1)
        hits = order == labels[:, None]
        right[protocol] = int(hits[:, 0].sum()), int(hits[:, :5].sum())
    with capsys.disabled():
        print(f"\nSqueezeNet, right of 144, first and in five: {right}")
    assert extractor.published and abs(right["crop"][0] - 84) <= 2
    assert right["stretch"][0] >= 84  # squeezed, but whole


@pytest.mark.torch
@pytest.mark.parametrize(
    "name, share", [("resnet20-12fca82f", 0.804), ("resnet56-4bfd9763", 0.825)]
)
def test_resnets_know_cifar(name, share, shared_data, capsys):
    """Of the first 100 test images of each class, as published with the weights."""
    pytest.importorskip("torch")
    images, labels, classes = [], [], []
    archive = shared_data / "cifar10_jpeg" / "cifar10_train50k_test5k.tar.xz"
    with tarfile.open(archive) as entries:
        for entry in entries:  # of the test set first, classes in their order
            if not entry.isfile():
                continue
            split, kind, file = entry.name.split("/")
            if split != "test":
                break
            classes += [kind] * (kind not in classes)
            if file < "0100":
                images.append(np.asarray(Image.open(io.BytesIO(entries.extractfile(entry).read()))))
                labels.append(classes.index(kind))
    assert len(images) == 1000 and classes == sorted(classes)
    path = shared_data / "weights" / f"cifar10_{name}.th"
    extractor = features.load(name.partition("-")[0], weights=path)
    scores = jax.jit(extractor.apply)(extractor.params, extractor.prepare(images))["logits"]
    found = (np.asarray(scores).argmax(-1) == np.array(labels)).mean()
    with capsys.disabled():
        print(f"\n{name}: {found:.1%} of 1,000")
    assert extractor.published and abs(found - share) < 0.01
