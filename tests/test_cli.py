"""The verbs that use trained networks, info and config, as a person runs them."""

import argparse
import errno
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import recipes
from commands import ROOT, command
from PIL import Image

from dlc_jax import cli, pipeline, recipe, workdir
from dlc_jax.cli import VERBS, compose, networks
from dlc_jax.data.shapes import Shapes
from dlc_jax.errors import UserError
from dlc_jax.evals.pictures import grid, labelled_rows

FOREIGN = re.compile(
    r"WARNING: All log messages|[IWE]\d{4} |\w+ \d+/\d+ images"
)  # logs of compiled libraries, progress
STEPS = ("encoder", "codes", "probe", "prior", "generator", "samples")


def run(*arguments, cwd=ROOT):
    """(exit code, stdout, stderr without what is not ours) of a command."""
    done = subprocess.run(**command(*arguments, cwd=cwd), timeout=800)
    err = "".join(f"{line}\n" for line in done.stderr.splitlines() if not FOREIGN.match(line))
    return done.returncode, done.stdout, err


def refused(capsys, *arguments):
    """Runs a verb in this process, checks that it refuses in one line, and returns the line."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith("dlc_jax: ") and "Traceback" not in err, (
        out + err
    )
    return err


@pytest.fixture
def pictures(tmp_path):
    """Three images of the set's size, and a gray one of another."""
    source = Shapes(split="validation", image=16, count=3, seed=0, positions=False)
    for name, index in zip("abc", range(3)):
        Image.fromarray(source[index]["image"]).save(tmp_path / f"{name}.png")
    Image.fromarray(source[0]["image"]).convert("L").resize((50, 40)).save(tmp_path / "gray.jpg")
    return tmp_path


@pytest.fixture
def untrained(tmp_path):
    """A workdir whose run has only just begun."""
    home = tmp_path / "untrained"
    home.mkdir()
    config = recipes.load("quickstart.py:tiny")
    (home / "config.json").write_text(json.dumps(config.to_dict()))
    return home


# ---- without trained networks


@pytest.mark.parametrize(
    "verb",
    "info probe profile sample encode likelihood compose positions evaluate".split(),
)
def test_help_has_an_example(verb, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([verb, "--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert f"\n  dlc {verb} " in out.partition("example:")[2] and VERBS[verb][0][1:] in " ".join(
        out.split()
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("sample", "--workdir"),
        ("sample -w {untrained} -n 0", "0"),
        ("sample -w {untrained} -n some", "some"),
        ("sample -w {untrained} --sampler.method=rk4", "heun"),
        ("sample -w {untrained} --seed -1", "seed"),
        ("sample -w {untrained} --seed 4294967296", "4294967296"),
        (
            "sample -w {untrained} --sampler magic",
            "code_sampler.method='magic' is unknown; known: first",
        ),
        ("sample -w {untrained} --calls 0", "--calls: '0' is not a whole number above 0"),
        ("sample -w {untrained} --sampler.stpes=3", "did you mean 'samples.sampler.steps'"),
        ("sample -w {untrained} --sampler.steps=few", "'few' is not of type int"),
        ("sample -w {untrained} --stpes 3", "--stpes"),
        ("compose -w {untrained} a.png b.png --code_sampler.cals=3", "code_sampler.calls"),
        ("sample -w {untrained} --out {here}/a.jpg", "a.jpg"),
        ("sample -w {untrained} --out {here}/a.png -n 5000", "5000"),
        ("sample -w {untrained} --npz {here}/a.zip", "a.zip is not an .npz"),
        ("sample -w {untrained} --npz {here}/a.npz --out {here}/b", "two places"),
        ("sample -w {untrained} --out {here}/a.png/grid.png", "a.png"),
        ("sample -w {untrained} --out {here}/new.png", "train this step first"),
        ("sample -w {here}/nowhere", "nowhere does not exist"),
        ("sample -w {here}", "no run"),
        ("encode -w {untrained}", "IMAGE"),
        ("encode -w {untrained} {here}/nothing.png", "nothing.png"),
        ("encode -w {untrained} {here}/text.png", "text.png"),
        ("encode -w {untrained} {here}/text.png --out {here}/codes.npy", "codes.npy"),
        ("encode -w {untrained} {here}/empty", "empty"),
        ("encode -w {untrained} {here}/a.png", "train this step first"),
        ("compose -w {untrained} {here}/a.png", "two images"),
        ("compose -w {untrained} {here}/a.png {here}/text.png", "text.png"),
        ("compose -w {untrained} {here}/a.png {here}/b.png --weights 1;3", "1;3"),
        ("compose -w {untrained} {here}/a.png {here}/b.png --keep 3-1", "3-1 is not a range"),
        (
            "compose -w {untrained} {here}/a.png {here}/b.png --keep 1,,2",
            "no group of positions ''",
        ),
        ("compose -w {untrained} {here}/a.png {here}/b.png --keep 36", "0..35; got 36"),
        (
            "compose -w {untrained} {here}/a.png {here}/b.png --keep fork",
            "known: form, ground, tint",
        ),
        ("compose -w {kindless} {here}/a.png {here}/b.png --keep form", "run dlc positions W"),
        ("compose -w {untrained} {here}/a.png {here}/b.png --out {here}/x", "x is not a .png"),
        ("compose -w {untrained} {here}/a.png {here}/b.png --best 0", "--best: '0' is not a whole"),
        (
            "compose -w {untrained} {here}/a.png {here}/b.png --operator magic",
            "'magic' (choose from",
        ),
        (
            "compose -w {untrained} {here}/a.png {here}/b.png --operator infill "
            "--operator.rounds=2",
            "unknown field 'samples.operator.rounds'",
        ),
        ("sample -w {untrained} --operator.share=0.2", "there are --sampler.NAME=VALUE"),
        ("compose -w {untrained} {here}/a.png --partial 1.5", "'1.5' is not a share"),
        ("compose -w {untrained} {here}/a.png --partial nan", "'nan' is not a share"),
        ("compose -w {untrained} {here}/a.png --operator soft", "two images"),
        ("compose -w {untrained} {here}/a.png --all --best 2", "--all mixes nothing"),
        ("compose -w {untrained} {here}/a.png --operator infill", "train this step first"),
        ("compose -w {untrained} {here}/a.png --partial .5", "train this step first"),
        ("likelihood -w {untrained}", "PATH"),
        ("likelihood -w {untrained} {here}/a.png --draws 1", "--draws=1"),
        ("likelihood -w {untrained} {here}/a.png --draws -3", "'-3' is not a whole number"),
        ("likelihood -w {untrained} {here}/a.png --calls 3", "'--calls'"),
        ("likelihood -w {untrained} {here}/a.png {here}/c.npz", "c.npz alone"),
        ("likelihood -w {untrained} {here}/c.npz", "c.npz: No such file"),
        ("likelihood -w {untrained} {here}/text.npz", "with an array `codes`"),
        ("likelihood -w {untrained} {here}/flat.npz", "are [n, l], not [3]"),
        ("likelihood -w {untrained} {here}/text.png", "text.png"),
        ("likelihood -w {untrained} {here}/a.png", "train this step first"),
        ("positions {here}/nowhere", "nowhere does not exist"),
        ("positions {untrained} --out {here}/x", "x is not a .png"),
        ("positions {untrained} --clusters 0", "--clusters: '0' is not a whole number"),
        ("positions {untrained} --out {here}/p.png", "train this step first"),
        ("info {here}/nowhere", "nowhere does not exist"),
        ("profile {here}/nowhere", "nowhere does not exist"),
        ("profile {untrained} --step magic", "'magic' is not a step of"),
        ("profile {untrained} --step samples", "samples: nothing is trained there"),
        ("profile {untrained} --step prior", "no complete code store"),
        ("profile {untrained} --steps 0", "--steps"),
        ("info {here}/a.png", "not a folder"),
        ("info {here}/empty", "no run"),
    ],
)
def test_refused_in_one_line(arguments, words, pictures, untrained, capsys):
    (pictures / "text.png").write_text("no image")
    (pictures / "text.npz").write_text("no arrays")
    np.savez(pictures / "flat.npz", codes=np.arange(3))
    (pictures / "empty").mkdir()
    (pictures / "kindless").mkdir()
    config = recipe.expand({"data.name": "shapes"}).to_dict()
    (pictures / "kindless" / "config.json").write_text(json.dumps(config))
    places = {"here": pictures, "untrained": untrained, "kindless": pictures / "kindless"}
    before = sorted(pictures.rglob("*"))
    assert words in refused(capsys, *arguments.format(**places).split())
    assert sorted(pictures.rglob("*")) == before  # nothing is left behind


WITHOUT_JAX = """
import sys
from dlc_jax import cli
for line in sys.stdin:
    assert cli.main(line.split()) == 2 and "jax" not in sys.modules, line
"""
EARLY = """
sample -w {untrained} --sampler.stpes=3
sample -w {here}/nowhere
sample -w {untrained} --out {here}/a.png/grid.png
encode -w {here}/nowhere {here}/a.png
compose -w {untrained} {here}/a.png {here}/text.png
likelihood -w {here}/nowhere {here}/a.png
likelihood -w {untrained} {here}/a.png --draws 1
info {here}/empty
evaluate {here}/a.png {here}/b.png --metrics fit
evaluate -w {here}/nowhere --sweep scale=1
codes verify {untrained}
probe {untrained} --splits test
import dinov2 {here}/nothing.safetensors --out {here}/new
import dinov2 {here}/text.safetensors --out {here}/new
export sem {here}/nowhere --out {here}/x.safetensors
train --config=configs/quickstart.py:tiny --workdir={here}/a.png/W
train --config=configs/quickstart.py:tiny --workdir={here}/new --config.steps=('nope',)
plan --config=configs/quickstart.py:tiny
train --config=configs/quickstart.py:tiny --config.encoder.treads=1
train --config=configs/quickstart.py:tiny --config.encodr.threads=1
train --config=configs/quickstart.py:tiny --config.encoder.threads=many
train --config=configs/quickstart.py:tiny --config.*.train.stesp=3
train --config=configs/quickstart.py:tini
config configs/quickstart.py --all --config.encoder.model.widht=3
config configs/nothing.py
""".lstrip()


def test_what_is_refused_does_not_wait_for_jax(pictures, untrained):
    (pictures / "text.png").write_text("no image")
    (pictures / "text.safetensors").write_text("no tensors")
    (pictures / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_JAX],
        input=EARLY.format(here=pictures, untrained=untrained),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and done.stderr.count("\n") == EARLY.count("\n"), done.stderr


def test_config(capsys):
    assert cli.main(["config", "configs/quickstart.py:tiny", "--config.seed=3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "*.train.steps = 24" in lines and lines[-1] == "seed = 3" and len(lines) < 120
    assert cli.main(["config", "configs/quickstart.py:tiny", "--all", "--config.seed=3"]) == 0
    out = capsys.readouterr().out
    assert "encoder.train.steps = 24  # int, default " in out and "\nseed = 3" in f"\n{out}"


def test_config_of_a_run(untrained, capsys):
    assert cli.main(["config", str(untrained / "config.json"), "--all"]) == 0
    assert "encoder.train.steps = 24  # int, default " in capsys.readouterr().out


def test_all_fields_are_listed_without_jax():
    script = (
        "import sys; from dlc_jax import cli; cli.main(sys.argv[1:])\nprint('jax' in sys.modules)"
    )
    command = [sys.executable, "-c", script, "config", "configs/imagenet256.py", "--all"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.count("\n") > 250 and out.splitlines()[-1] == "False"


def test_another_operator_than_the_runs_names_no_groups(untrained):
    """The quickstart's is chosen; `untrained` has its operator."""

    def fields(name):
        return compose.named(argparse.Namespace(operator=name, workdir=str(untrained)))

    assert fields(None) == [] and fields("chosen") == ["--operator.name=chosen"]
    assert fields("coin") == ["--operator.name=coin"]
    assert fields("infill") == ["--operator.name=infill", "--operator.groups=()"]
    assert fields("magic") == ["--operator.name=magic"]  # which is refused as it is


def test_picture_of_a_composition():
    parents = [np.full((40, 30, 3), 10, np.uint8), np.full((8, 8, 3), 20, np.uint8)]
    children = np.full((11, 8, 8, 1), 30, np.uint8)
    found = compose.picture(parents, children)
    rows = labelled_rows({"composed 9": np.zeros((8, 8, 8, 3), np.uint8)}, columns=8)
    assert found.shape == (
        3 * rows.shape[0],
        rows.shape[1],
        3,
    )  # parents, eight children, three more
    side, images = 64 * 64, found[:, -8 * 66 :]  # beside the labels
    assert [int((images == level).all(-1).sum()) for level in (10, 20, 30)] == [
        side,
        side,
        11 * side,
    ]
    assert (images[10, 10] == 10).all() and (
        images[10, 10 + 66] == 20
    ).all()  # the first parent stands first


def test_a_disk_that_refuses_is_told(tmp_path):
    with (
        pytest.raises(UserError, match="grid.png: No space left on device; make room"),
        networks.writing(tmp_path / "grid.png"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_parts_cover_all_and_tell_the_time_left(capsys, monkeypatch):
    clock = iter(range(0, 10_000, 60))
    monkeypatch.setattr("dlc_jax.data.progress.time.monotonic", lambda: next(clock))
    assert list(networks.parts(10, 4, "work")) == [(0, 4), (4, 8), (8, 10)]
    out, err = capsys.readouterr()
    assert out == "" and "work: 4/10 images, " in err and " left" in err


def test_info_of_a_run_that_has_only_begun(untrained, capsys):
    assert cli.main(["info", str(untrained)]) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"  {step} +not started\n", out) for step in STEPS)


def test_info_of_half_finished_steps(untrained, capsys):
    config = json.loads((untrained / "config.json").read_text())
    config["encoder"]["train"]["steps"] = config["prior"]["train"]["steps"] = 40
    (untrained / "config.json").write_text(json.dumps(config))
    for step, done in (("encoder", 40), ("prior", 20)):  # the prior was made longer since
        (untrained / step / "checkpoints" / "16").mkdir(parents=True)
        (untrained / step / "checkpoints" / "16.sha256.json").write_text("{}")
        (untrained / step / "checkpoints" / "24.damaged").mkdir()
        (untrained / step / "done.json").write_text(json.dumps({"steps": done}))
        (untrained / step / "seconds.json").write_text(
            json.dumps({"before": 0.0, "seconds": 90.0, "step": done})
        )
        rows = [
            {"step": 8, "loss": 3.0, "validation/loss": 1.5},
            {"step": 16, "loss": 2.0, "validation/loss": 1.75},
        ]
        (untrained / step / "metrics.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 17, "lo'
        )
    (untrained / "results.json").write_text(
        json.dumps({"probe/shape": 0.25, "probe/count": 5, "seconds/encoder": 12.0})
    )
    with workdir.lock(untrained):
        assert cli.main(["info", str(untrained)]) == 0
    out = capsys.readouterr().out
    assert re.search(
        r"encoder +complete, 40 steps, 1 damaged checkpoint set aside +[\d.]+ kB +12.0 s", out
    )
    assert re.search(
        r"prior +20 of 40 steps, saved at 16, 1 damaged checkpoint set aside +[\d.]+ kB "
        r"+1 min 30 s",
        out,
    )
    assert "prior: training 2 at step 16; validation 1.75, best 1.5 at step 8" in out
    assert "probe: shape 0.25\n" in out and "a checkpoint that cannot be read" in out
    assert f"in use by process {os.getpid()}" in out
    assert cli.main(["info", str(untrained)]) == 0
    assert "not in use" in capsys.readouterr().out


def test_steps_of_a_variant_stand_in_the_order_in_which_they_were_finished(untrained, capsys):
    config = json.loads((untrained / "config.json").read_text())
    (untrained / "config.json").write_text(json.dumps(config | {"steps": ["without_codes"]}))
    for step, day in (("encoder", 1), ("prior", 3), ("codes", 2)):
        (untrained / step).mkdir()
        (untrained / step / "done.json").write_text(
            json.dumps({"steps": 30, "finished": f"2026-01-0{day} 10:00:00 +0000"})
        )
    assert cli.main(["info", str(untrained)]) == 0
    assert re.findall(r"^  (\w+) +(?:complete|not)", capsys.readouterr().out, re.M) == [
        "encoder",
        "codes",
        "prior",
        "without_codes",
    ]


def test_a_reader_that_leaves_is_no_error(untrained):
    pipe = subprocess.PIPE
    command = [sys.executable, "-u", "-m", "dlc_jax.cli", "info", str(untrained)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait() == 0 and "BrokenPipe" not in err, err


@pytest.mark.parametrize(
    "text", ["{", "[1]", '{"steps": 3, "encoder": "none", "prior": {"train": 1}}', ""]
)
def test_info_of_a_damaged_workdir(untrained, capsys, text):
    for step in ("encoder", "prior"):
        (untrained / step).mkdir()
        for name in ("done.json", "seconds.json", "metrics.jsonl", "checkpoints"):
            (untrained / step / name).write_text(text)
    for name in ("config.json", "results.json"):
        (untrained / name).write_text(text)
    assert cli.main(["info", str(untrained)]) == 0
    out = capsys.readouterr().out
    assert "  encoder " in out and "  prior " in out
    assert text.startswith('{"steps') or (
        "damaged: config.json" in out and "damaged: results.json" in out
    )


# ---- with trained ones


def slow(test):
    """The first of these tests also trains, for 25 seconds where nothing else runs."""
    return pytest.mark.slow(pytest.mark.timeout(900)(test))


@pytest.fixture
def trained(quickstart):
    return quickstart / "run"


@slow
def test_info(trained):
    code, out, err = run("dlc_jax.cli", "info", trained)
    assert (code, err) == (0, ""), err
    assert all(re.search(rf"  {step} +complete", out) for step in STEPS)
    assert (
        "encoder: training" in out
        and "jax" in out.partition("versions:")[2]
        and "unconditional: " in out
    )


@slow
def test_sample(trained, tmp_path):
    arguments = [
        "dlc_jax.cli",
        "sample",
        "-w",
        trained,
        *"-n 9 --seed 5 --sampler.steps=2 --sampler.method=euler".split(),
        *"--sampler.guidance.scale=2 --sampler auto --calls 5".split(),
    ]
    code, out, err = run(*arguments, "--out", "new/grid.png", cwd=tmp_path)
    assert (code, err) == (0, "") and out.splitlines()[-1] == "wrote new/grid.png: 9 images"
    made = re.fullmatch(r"codes by \w+, ([\d.]+) calls each", out.splitlines()[-2])
    assert 0 < float(made[1]) <= 5
    assert out.splitlines()[0] == "2 steps of euler, guidance 2, seed 5"
    shown = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
    assert shown.shape == (3 * 66 + 2, 3 * 66 + 2, 3) and shown.std() > 5
    code, out, err = run(*arguments, "--out", "folder", "--batch", 4, cwd=tmp_path)
    assert (code, err) == (0, "") and out.splitlines()[-1] == "wrote folder: 9 images"
    files = sorted((tmp_path / "folder").glob("*.png"))
    assert [file.name for file in files] == [f"{number:06d}.png" for number in range(9)]
    each = np.stack([np.asarray(Image.open(file)) for file in files])
    single = grid(each, columns=3)
    assert np.abs(single.astype(int) - shown).max() <= 1  # other batches, the same images
    (tmp_path / "folder" / "000003.png").unlink()
    run(*arguments, "--out", "folder", "--batch", 4, cwd=tmp_path)  # the part is drawn again
    assert sorted((tmp_path / "folder").glob("*.png")) == files
    code, out, err = run(*arguments, "--npz", "samples.npz", "--batch", 4, cwd=tmp_path)
    assert (code, err) == (0, "") and out.splitlines()[-1] == "wrote samples.npz: 9 images"
    np.testing.assert_array_equal(np.load(tmp_path / "samples.npz")["arr_0"], each)
    run(*arguments, "--out", "other", "--batch", 4, cwd=tmp_path)
    code, _, err = run(*arguments, "--seed", 6, "--out", "other", cwd=tmp_path)
    assert code == 2 and "another seed" in err


@slow
def test_encode(trained, pictures):
    code, out, err = run("dlc_jax.cli", "encode", "-w", trained, "a.png", "gray.jpg", cwd=pictures)
    assert (code, err) == (0, "")
    assert "1 of 2 images resized to 16 x 16 pixels" in out
    printed = dict(line.split(": ") for line in out.splitlines() if ": " in line)
    assert list(printed) == ["a.png", "gray.jpg"] and len(printed["a.png"].split()) == 36
    (pictures / "text.png").write_text("no image")
    code, out, err = run(
        "dlc_jax.cli",
        "encode",
        "-w",
        trained,
        ".",
        "--out",
        "codes.npz",
        "--batch",
        2,
        cwd=pictures,
    )
    assert (code, err) == (0, "") and out.splitlines()[
        -1
    ] == "wrote codes.npz: codes of 4 images, 36 positions each"
    assert "left out 1 of 5: text.png" in out
    with np.load(pictures / "codes.npz") as saved:
        codes = dict(zip(saved["names"].tolist(), saved["codes"]))
    assert sorted(codes) == ["a.png", "b.png", "c.png", "gray.jpg"]
    assert " ".join(map(str, codes["a.png"])) == printed["a.png"]


@slow
def test_compose(trained, pictures):
    arguments = (
        "dlc_jax.cli",
        "compose",
        "-w",
        trained,
        "a.png",
        "b.png",
        "gray.jpg",
        "--count",
        4,
        "--sampler.steps=2",
    )
    code, out, err = run(
        *arguments, "--operator", "coin", "--weights", "1,2,1", "--keep", "form,20",
        "--out", "composed.png", cwd=pictures,
    )  # fmt: skip
    assert (code, err) == (0, "") and out.splitlines()[
        -1
    ] == "wrote composed.png: 4 compositions of 3 images"
    assert "1 of 3 images resized" in out
    assert np.asarray(Image.open(pictures / "composed.png")).std() > 5
    code, out, err = run(
        *arguments, "--operator", "soft", "--operator.temperature=0.5", "--out", "soft.png",
        cwd=pictures,
    )  # fmt: skip
    assert (code, err) == (0, "") and out.splitlines()[-1].startswith("wrote soft.png")


def said(capsys, *arguments):
    """What a verb prints that is run in this process and succeeds."""
    assert cli.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


BITS = r"([\d.]+)(?: ± ([\d.]+))? bits"


@slow
def test_likelihood(trained, pictures, capsys):
    images = [pictures / "a.png", pictures / "gray.jpg"]
    words = ["likelihood", "-w", trained, "--draws", 8]
    out = said(capsys, *words, *images, "--surprise")
    *found, held = re.findall(rf"^(.*): {BITS}$", out, re.M)
    assert [name for name, *_ in found] == list(map(str, images)) and "held-out" in held[0]
    assert all(0 < float(error) < float(mean) < 36 * 5 for _, mean, error in [*found, held])
    rows = re.findall(r"^(.*), position by position: (.*)$", out, re.M)
    assert [len(row.split()) for _, row in rows] == [36, 36]
    assert np.sum([float(each) for each in rows[0][1].split()]) < 36 * 6
    said(capsys, "encode", "-w", trained, *images, "--out", pictures / "codes.npz")
    again = said(capsys, *words, pictures / "codes.npz")
    assert re.findall(rf"^(.*): {BITS}$", again, re.M) == [*found, held]
    np.savez(pictures / "masked.npz", codes=np.full((2, 36), 16))  # the mask's id
    assert "0..15; found 16" in refused(capsys, *words, pictures / "masked.npz")
    np.savez(pictures / "short.npz", codes=np.zeros((2, 35), int))
    assert "[b, 36]" in refused(capsys, *words, pictures / "short.npz")


@slow
def test_likelihood_beside_that_of_the_scores_of_the_prior(trained, pictures, capsys):
    scored = pictures / "scored"
    scored.mkdir()
    for name in ("encoder", "codes", "prior"):
        (scored / name).symlink_to(trained / name)
    config = recipes.load("quickstart.py:tiny", {"prior_scores.count": 100})
    (scored / "config.json").write_text(json.dumps(config.to_dict()))
    results = {"validation": 54.25, "validation_error": 1.5}
    results = {f"prior_scores/bits_per_code/{name}": value for name, value in results.items()}
    (scored / "results.json").write_text(json.dumps(results))
    out = said(capsys, "likelihood", "-w", scored, pictures / "a.png")
    assert "held-out codes of the run, mean: 54.2 ± 1.5 bits" in out


@slow
def test_compose_by_operators(trained, pictures, capsys, monkeypatch):
    told, decode = [], pipeline.Pipeline.decode

    def seen(self, codes, **how):
        told.append((codes, how["known"]))
        return decode(self, codes, **how)

    monkeypatch.setattr(pipeline.Pipeline, "decode", seen)
    words = ["compose", "-w", trained, "--count", 6, "--sampler.steps=2", "--out"]
    words += [pictures / "composed.png"]
    one = [pictures / "a.png", "--operator", "infill", "--operator.share=0.25", "--keep", "form"]
    alone = said(capsys, *words, *one, "--batch", 4)
    assert "6 compositions of 1 images" in alone
    parent = pipeline.load(trained).encode([np.asarray(Image.open(pictures / "a.png"))])
    codes = np.concatenate([codes for codes, _ in told])
    assert len(codes) == 6 and (codes[:, :18] == parent[:, :18]).all()
    assert 6 < (codes != parent).sum() <= 6 * 9 and len(np.unique(codes != parent, axis=0)) > 1

    def bits(out):
        found = re.findall(r"^(\w+), bits a position given the others: ([\d. ]+)$", out, re.M)
        return {what: np.array(row.split(), float) for what, row in found}

    two = [pictures / "a.png", pictures / "b.png"]
    coin = [*two, "--operator", "coin"]
    once, often = (bits(said(capsys, *words, *coin, "--best", n)) for n in (1, 5))
    assert len(once["parents"]) == 2 and len(once["composed"]) == 6
    assert (often["parents"] == once["parents"]).all()
    assert (often["composed"] <= once["composed"]).all()
    assert often["composed"].mean() < once["composed"].mean()
    refined = [*two, "--operator", "refine", "--operator.start.name=infill", "--keep", "0-35"]
    assert len(bits(said(capsys, *words, *refined))["composed"]) == 6
    np.testing.assert_array_equal(told[-1][0], np.repeat(parent, 6, 0))  # nothing is drawn
    told.clear()
    said(capsys, *words, *two, "--partial", 0.25)
    assert (told[0][1].sum(1) == 9).all() and len(np.unique(told[0][1], axis=0)) > 1
    for more in ([], ["--partial", 0.5, "--weights", "1,3"]):
        assert list(bits(said(capsys, *words, *two, "--all", *more))) == ["parents"]
    assert "nothing to the last of 3 images" in refused(capsys, *words, *two, pictures / "a.png")
    assert "more than there are" in refused(capsys, *words, *two, "--all", "--partial", 0.6)


@slow
def test_positions(trained, pictures, capsys):
    """Of a whole run, and of one whose generator is not trained yet."""
    run_of = {"whole": STEPS, "half": STEPS[:2]}
    for name, steps in run_of.items():
        (pictures / name).mkdir()
        for step in (*steps, "config.json"):
            (pictures / name / step).symlink_to(trained / step)
        words = ["positions", pictures / name, "--count", 300, "--pairs", 4, "--clusters", 2]
        words += ["--batch", 8]
        out = said(capsys, *words, "--out", pictures / f"{name}.png")
        assert np.asarray(Image.open(pictures / f"{name}.png")).std() > 5
        found = json.loads((pictures / name / "positions.json").read_text())
        assert found["length"] == 36 and sorted(sum(found["groups"].values(), [])) == [*range(36)]
        assert out.count("\n") > 36 and ("no swaps" in out) == (name == "half")
        columns = found["columns"]
        assert all(len(column) == len(found["rows"]) == 36 + 3 + 2 for column in columns.values())
        assert all(0 <= each < 3 for each in columns["bits it says of shape"][:36])
        assert ("swapped: rms of 255 image" in columns) == (name == "whole")
    group = next(iter(found["groups"]))
    words = ["compose", "-w", pictures / "whole", pictures / "a.png", pictures / "b.png"]
    words += ["--count", 2, "--sampler.steps=2", "--out", pictures / "composed.png"]
    assert "wrote" in said(capsys, *words, "--keep", group)
    assert "known: form, ground, tint, " in refused(capsys, *words, "--keep", "fork")


@slow
def test_a_step_that_is_not_trained_yet(trained, tmp_path):
    half = tmp_path / "half"
    half.mkdir()
    for name in ("config.json", "encoder"):
        (half / name).symlink_to(trained / name)
    code, out, err = run("dlc_jax.cli", "sample", "-w", half, "-n", 2, cwd=tmp_path)
    assert (
        code == 2
        and err.count("\n") == 1
        and "half/prior" in err
        and "train this step first" in err
    )


def test_sampler_flags_for_a_recipe_without_a_samples_step():
    config = recipe.expand({"steps": ("mine",), "mine.stage": "prior", "data.name": "shapes"})
    assert "samples" not in config and networks.changed(config, []) is config
    changed = networks.changed(config, ["--sampler.steps=3", "--code_sampler.calls=2"])
    assert (changed.samples.sampler.steps, changed.samples.code_sampler.calls) == (3, 2)
