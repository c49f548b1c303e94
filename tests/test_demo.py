"""The run that the package brings, and folders of dlc export torch that open as the run did."""

import json
import math
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_cli import refused
from test_export_torch import STEPS, export, kind, make

from dlc_jax import cli, main, pipeline, recipe, workdir
from dlc_jax.data.shapes import Shapes
from dlc_jax.errors import UserError
from dlc_jax.interop import slots
from dlc_jax.networks import start, weights
from dlc_jax.parallel import make_mesh


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run whose networks are complete, with random weights."""
    place = tmp_path_factory.mktemp("run") / "W"
    place.mkdir()
    return place, make(place)


@pytest.fixture(scope="module")
def demo():
    with pipeline.load("demo", batch=8) as loaded:
        yield loaded


def images(count=8, size=16):
    source = Shapes(split="validation", image=size, count=count, seed=0, positions=False)
    return np.stack([source[number]["image"] for number in range(count)])


def test_a_folder_opens_with_every_weight_of_the_run(finished, tmp_path, capsys):
    place, config = finished
    export(capsys, place, tmp_path / "out", "--no-code")
    assert not list((tmp_path / "out").glob("*.py"))
    opened = pipeline.load(tmp_path / "out").config
    assert opened.to_json() == pipeline.load(place).config.to_json()
    for step in STEPS:
        own, other = (kind(config, where, step, make_mesh()) for where in (place, tmp_path / "out"))
        assert weights.are_in(other.directory)
        unread = ("head/",) if step == "encoder" else ("nothing",)
        found = slots.flat(other.params)
        for path, array in slots.flat(own.params).items():
            expected = np.zeros_like(array) if path.startswith(unread) else array
            np.testing.assert_array_equal(found[path], expected)


def test_a_folder_that_is_damaged_is_refused(finished, tmp_path, capsys):
    place, config = finished
    out = tmp_path / "out"
    export(capsys, place, out, "--steps", "prior")
    identity = weights.identity_of(out / "prior")
    file = out / "prior" / weights.FILE
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert weights.identity_of(out / "prior") != identity
    file.write_bytes(file.read_bytes()[:-9])
    said = refused(capsys, "sample", "-w", out, "-n", 1, "--out", tmp_path / "a.png")
    assert str(file) in said
    (out / workdir.RUN).write_text("[]")
    assert f"{workdir.RUN} is damaged" in refused(capsys, "sample", "-w", out)


def test_info_of_a_folder_shows_its_parts(finished, tmp_path, capsys):
    """As of a run's steps: parameters, dtype, and the step that each is from."""
    place, config = finished
    export(capsys, place, tmp_path / "out", "--dtype", "float16")
    assert cli.main(["info", str(tmp_path / "out")]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:5]]
    assert rows[0] == ["part", "state", "size"]
    for row, step in zip(rows[1:], STEPS, strict=True):
        shapes = slots.shapes_of(kind(config, place, step).shapes)
        own = {path: shape for path, shape in shapes.items() if not path.startswith("head/")}
        assert row[:2] == [step, f"{sum(map(math.prod, own.values())):,}"]
        assert row[2:9] == f"parameters of float16, 24 steps of {step}".split()
    (tmp_path / "out" / "prior" / weights.FILE).write_bytes(b"x")
    known = json.loads((tmp_path / "out" / "config.json").read_text())
    known["trained"] = {"encoder": {"step": "student"}, "generator": None}
    (tmp_path / "out" / "config.json").write_text(json.dumps(known))
    assert cli.main(["info", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "of float16, imported as student" in said and "is damaged" in said


def test_info_of_the_demo(capsys):
    assert cli.main(["info", "demo"]) == 0
    said = capsys.readouterr().out
    assert "encoder    504,072 parameters of float16, 640 steps of student" in said


def test_what_is_exported_names_no_place_of_the_machine():
    inner = {"path": "/a/b", "stage": "codes", "cache": None}
    found = workdir.portable({"data": {"path": "/images"}, "codes": inner, "seed": 0})
    assert found == {
        "data": {"path": ""},
        "codes": {"path": "", "stage": "codes", "cache": None},
        "seed": 0,
    }


def test_demo_is_a_name_unless_a_folder_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert workdir.locate("demo") == workdir.DEMO
    assert workdir.locate("other") == workdir.locate("./other")
    (tmp_path / "demo").mkdir()
    assert workdir.locate("demo").resolve() == tmp_path / "demo"


def test_the_demo_is_small_and_says_where_it_is_from():
    files = [path for path in workdir.DEMO.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 4e6
    assert {path.suffix for path in files} == {".safetensors", ".json", ".md"}
    card = (workdir.DEMO / "model_card.md").read_text()
    for part in ("apache-2.0", "shapes", "composition/", "Trained by dlc_jax at", "run.json"):
        assert part in card
    assert json.loads((workdir.DEMO / workdir.RUN).read_text())["data"]["name"] == "shapes"


def test_the_demo_redraws_images_it_has_not_seen(demo):
    """Far closer to their own image than to another's: the weights are trained ones."""
    given = images(size=32)
    codes = demo.encode(given)
    drawn = demo.decode(codes, seed=0).astype(float)
    own, other = (np.abs(drawn - each).mean() for each in (given, given[::-1]))
    assert own < 0.6 * other
    bits, _ = demo.likelihood(codes)
    values = demo.config.prior.model["values"]  # `values` is a method
    scrambled = np.random.default_rng(0).integers(values, size=codes.shape)
    assert bits.mean() < demo.likelihood(scrambled)[0].mean() - 20


def test_a_composition_before_any_training(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compose", "--demo", "--count", "2", "--keep", "0-11"]) == 0
    said = capsys.readouterr().out
    assert "two unseen images of the run's data: " in said and "wrote composition.png" in said
    assert len(np.unique(Image.open("composition.png"))) > 10
    assert list(tmp_path.iterdir()) == [tmp_path / "composition.png"]


def test_one_place_is_asked_for(capsys):
    assert "one of the arguments -w/--workdir --demo" in refused(capsys, "compose")
    assert "not allowed with" in refused(capsys, "sample", "--demo", "-w", "runs/x")


@pytest.mark.torch
def test_pytorch_opens_the_demo(demo):
    from hub_folders import modeling

    torch = pytest.importorskip("torch")
    found = modeling().DLCPipeline.from_pretrained(workdir.DEMO, dtype=torch.float32)
    given = images()
    codes = found.encode(torch.from_numpy(given))
    assert (codes.numpy() == demo.encode(given)).mean() > 0.99


@pytest.fixture(scope="module")
def folder(finished, tmp_path_factory):
    """The run exported in float16: float32 holds it without loss."""
    out = tmp_path_factory.mktemp("folder") / "out"
    flags = ["--out", str(out), "--dtype", "float16", "--no-code"]
    assert cli.main(["export", "torch", "-w", str(finished[0]), *flags]) == 0
    return out


def fresh(finished, step):
    """(parameters that are all 7, those of the run in float16) by path."""
    found = slots.flat(kind(finished[1], finished[0], step, make_mesh()).params)
    sevens = slots.nested({path: jnp.full_like(array, 7) for path, array in found.items()})
    return sevens, {path: array.astype(jnp.float16) for path, array in found.items()}


@pytest.mark.parametrize("step", STEPS)
def test_training_starts_from_a_folder(step, finished, folder, caplog):
    """By its name and that of its part, all but what only training reads."""
    params, own = fresh(finished, step)
    new = ("head.*",) if step == "encoder" else ()
    for place in (folder, folder / step):
        start.check_start(place, params, kind=step, new=new)
        found = slots.flat(start.warm_start(place, params, kind=step, new=new))
        for path, array in found.items():
            expected = 7 if path.startswith("head/") else own[path]
            np.testing.assert_array_equal(array, np.broadcast_to(expected, array.shape))
            assert array.dtype == np.float32 and array.sharding == slots.flat(params)[path].sharding
    assert ("so new: head." in caplog.text) == (step == "encoder")


def test_a_start_that_does_not_fit_is_refused_as_a_runs_is(finished, folder, tmp_path):
    params, _ = fresh(finished, "prior")
    wide = {**params, "final": {**params["final"], "bias": jnp.zeros(9)}}
    rest = {name: tree for name, tree in params.items() if name != "final"}
    encoder, _ = fresh(finished, "encoder")
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    (damaged / "prior" / weights.FILE).write_bytes(b"x")
    shutil.rmtree(damaged / "generator")
    for place, kind_, given, new, said in (
        (folder, "encoder", encoder, (), "does not fit this model (head.direction is not in"),
        (folder, "prior", wide, (), "final.bias is (8,) and not (9,)"),
        (folder, "distill", rest, (), "final.bias has no place here"),
        (folder, "prior", params, ("hed.*",), "train.init_new: 'hed.*' names no parameter"),
        (folder, "prior", params, ("hed(",), "is an invalid regular expression"),
        (folder, "joint", params, (), "has no joint; give a folder that dlc export torch"),
        (damaged, "generator", params, (), "has no generator"),
        (damaged, "prior", params, (), "is damaged, or not a safetensors file"),
    ):
        for call in (start.check_start, start.warm_start):
            with pytest.raises(UserError, match=re.escape(said)) as error:
                call(place, given, kind=kind_, new=new)
            assert new or str(error.value).startswith(f"train.init_from={place}: ")


@pytest.mark.slow
def test_a_run_starts_from_a_folder(finished, folder, tmp_path):
    """Its first checkpoint is what the folder has; a start that cannot be leaves no run."""
    lines = {"steps": ("encoder",), "encoder.train.init_from": str(folder)}
    lines |= {"encoder.optimizer.learning_rate": 0.0, "encoder.train.steps": 1}
    lines |= {"encoder.train.batch": 64, "encoder.monitor.every": 0}
    with pytest.raises(UserError, match="encoder.train.init_from=.*out: .*head.direction is not"):
        main.run(recipe.changed(finished[1], lines), tmp_path / "W")
    assert not (tmp_path / "W").exists()
    config = recipe.changed(finished[1], lines | {"encoder.train.init_new": ("head.*",)})
    main.run(config, tmp_path / "W")
    _, own = fresh(finished, "encoder")
    found = kind(config, tmp_path / "W", "encoder", make_mesh()).params
    for path, array in slots.flat(found).items():
        if not path.startswith("head/"):
            np.testing.assert_array_equal(array, own[path])


CALLS = {
    "encode": lambda p, images, codes, **how: p.encode(images, **how),
    "simplices": lambda p, images, codes, **how: p.simplices(images, **how),
    "sample_codes": lambda p, images, codes, **how: p.sample_codes(2, **how),
    "complete": lambda p, images, codes, **how: p.complete(codes, [0], **how),
    "redraw": lambda p, images, codes, **how: p.redraw(codes, 0.1, **how),
    "surprise": lambda p, images, codes, **how: p.surprise(codes, **how),
    "compose": lambda p, images, codes, **how: p.compose([codes, codes], **how),
    "decode": lambda p, images, codes, **how: p.decode(codes, **how),
    "sample": lambda p, images, codes, **how: p.sample(2, **how),
}
OURS = {
    "features": lambda p, images, codes, **how: p.features(images, **how),
    "likelihood": lambda p, images, codes, **how: p.likelihood(codes, **how),
    "decode_all": lambda p, images, codes, **how: p.decode_all([codes, codes], **how),
}


@pytest.mark.parametrize("name", [*CALLS, *OURS])
def test_a_misspelt_keyword_is_no_keyword(name, demo):
    with pytest.raises(TypeError, match="'sed'"):
        (CALLS | OURS)[name](demo, images(2), np.zeros((2, 36), int), sed=0)


@pytest.mark.torch
@pytest.mark.parametrize("name", CALLS)
def test_nor_is_it_in_pytorch(name):
    from hub_folders import modeling

    torch = pytest.importorskip("torch")
    loaded = modeling().DLCPipeline.from_pretrained(workdir.DEMO, dtype=torch.float32)
    with pytest.raises(TypeError, match="'sed'"):
        CALLS[name](loaded, torch.from_numpy(images(2)), torch.zeros(2, 36, dtype=int), sed=0)


def test_no_run_and_no_folder_in_one_line(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        pipeline.load(tmp_path)
