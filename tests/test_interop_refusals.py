"""What dlc import and dlc export refuse, each in one line that says what to do."""

import pytest
from foreign_weights import official
from ml_collections import ConfigDict
from test_cli import refused
from test_interop_cli import RECIPE, import_sem, write

from dlc_jax import cli, recipe

SEM = "import sem {here}/sem.safetensors --out {here}/new {recipe}"
DINOV2 = "import dinov2 {here}/vit.safetensors --out {here}"


@pytest.mark.parametrize("verb", ["import", "export"])
def test_help_has_examples(verb, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main([verb, "--help"])
    assert (
        left.value.code == 0
        and f"\n  dlc {verb} sem " in capsys.readouterr().out.partition("example")[2]
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("import", "ACTION"),
        ("import dinov2", "FILE"),
        ("import dinov2 {here}/vit.safetensors", "--out"),
        ("import dinov2 {here}/no.safetensors --out {here}/new", "no.safetensors does not exist"),
        (
            "import dinov2 {here}/text.safetensors --out {here}/new",
            "text.safetensors is damaged, or not a safetensors file",
        ),
        ("import dinov2 {here}/text.npz --out {here}/new", "neither .safetensors"),
        (DINOV2, "is there already"),
        (f"{DINOV2}/new --sed 3", "--sed"),
        (f"{DINOV2}/text.npz/new", "text.npz"),
        (
            "import dinov2 {here}/sem.safetensors --out {here}/new",
            "sem_embed.weight), which DINOv2 does not have; dlc import sem takes it",
        ),
        ("import vae {here}/vit.safetensors --out {here}/new", "no autoencoder"),
        ("import sem {here}/vit.safetensors --out {here}/new {recipe}", "no simplicial head"),
        (SEM, "48 numbers before the softmax, L x V: give --positions"),
        (f"{SEM} --positions 0", "0"),
        (f"{SEM} --positions 7", "not 7 x 6"),
        (
            "import sem {here}/headless.safetensors --out {here}/new {recipe} --config.seed=-1",
            "seed=-1",
        ),
        (
            "import sem {here}/wide.safetensors --out {here}/new --positions 1 {recipe}",
            "values=70000 is more than 65536",
        ),
        (f"{SEM} --positions 6 --config=nowhere.py", "nowhere.py"),
        (f"{SEM} --positions 6 --config.seeed=1", "seeed"),
        (f"{SEM} --positions 6 --config.encoder.crops.form.global_size=18", "patches of 4"),
        (
            "import sem {here}/sem.safetensors --out {here}/text.npz/new --positions 6 {recipe}",
            "give another --out",
        ),
        ("export sem {here}/nowhere --out {here}/x.safetensors", "nowhere does not exist"),
        ("export sem {here} --out {here}/x.pth", "x.pth is not a .safetensors"),
        ("export dinov2 {here} --out {here}/new", "no run"),
        ("export dinov2 {here}/nowhere --out {here}", "is there already"),
    ],
)
def test_refused_in_one_line(arguments, words, tmp_path, capsys):
    write(tmp_path / "vit.safetensors", official())
    write(tmp_path / "sem.safetensors", official(readout="plain", head=True))
    write(tmp_path / "headless.safetensors", official(readout="shared"))
    write(
        tmp_path / "wide.safetensors",
        official(readout="plain", positions=1, values=70_000, registers=0),
    )
    (tmp_path / "text.safetensors").write_text("no tensors at all")
    (tmp_path / "text.npz").write_text("")
    before = sorted(tmp_path.rglob("*"))
    assert words in refused(capsys, *arguments.format(here=tmp_path, recipe=RECIPE).split())
    assert sorted(tmp_path.rglob("*")) == before  # nothing is left behind


def test_a_run_that_has_an_encoder_takes_no_other(tmp_path, capsys):
    state = official(readout="shared", head=True)
    import_sem(capsys, tmp_path, state)
    again = ("import", "sem", tmp_path / "sem.safetensors", "--out", tmp_path / "run", RECIPE)
    assert "encoder is there already" in refused(capsys, *again)


def test_an_encoder_of_another_backbone_is_not_exported(tmp_path, capsys, monkeypatch):
    run = ConfigDict({"encoder": {"model": {"backbone": {"name": "resnet"}}}})
    monkeypatch.setattr(recipe, "of_run", lambda workdir: run)
    for action, out in (("sem", "x.safetensors"), ("dinov2", "x")):
        line = refused(capsys, "export", action, tmp_path, "--out", tmp_path / out)
        assert "backbone 'resnet'" in line and "only 'vit' can be exported" in line
    assert not list(tmp_path.iterdir())
