"""Scores while a generator trains: what is drawn, compared, written and shown."""

import json
import types

import jax
import numpy as np
import pytest
from test_evaluate import drawn, small

from dlc_jax import features, parallel, recipe, report
from dlc_jax.errors import UserError
from dlc_jax.evaluation import metrics
from dlc_jax.evaluation.images import of_pixels
from dlc_jax.evaluation.scoring import Scorer
from dlc_jax.evaluation.training import Scores, TrainingScores
from dlc_jax.report import chart
from dlc_jax.stages import STAGES

USUAL = {"weights": "file", "network": "squeezenet", "protocol": "stretch"}


@pytest.fixture
def made(monkeypatch, tmp_path):
    """(kinds) -> TrainingScores of drawn images against others; `.images` are drawn next."""
    monkeypatch.setattr(features, "load", lambda name, **_: small(name))
    real = drawn(60, 1)
    source = [{"image": image} for image in real]
    asked = []

    def draw(state, mesh):
        asked.append(int(state.step))
        return draw.images

    draw.images, draw.asked, draw.real = drawn(40, 2), asked, real

    def make(**fields):
        section = Scores(**USUAL | fields)
        cache = str(tmp_path / "cache")
        return TrainingScores(section, {"train": source}.get, draw, seed=3, cache=cache), draw

    return make


def state(step):
    return types.SimpleNamespace(step=np.int32(step))


def test_they_are_the_scores_of_dlc_evaluate(made, tmp_path):
    scores, draw = made(metrics=("fd", "kd", "precision"), batch=16)
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    found = scores(state(12), None, mesh, tmp_path)
    sets = [of_pixels(str(n), each.__getitem__, len(each)) for n, each in enumerate(
        (draw.images, draw.real))]  # fmt: skip
    scorer = Scorer(small(), mesh=mesh, batch=16)
    from dlc_jax.evaluation.reference import of_images

    reference = of_images(sets[1], scorer, keep=False)
    kinds = ["frechet", "kernel", "precision"]
    expected, _ = metrics.score(sets[0], kinds, reference, scorer)
    for name, each in expected.items():
        assert found[name] == pytest.approx(each["value"], rel=1e-9)
        assert found[f"{name}_error"] == pytest.approx(each["error"], rel=1e-9)
    assert set(found) == {
        f"{name}{ending}"
        for name in ("fd_squeezenet", "kd_squeezenet", "precision")
        for ending in ("", "_error")
    }
    document = json.loads((tmp_path / "scores.json").read_text())
    assert (document["step"], document["seed"], document["reference"]["count"]) == (12, 3, 60)
    assert document["results"][0]["metrics"]["fd_squeezenet"]["bias"] > 0


def test_the_reference_is_computed_once_and_what_is_drawn_each_time(made, tmp_path, monkeypatch):
    scores, draw = made(metrics=("fd",), reference_count=30)
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    first = scores(state(0), None, mesh, tmp_path)
    passes, collect = [], Scorer.collect
    monkeypatch.setattr(
        Scorer,
        "collect",
        lambda self, images, **how: passes.append(images.name) or collect(self, images, **how),
    )
    draw.images = draw.real[:40]
    second = scores(state(8), None, mesh, tmp_path)
    assert passes == ["step 8"] and draw.asked == [0, 8]
    assert second["fd_squeezenet"] < first["fd_squeezenet"]


def test_eight_devices_say_what_one_says(made, tmp_path):
    found = []
    for count in (1, 8):
        scores, _ = made(metrics=("fd", "kd"))
        mesh = parallel.make_mesh(devices=jax.devices()[:count])
        found.append(scores(state(1), None, mesh, tmp_path))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"network": "vgg"}, "scores.network='vgg' is unknown; known: inception"),
        ({"metrics": ("fid",)}, "metric fid is of Inception's features; squeezenet's is called fd"),
        ({"metrics": ("lpips",)}, "lpips is not measured on the way"),
        ({"count": 1}, "count=1 at least 2"),
    ],
)
def test_mistakes_are_refused_before_anything_is_trained(fields, words):
    with pytest.raises(UserError, match=words):
        Scores(**USUAL | fields)


def test_a_missing_file_of_weights_is_told_before_training():
    scores = TrainingScores(Scores(weights="none.pth"), None, None, seed=0)
    with pytest.raises(UserError, match="none.pth.*pt_inception-2015-12-05-6726825d.pth"):
        scores.check()


def test_a_recipe_without_weights_measures_nothing():
    lines = {"steps": ("encoder", "codes", "generator")}
    config = recipe.expand(lines)
    names = [each.name for each in STAGES["generator"](config, step="generator", workdir="W").evals]
    assert names == ["grid"]
    config = recipe.expand(lines | {"generator.scores.weights": "W", "generator.scores.every": 7})
    evals = STAGES["generator"](config, step="generator", workdir="W").evals
    assert [(each.name, each.every) for each in evals][1:] == [("scores", 7)]


def test_the_report_draws_them_with_bars_of_one_error(tmp_path):
    rows = [{"step": n, "scores/fid": 40.0 / n, "scores/fid_error": 2.0 / n} for n in (1, 2, 3)]
    rows += [{"step": 3, "scores/vendi": 5.0}]
    (tmp_path / "generator").mkdir()
    (tmp_path / "generator/metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "config.json").write_text(json.dumps({"steps": ["generator"]}))
    report.write(tmp_path, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count('<path class="s0"') == 3 and "Bars are one standard error" in page
    assert "FID" in page and "Vendi" in page and "fid_error" not in page
    drawn = chart.chart("x", {"y": [(0, 1.0), (1, 1.0)]}, hold=(0, 2), errors={1: 0.5})
    bar = drawn.partition('<path class="s0" d="M')[2].partition('"')[0]
    below, above = (float(text) for text in bar.partition(",")[2].split("V"))
    line = float(drawn.partition('points="')[2].partition('"')[0].split(",")[-1])
    assert below - line == pytest.approx(line - above, abs=0.2) and below > line
