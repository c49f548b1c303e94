"""dlc probe: what it prints of a run, what it writes, and what it refuses in one line."""

import json

import pytest
from test_cli import refused, run, untrained  # noqa: F401  the last is a fixture

from dlc_jax import cli
from dlc_jax.cli import probe


def results(after=""):
    found = {f"health{after}/{key}": 0.25 for key in probe.HEALTH} | {
        f"agreement{after}/{key}": 2.5 for key in probe.AGREEMENT
    }
    found |= {f"health{after}/count": 50, f"agreement{after}/count": 40}
    for group in ("", "_best_on_validation", "_knn", "_features"):
        found |= {
            f"probe{after}{group}/shape": 0.5,
            f"probe{after}{group}/color": 0.125,
            f"probe{after}{group}/count": 50,
        }
    return found | {
        f"probe{after}_features_knn/{name}_{k}": k / 100
        for name in ("shape", "color")
        for k in (10, 20)
    }


def test_the_table_has_a_line_a_probe_and_leaves_out_what_was_not_asked():
    lines = probe.table(results(), split="validation", names=["shape", "color"]).splitlines()
    assert lines[0].split() == ["%", "right", "on", "validation,", "50", "images", "shape", "color"]
    assert [line.split()[-2:] for line in lines[1:7]] == [["50.0", "12.5"]] * 4 + [
        ["10.0", "10.0"],
        ["20.0", "20.0"],
    ]
    assert lines[5].startswith("10 nearest class tokens") and not any(
        "pixels" in line for line in lines
    )
    assert [line for line in lines if line.startswith("  times chance")][0].split()[-1] == "2.5"
    held_out = probe.table(results("_held_out"), split="held_out", names=["shape", "color"])
    assert "on held_out, 50 images" in held_out and "chosen on these" not in held_out
    bare = probe.table(
        {key: value for key, value in results().items() if not key.startswith("probe")},
        split="validation",
        names=[],
    )
    assert bare.strip().startswith("health of codes, validation, 50 images")


def test_refusals(untrained, tmp_path, capsys):  # noqa: F811
    assert "no complete code store" in refused(capsys, "probe", untrained)
    line = refused(capsys, "probe", untrained, "--splits", "test")
    assert "no codes of split 'test'" in line and "train, validation, held_out" in line
    assert "not a whole number" in refused(capsys, "probe", untrained, "--count", "0")
    assert "cannot write" in refused(
        capsys, "probe", untrained, "--out", untrained / "config.json" / "x.json"
    )
    assert "it is a folder" in refused(capsys, "probe", untrained, "--out", tmp_path)  # at once
    config = json.loads((untrained / "config.json").read_text())
    del config["probe"]
    (untrained / "config.json").write_text(json.dumps(config))
    assert "no section with stage='probe'" in refused(capsys, "probe", untrained)
    (tmp_path / "empty").mkdir()
    refused(capsys, "probe", tmp_path / "empty")


@pytest.mark.slow
def test_a_finished_run_is_probed_again_with_baselines(tmp_path, capsys):
    steps = (
        "--config.steps=('encoder','codes','probe')",
        "--config.encoder.train.steps=3",
        "--config.encoder.model.backbone.depth=1",
    )
    code, _, err = run(
        "dlc_jax.main", "--config=configs/quickstart.py:tiny", f"--workdir={tmp_path / 'W'}", *steps
    )
    assert code == 0, err
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "W").rglob("*")}
    out = tmp_path / "probe.json"
    arguments = [
        "probe",
        tmp_path / "W",
        "--count",
        "256",
        "--splits",
        "validation",
        "--baselines",
        "--out",
        out,
    ]
    assert cli.main([str(argument) for argument in arguments]) == 0
    assert "linear, codes of an untrained encoder" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert {
        "probe_untrained/shape",
        "probe_pixels/shape",
        "agreement/times_chance",
    } <= found.keys() and found["probe/count"] == 256
    noted = json.loads((tmp_path / "W" / "results.json").read_text())
    assert (
        noted["probe/count"] == 512
        and "probe_held_out/shape" in noted
        and "probe_pixels/shape" not in noted
    )
    assert (
        "encoder/monitor/agreement/times_chance" in noted
        and noted["agreement_held_out/count"] == 512
    )
    assert before == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "W").rglob("*")
    }  # nothing else was written
