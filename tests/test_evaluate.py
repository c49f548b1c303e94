"""Images through feature networks to metrics: places, protocols, references, results, bad input."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_features
from commands import ROOT
from PIL import Image
from test_several import ended, start

from dlc_jax import cli, parallel, pipeline
from dlc_jax.cli import sweep
from dlc_jax.data.files import scan
from dlc_jax.data.record_writer import write as write_records
from dlc_jax.errors import UserError
from dlc_jax.evals import frechet, inception_score, manifold
from dlc_jax.evaluation import diversity, metrics, names, reference, results, scoring
from dlc_jax.evaluation.images import of_pixels, open_set
from dlc_jax.evaluation.scoring import Scorer
from dlc_jax.features import Extractor, lpips
from dlc_jax.interop import files
from dlc_jax.report import figure

CLOSE = 1e-6  # relative
SETS = [f"{metric}" for metric in ("fd", "precision", "recall", "density", "coverage", "vendi")]


def drawn(count, seed, side=16, shift=0):
    """Smooth colored noise."""
    small = np.random.default_rng(seed).integers(shift, 256, (count, 4, 4, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(one).resize((side, side))) for one in small])


def folder(path, images):
    path.mkdir(exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(path / f"{number:05d}.png")
    return path


def small(name="squeezenet", protocol="stretch", width=24, published=True):
    """A network of one layer with outputs like Inception's."""
    random = np.random.default_rng(0)
    shapes = {"pool": width, "spatial": 12, "logits": 10}
    params = {key: random.normal(size=(48, size)) / 7 for key, size in shapes.items()}
    params = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)

    def apply(params, images):
        x = jax.image.resize(images.astype(jnp.float32), (len(images), 4, 4, 3), "linear")
        x = x.reshape(len(x), -1) / 64 - 2
        return {key: jnp.maximum(x @ params[key], 0) + 0.1 for key in shapes}

    fields = {"outputs": shapes, "params": params, "prepare": np.stack, "apply": apply}
    fields |= {"weights_sha256": "ab" * 32, "published": published}
    return Extractor(name=name, protocol=protocol, **fields)


def array_set(images, name="drawn"):
    return of_pixels(name, images.__getitem__, len(images))


def one_device(batch=32, extractor=None, count=1):
    mesh = parallel.make_mesh(devices=jax.devices()[:count])
    return Scorer(extractor or small(), mesh=mesh, batch=batch)


def values(found):
    return {name: entry["value"] for name, entry in found["metrics"].items()}


# ---- images


def test_every_kind_of_place_has_the_same_images(tmp_path):
    images = drawn(6, 0)
    whole = folder(tmp_path / "folder", images)
    np.savez(tmp_path / "samples.npz", images)
    write_records(tmp_path / "records", scan(whole))
    subprocess.run(["tar", "cf", tmp_path / "all.tar", "-C", whole, "."], check=True)
    found = [open_set(tmp_path / name) for name in ("folder", "samples.npz", "records", "all.tar")]
    for each in found:
        assert (each.count, each.size, each.gray) == (6, (16, 16), 0)
        np.testing.assert_array_equal([each.read(n) for n in range(6)], images)
    assert found[0].sha256 == found[2].sha256 == found[3].sha256  # the same files
    folder(whole, 255 - images[:1])
    assert open_set(whole).sha256 != found[0].sha256


def test_some_of_the_images_stand_for_all(tmp_path):
    images = drawn(10, 0)
    whole = folder(tmp_path / "a", images)
    some = open_set(whole, count=5)
    np.testing.assert_array_equal([some.read(n) for n in range(5)], images[::2])
    assert some.sha256 != open_set(whole).sha256
    cropped = open_set(whole, image=8)
    assert cropped.size == (8, 8) == cropped.read(0).shape[:2]
    assert cropped.sha256 != open_set(whole).sha256


@pytest.mark.parametrize(
    ("options", "word"),
    [({}, "2 sizes, 5 of 16 x 16, 1 of 16 x 20"), ({"count": 9}, "has 6 images, not 9")],
)
def test_sets_that_are_refused(options, word, tmp_path):
    whole = folder(tmp_path / "a", drawn(5, 0))
    Image.new("RGB", (20, 16)).save(whole / "x.png")
    with pytest.raises(UserError, match=word):
        open_set(whole, **options)


def test_gray_images(tmp_path):
    whole = folder(tmp_path / "a", drawn(4, 0))
    for number in range(2):
        Image.open(whole / f"{number:05d}.png").convert("L").save(whole / f"{number:05d}.png")
    found = open_set(whole)
    assert found.gray == 2 and found.read(0).shape == (16, 16, 3)
    warnings = metrics.score(found, ["vendi"], None, one_device())[1]
    assert "2 of 4 images" in warnings[0] and "gray" in warnings[0]
    every = folder(tmp_path / "b", drawn(3, 0)[..., 0])
    with pytest.raises(UserError, match="all 3 images are gray.*--gray"):
        open_set(every)
    assert open_set(every, gray=True).gray == 3
    whole.joinpath("00003.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="00003.png cannot be read"):
        open_set(whole)


# ---- scores


@pytest.fixture(scope="module")
def sets():
    return array_set(drawn(150, 1, shift=20)), array_set(drawn(130, 2))


def test_values_are_those_of_the_metrics_on_whole_arrays(sets, tmp_path):
    samples, ref = sets
    scorer = one_device(extractor=small("inception", "adm"))
    found = reference.of_images(ref, scorer, cache=tmp_path)
    kinds = names.parse("fid,sfid,is,kid,precision,recall,density,coverage,vendi", "inception")
    result = results.scored(samples, kinds, reference=found, scorer=scorer)
    apply = jax.jit(scorer.extractor.apply)
    x, y = (
        apply(scorer.extractor.params, np.stack([each.read(n) for n in range(each.count)]))
        for each in sets
    )

    def distance(output):
        moments = [(f.mean(0), np.cov(f.T)) for f in (np.float64(x[output]), np.float64(y[output]))]
        return frechet.distance(*moments[0], *moments[1])

    near = manifold.precision_recall_density_coverage(*map(np.asarray, (x["pool"], y["pool"])))
    expected = near._asdict() | {"fid": distance("pool"), "sfid": distance("spatial")}
    got = values(result)
    assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert set(got) == {*expected, "is", "kid", "vendi"}
    fid = result["metrics"]["fid"]
    sigma = np.cov(np.float64(y["pool"]).T)
    assert fid["bias"] == pytest.approx(frechet.bias(sigma, 150), rel=1e-5)
    assert fid["bias_reference"] == pytest.approx(frechet.bias(sigma, 130), rel=1e-5)
    assert 0 < fid["error"] < fid["value"]
    # of the training images' own features the reference's standard error is of other draws
    others = [array_set(drawn(150, seed, shift=20)) for seed in range(10, 22)]
    again = [values(results.scored(o, ["frechet"], reference=found, scorer=scorer)) for o in others]
    spread = np.std([each["fid"] for each in again], ddof=1)
    assert spread / 2 < fid["error"] < 2 * spread


@pytest.mark.parametrize(("batch", "devices"), [(7, 1), (64, 1), (32, 8), (7, 8)])
def test_any_batch_and_any_devices_give_the_same_results(batch, devices, sets, tmp_path):
    def result(scorer):
        found = reference.of_images(sets[1], scorer, keep=False)
        kinds = names.parse(",".join([*SETS, "kd"]), "squeezenet")
        return values(results.scored(sets[0], kinds, reference=found, scorer=scorer))

    expected = result(one_device(32))
    assert result(one_device(batch, count=devices)) == pytest.approx(expected, rel=CLOSE)


def test_features_come_in_order_and_each_once(sets):
    scorer = one_device(7, count=8)
    found = np.concatenate([each["pool"] for each in scorer.features(sets[0], ["pool"])])
    images = np.stack([sets[0].read(n) for n in range(150)])
    expected = scorer.extractor.apply(scorer.extractor.params, images)["pool"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_blocks_and_rows_that_are_kept(sets, monkeypatch):
    """Of more images than a block, in batches that do not fit it, and not all features kept."""
    monkeypatch.setattr(scoring, "BLOCK", 32)
    monkeypatch.setattr(reference, "ROWS", 20)
    scorer = one_device(24)
    found = reference.of_images(sets[1], scorer, keep=False)
    images = np.stack([sets[1].read(n) for n in range(130)])
    expected = np.asarray(scorer.extractor.apply(scorer.extractor.params, images)["pool"])
    np.testing.assert_allclose(found.statistics["main"][0], expected.mean(0), rtol=1e-5)
    chosen = expected[np.arange(20) * 130 // 20]
    np.testing.assert_allclose(found.features, chosen, rtol=1e-5, atol=1e-6)
    with scorer.collect(sets[1], keep={"spatial": np.arange(130)}, score=True) as collected:
        every = scorer.extractor.apply(scorer.extractor.params, images)
        spatial = collected.features["spatial"]
        np.testing.assert_allclose(spatial, every["spatial"], rtol=1e-5, atol=1e-6)
        expected = inception_score.inception_score(np.asarray(every["logits"]))
        assert collected.inception_score.score() == pytest.approx(expected, rel=1e-5)
        path = spatial.filename
        assert os.path.getsize(path) == 130 * 12 * 4
    assert not os.path.exists(path)


def test_lpips_diversity(sets):
    @dataclasses.dataclass
    class Absolute:
        params = np.ones((), np.float32)

        def distance(self, params, a, b):
            return params * jnp.abs(a - b).mean((1, 2, 3))

    found = diversity.diversity(sets[0], Absolute(), seed=3, pairs=60, batch=16)
    pairs = np.random.RandomState(3).permutation(150)[:120].reshape(-1, 2)
    images = np.stack([sets[0].read(n) for n in range(150)]) / 127.5
    each = np.abs(images[pairs[:, 0]] - images[pairs[:, 1]]).mean((1, 2, 3))
    assert found["value"] == pytest.approx(each.mean(), rel=1e-5)
    assert found["error"] == pytest.approx(each.std(ddof=1) / 60**0.5, rel=1e-4)
    with pytest.raises(UserError, match="needs 4 images"):
        diversity.diversity(array_set(drawn(3, 0)), Absolute())


# ---- references


def adm_file(path, found, **more):
    pairs = {"main": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
    arrays = {n: v for kind, both in pairs.items() for n, v in zip(both, found.statistics[kind])}
    np.savez(path, **arrays, **more)


def test_a_reference_goes_through_files_of_ours_and_of_adm(sets, tmp_path):
    scorer = one_device(extractor=small("inception", "adm"))
    made = reference.of_images(sets[1], scorer, cache=tmp_path)
    reference.save(made, tmp_path / "own.npz", scorer.extractor)
    images = np.stack([sets[1].read(n) for n in range(130)])
    adm_file(tmp_path / "adm.npz", made, arr_0=images)
    read = [
        reference.open_reference(tmp_path / name, scorer, features=True, cache=tmp_path)
        for name in ("own.npz", "adm.npz")
    ]
    kinds = names.parse("fid,sfid,precision,recall,kid", "inception")
    found = [results.scored(sets[0], kinds, reference=each, scorer=scorer) for each in read]
    expected = values(results.scored(sets[0], kinds, reference=made, scorer=scorer))
    assert values(found[0]) == values(found[1]) == pytest.approx(expected, rel=1e-9)
    assert (read[0].count, read[1].count) == (130, None)
    assert read[0].sha256 == made.sha256 and read[0].size == (16, 16)


def test_a_reference_is_computed_once(sets, tmp_path, monkeypatch):
    scorer = one_device()
    made = reference.of_images(sets[1], scorer, cache=tmp_path)
    monkeypatch.setattr(Scorer, "collect", None)
    again = reference.of_images(sets[1], scorer, cache=tmp_path)
    np.testing.assert_array_equal(again.statistics["main"][1], made.statistics["main"][1])
    np.testing.assert_array_equal(again.features, made.features)
    monkeypatch.undo()
    (kept,) = (tmp_path / "statistics").iterdir()
    kept.write_bytes(kept.read_bytes()[:1000])  # damaged: it is made again
    assert reference.of_images(sets[1], scorer, cache=tmp_path).count == 130
    other = one_device(extractor=dataclasses.replace(small(), weights_sha256="cd" * 32))
    reference.of_images(sets[1], other, cache=tmp_path)
    assert len([*(tmp_path / "statistics").iterdir()]) == 2


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"protocol": "torch"}, "protocol adm, not torch"),
        ({"weights_sha256": "cd" * 32}, "other weights"),
        ({"name": "dinov2"}, "network inception, not dinov2"),
    ],
)
def test_a_reference_of_something_else_is_refused(change, word, sets, tmp_path):
    extractor = small("inception", "adm")
    made = reference.of_images(sets[1], one_device(extractor=extractor), keep=False)
    reference.save(made, tmp_path / "own.npz", extractor)
    with pytest.raises(UserError, match=word):
        reference.read(tmp_path / "own.npz", dataclasses.replace(extractor, **change))


def test_files_that_say_nothing_count_as_of_who_writes_such_files(sets, tmp_path):
    adm, torch = (small("inception", protocol) for protocol in ("adm", "torch"))
    made = reference.of_images(sets[1], one_device(extractor=adm), keep=False)
    adm_file(tmp_path / "adm.npz", made)
    mu, sigma = made.statistics["main"]
    np.savez(tmp_path / "fid.npz", mu=mu, sigma=sigma)
    assert reference.read(tmp_path / "adm.npz", adm).count is None
    assert reference.read(tmp_path / "fid.npz", torch).features is None
    assert reference.read(tmp_path / "fid.npz", adm, made_with="adm")
    for name, extractor in (("adm", torch), ("fid", adm)):
        with pytest.raises(UserError, match="is of protocol"):
            reference.read(tmp_path / f"{name}.npz", extractor)
    with pytest.raises(UserError, match="published weights"):
        reference.read(tmp_path / "adm.npz", small("inception", "adm", published=False))
    with pytest.raises(UserError, match=r"d = 5"):
        reference.read(tmp_path / "adm.npz", small("inception", "adm", width=5))
    scorer = one_device(extractor=torch)
    with pytest.raises(UserError, match="no images"):
        reference.open_reference(tmp_path / "fid.npz", scorer, features=True)
    with pytest.raises(UserError, match="no statistics mu_s"):
        reference.read(tmp_path / "fid.npz", torch).moments("spatial")


# ---- what is warned of or refused


def test_few_images_and_the_reference_itself_are_warned_of(sets, tmp_path):
    scorer = one_device()
    found = reference.of_images(sets[1], scorer, cache=tmp_path)
    few = results.scored(array_set(drawn(10, 5)), ["frechet"], reference=found, scorer=scorer)
    (warning,) = few["warnings"]
    assert re.search(r"fd_squeezenet .* of 10 images: about [\d.]+ of it is bias", warning)
    same = results.scored(sets[1], ["frechet"], reference=found, scorer=scorer)
    assert (
        "are the same images" in same["warnings"][0] and abs(values(same)["fd_squeezenet"]) < 1e-6
    )
    larger = array_set(drawn(150, 1, side=20, shift=20))
    other = results.scored(larger, ["frechet"], reference=found, scorer=scorer)
    assert "20 x 20 pixels, the reference of 16 x 16" in other["warnings"][0]


@pytest.mark.parametrize("kind", ["frechet", "precision", "kernel", "vendi", "score"])
def test_nan_features_are_refused(kind, sets, tmp_path):
    scorer = one_device()
    found = reference.of_images(sets[1], scorer, cache=tmp_path)
    broken = small()
    broken.params["pool"][3, 3] = broken.params["logits"][3, 3] = np.nan
    with pytest.raises(UserError, match="NaN or infinite"):
        results.scored(sets[0], [kind], reference=found, scorer=one_device(extractor=broken))


@pytest.mark.parametrize("kind", ["frechet", "precision"])
def test_constant_features_are_refused(kind, sets, tmp_path):
    found = reference.of_images(sets[1], one_device(), cache=tmp_path)
    same = array_set(np.repeat(drawn(1, 0), 20, axis=0))
    with pytest.raises(UserError, match="equal"):
        results.scored(same, [kind], reference=found, scorer=one_device())


@pytest.mark.parametrize(
    ("text", "network", "word"),
    [
        ("fid,fids", "inception", "'fids' is unknown"),
        ("fid", "squeezenet", "squeezenet's is called fd"),
        ("fd_dinov2", "squeezenet", "unknown"),
        ("is", "dinov2", "leave it out"),
        (",", "inception", "no metric"),
    ],
)
def test_names_that_are_refused(text, network, word):
    with pytest.raises(UserError, match=word):
        names.parse(text, network)


def test_only_inceptions_distance_is_called_fid():
    assert names.called("inception")["frechet"] == small("inception").frechet_name == "fid"
    assert names.called("dinov2")["frechet"] == small("dinov2").frechet_name == "fd_dinov2"
    assert names.parse("fd,fd_squeezenet,precision", "squeezenet") == ["frechet", "precision"]


# ---- the command


def verb(capsys, *arguments, code=0):
    assert cli.main(["evaluate", *map(str, arguments)]) == code
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return err if code else out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "no images to score"),
        ("{a}", "give SAMPLES REFERENCE"),
        ("{a} {b} --metrics fit", "'fit' is unknown"),
        ("{a} {b} --network vgg --metrics precision", "'vgg' are unknown"),
        ("{a} {b}", "no file was given; give the path of pt_inception-2015-12-05-6726825d.pth"),
        ("{a} {b} --weights {a}/nothing.pth", "published at github.com/mseitzer/pytorch-fid"),
        ("{a} {b} --weights {text}", "expected is pt_inception-2015-12-05-6726825d.pth"),
        ("{a} {b} --protocol best --weights {text}", "choose one of adm, torch, clean"),
        ("{a} --metrics lpips", "LPIPS, trunk: no file was given"),
        ("{a} {b} --out {here}/x.npz", "not a .json"),
        ("--reference {a}", "--out=FILE.npz"),
        ("{a} {b} --sweep scale=1,2", "-w W"),
        ("-w {here}/nowhere --sweep scale=one", "scale=A,B"),
        ("{a} {b} --codes oracle", "-w W"),
        ("-w {here}/nowhere --codes real", "'real'"),
        ("-w {here}/nowhere --sweep scale=1", "nowhere does not exist"),
        ("{a} {b} --sampler.steps=3", "unexpected argument"),
    ],
)
def test_a_command_that_is_refused_in_one_line(line, words, tmp_path, capsys):
    (tmp_path / "text.safetensors").write_text("no tensors")
    places = {name: folder(tmp_path / name, drawn(3, 0)) for name in "ab"}
    line = line.format(here=tmp_path, text=tmp_path / "text.safetensors", **places)
    err = verb(capsys, *line.split(), code=2)
    assert words in err and err.count("\n") == 1 and err.startswith("dlc_jax: ")


def test_a_command_scores_and_writes_what_it_depends_on(tmp_path, capsys, shared_data):
    pytest.importorskip("torch", reason="the weights are a file of PyTorch's")
    weights = shared_data / "weights" / "cifar10_resnet20-12fca82f.th"
    places = [folder(tmp_path / name, drawn(40, seed, side=32)) for seed, name in enumerate("abc")]
    options = ["--network", "resnet20", "--weights", weights, "--cache", tmp_path / "cache"]
    out, stats = tmp_path / "results.json", tmp_path / "reference.npz"
    said = verb(capsys, *places, *options, "--out", out, "--metrics", "fd,precision,kd,vendi")
    assert said.count("fd_resnet20") >= 2 and "warning: fd_resnet20" in said
    found = json.loads(out.read_text())
    assert [each["count"] for each in found["results"]] == [40, 40]
    assert found["weights_sha256"].startswith("12fca82f") and found["published"] is True
    assert found["reference"]["count"] == 40 and len(found["reference"]["sha256"]) == 64
    assert found["network"] == "resnet20" and found["protocol"] == "native"
    assert found["matmul_precision"] == "highest" and found["seed"] == 0 and found["batch"] == 64
    assert {"jax", "numpy"} <= set(found["versions"]) and "commit" in found
    assert found["results"][0]["images_per_s"] > 0
    assert f"wrote {stats}" in verb(capsys, "--reference", places[2], *options, "--out", stats)
    again = verb(capsys, places[0], stats, *options, "--metrics", "fd,precision,kd,vendi")
    assert again.splitlines()[:5] == said.splitlines()[:5]


def test_a_command_for_diversity(tmp_path, capsys):
    trunk, heads = tmp_path / "trunk.safetensors", tmp_path / "heads.safetensors"
    test_features.file_of(trunk, lpips.Trunk("squeeze"), 64, lpips._name)
    widths = {name: head.shape[2] for name, head in lpips._heads("squeeze").items()}
    ones = {name: np.ones((1, width, 1, 1), np.float32) for name, width in widths.items()}
    files.save(heads, {f"{name}.model.1.weight": head for name, head in ones.items()})
    place, out = folder(tmp_path / "a", drawn(12, 0, side=64)), tmp_path / "r.json"
    given = ["--lpips-weights", trunk, "--lpips-heads", heads]
    said = verb(capsys, place, "--metrics", "lpips", "--lpips", "squeeze", *given, "--out", out)
    assert "warning: the trunk of LPIPS is not the published file" in said
    found = json.loads(out.read_text())
    distance = found["results"][0]["metrics"]["lpips"]
    assert distance["value"] > 0 and distance["error"] > 0 and distance["pairs"] == 6
    assert found["lpips"]["published"] == {"trunk": False, "heads": False}
    assert "network" not in found and "reference" not in found


def test_figure():
    points = [(1.0, 5.0, 1.0), (1.5, 3.0, None), (3.0, 4.0, 0.2)]
    picture = figure.panels({"fid": points, "recall": points}, under="scale", columns=2)
    assert picture.shape == (600, 1920, 3)
    blue = (picture == figure.BLUE).all(-1)

    def marks(x):
        """Rows that are blue where the setting x is."""
        low, high = 1 - 0.08 * 2, 3 + 0.08 * 2
        column = 2 * (72 + (x - low) / (high - low) * (456 - 72))
        return blue[:, round(column) - 1 : round(column) + 1].any(1).nonzero()[0]

    bar, point = marks(1.0), marks(3.0)
    assert np.ptp(bar) > 3 * np.ptp(point) and bar.mean() < point.mean()  # larger values are higher
    one = figure.panels({"fid": points[:1]}, under="scale")
    assert one.shape == (600, 960, 3) and (one == figure.BLUE).all(-1).any()


# ---- several processes


@pytest.mark.slow
def test_two_processes_share_the_images_and_agree(tmp_path, shared_data):
    weights = shared_data / "weights" / "cifar10_resnet20-12fca82f.th"
    a, b = (folder(tmp_path / name, drawn(90, seed, side=32)) for seed, name in enumerate("ab"))
    words = [a, b, "--network", "resnet20", "--weights", weights, "--cache", tmp_path / "cache"]
    words += ["--metrics", "fd,precision,recall,density,coverage,kd,vendi"]
    found = {}
    for n, batch in ((1, 64), (2, 14), (2, 64)):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        out = tmp_path / f"{n}.json"
        line = [sys.executable, "-m", "dlc_jax.cli", "evaluate", *map(str, words)]
        line += ["--out", str(out), "--batch", str(batch)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "DLC_HEARTBEAT": "20"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes = start(n, 1, line, environment, **pipes)
        codes, said = ended(processes, 200)
        assert codes == [0] * n, said
        found[n, batch] = json.loads(out.read_text())
    expected = values(found[1, 64]["results"][0])
    assert found[2, 14]["processes"] == 2
    for key in ((2, 14), (2, 64)):
        assert values(found[key]["results"][0]) == pytest.approx(expected, rel=CLOSE)
        assert found[key]["reference"] == found[1, 64]["reference"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_scores_what_the_run_draws(quickstart, tmp_path, capsys, shared_data, monkeypatch):
    monkeypatch.setattr(sweep, "TRAINING", 100)
    weights = shared_data / "weights" / "squeezenet_v1.0_decoded_OIHW.npz"
    words = ["-w", quickstart / "run", "--network", "squeezenet", "--weights", weights]
    words += ["--protocol", "stretch", "--count", 24, "--metrics", "fd,vendi", "--seed", 3]
    out = tmp_path / "new" / "sweep.json"
    words += ["--sampler.steps=2", "--cache", tmp_path / "cache", "--out", out]
    said = verb(capsys, *words, "--sweep", "scale=2,1", "--codes", "both")
    assert said.count("fd_squeezenet") >= 2 and f"wrote {out.with_suffix('.png')}" in said
    found = json.loads(out.read_text())
    rows = [(each["codes"], each["scale"]) for each in found["results"]]
    assert rows == [("oracle", 1.0), ("oracle", 2.0), ("prior", 1.0), ("prior", 2.0)]
    assert found["results"][1]["sampler"]["guidance"]["scale"] == 2.0
    assert found["reference"]["name"].startswith("training images of") and found["seed"] == 3
    assert found["reference"]["count"] == 100
    assert Image.open(out.with_suffix(".png")).size == (2880, 1200)
    real = sweep._codes(pipeline.load(quickstart / "run"), 24, 3, "oracle")
    with pytest.raises(UserError, match="--count=.* or less"):
        sweep._codes(pipeline.load(quickstart / "run"), 10**6, 3, "oracle")
    with pipeline.load(quickstart / "run", batch=24) as loaded:
        for each in found["results"]:
            guidance = dataclasses.replace(loaded.sampler.guidance, scale=each["scale"])
            sampler = dataclasses.replace(loaded.sampler, steps=2, guidance=guidance)
            images = loaded.sample(24, seed=3, sampler=sampler)
            if each["codes"] == "oracle":  # of the same noise
                images = loaded.decode(real, seed=4, sampler=sampler)
            assert array_set(images).sha256 == each["sha256"]
