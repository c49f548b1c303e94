"""The command line in one process: which recipe, which fields, which workdir.

What can be wrong with it is in test_errors.py.
"""

import ast
import json
import os
from pathlib import Path

import pytest
import recipes

from dlc_jax import command
from dlc_jax.errors import UserError

RECIPE = str(recipes.CONFIGS / "quickstart.py")


def parse(*arguments):
    return command.parse(["dlc", *arguments])


@pytest.fixture
def written(tmp_path):
    """What a run left: its recipe, with a field that was set on the command line."""
    config = recipes.load("quickstart.py:tiny", {"seed": 5})
    (tmp_path / "W").mkdir()
    (tmp_path / "W" / "config.json").write_text(json.dumps(config.to_dict()))
    return tmp_path / "W" / "config.json"


def test_a_recipe_its_variant_and_fields():
    config, workdir = parse(
        f"--config={RECIPE}:tiny",
        "--config.seed=3",
        "--config.encoder.train.steps=7",
        "--workdir=there",
    )
    assert (config.seed, config.encoder.train.steps, config.prior.train.steps, workdir) == (
        3,
        7,
        24,
        Path("there"),
    )
    config, workdir = parse(
        "--config",
        RECIPE,
        "--config.steps=('prior', 'generator')",
        "--config.generator.grid.sampler.guidance.interval=(0, 0.5)",
    )
    assert config.steps == ("prior", "generator")
    assert config.generator.grid.sampler.guidance.interval == (0, 0.5)
    assert (config.seed, workdir) == (0, Path("runs/quickstart"))


def test_what_a_run_wrote_down_is_a_recipe_and_goes_on_where_it_is(written):
    config, workdir = parse(f"--config={written}")
    assert (config.seed, config.encoder.train.steps, workdir) == (5, 24, written.parent)
    config, workdir = parse(
        "--config",
        str(written),
        "--workdir=elsewhere",
        "--config.seed=6",
        "--config.generator.train.clip=2.5",
    )
    assert (config.seed, config.generator.train.clip, workdir) == (6, 2.5, Path("elsewhere"))
    assert parse(f"--config={written.rename(written.with_name('mine.json'))}")[1] == Path(
        "runs/mine"
    )


def test_a_seed_that_is_not_a_number_is_refused(written):
    """As a damaged config.json may have it."""
    written.write_text(json.dumps(json.loads(written.read_text()) | {"seed": ["0"]}))
    with pytest.raises(UserError, match=r"seed=\['0'\] is not of type int"):
        parse(f"--config={written}")


def test_values_that_were_null_can_be_set(written):
    config, _ = parse(f"--config={written}", "--config.encoder.model.backbone.layer_scale=0.1")
    assert (
        config.encoder.model.backbone.layer_scale == 0.1
        and config.generator.model.out_channels is None
    )


@pytest.mark.parametrize("flag", ["--config.codes=W1/codes", "--config.codes.path=W1/codes"])
def test_codes_of_another_run(flag, written):
    for recipe, encoder in ((RECIPE, "student"), (str(written), "encoder")):
        config, _ = parse(f"--config={recipe}", flag)
        assert config.codes.path == "W1/codes" and config.codes.encoder == encoder


def test_fields_that_are_called_like_a_method_of_the_config():
    config, _ = parse(f"--config={RECIPE}", "--config.prior.model.values=8", "--config.seed=3")
    assert (config.prior.model["values"], config.seed) == (8, 3)
    for argument, message in (
        ("--config.prior.model.values=eight", "prior.model.values='eight' is not of type int"),
        ("--config.priot.model.values=8", "unknown field 'priot'; did you mean 'prior'"),
        ("--config.prior.values=8", "unknown field 'prior.values'"),
    ):
        with pytest.raises(UserError, match=message):
            parse(f"--config={RECIPE}", argument)


def test_fields_of_the_call_before_are_forgotten():
    parse(f"--config={RECIPE}", "--config.seed=3", "--workdir=there")
    config, workdir = parse(f"--config={RECIPE}")
    assert (config.seed, workdir) == (0, Path("runs/quickstart"))


@pytest.mark.parametrize("value", ["('late', 1.0)", "(1.0,)", "(1.0, 2.0, 3.0)", "late"])
def test_tuples_keep_their_kind(value):
    field = "generator.grid.sampler.guidance.interval"
    with pytest.raises(UserError, match=rf"{field}=.* is not of type tuple\[float, float\]"):
        parse(f"--config={RECIPE}", f"--config.{field}={value}")


@pytest.mark.parametrize(
    "field, value",
    [
        ("objective.simplex_temperature", "((1.0, 0.3, 100), (0.5, 0.3, 100))"),
        ("optimizer.multipliers", "(('vit/pos_embed', 0.5), ('head/.*', 2.0))"),
        ("optimizer.freeze", "(('vit/.*', 500),)"),
        ("optimizer.freeze", "()"),
    ],
)
def test_tuples_of_tuples(field, value):
    config, _ = parse("--config=configs/imagenet256.py", f"--config.encoder.{field}={value}")
    section, name = field.split(".")
    assert config.encoder[section][name] == ast.literal_eval(value)


@pytest.mark.parametrize(
    "value", ["('vit/.*', 500)", "(('vit/.*',),)", "((500, 'vit/.*'),)", "(500,)"]
)
def test_tuples_of_tuples_keep_their_kind(value):
    with pytest.raises(
        UserError, match=r"optimizer.freeze=.* is not of type tuple\[tuple\[str, int\], ...\]"
    ):
        parse("--config=configs/imagenet256.py", f"--config.encoder.optimizer.freeze={value}")


def test_a_disk_that_refuses_is_one_line(capsys):
    def full():
        raise OSError(28, "No space left on device", "W/samples/pictures/a.png")

    assert command.outcome(full) == 2
    assert (
        capsys.readouterr().err
        == "dlc_jax: W/samples/pictures/a.png: No space left on device; make room, then run the "
        "same command\n"
    )
    with pytest.raises(FileNotFoundError):  # a mistake in the code shows where it is
        command.outcome(lambda: open("/nowhere/at/all"))


def test_patterns_come_after_the_recipe():
    config, _ = parse(f"--config={RECIPE}:tiny", "--config.*.train.steps=7", "--config.steps=prior")
    assert config.encoder.train.steps == config.without_codes.train.steps == 7
    assert config.steps == ("prior",)
    with pytest.raises(UserError, match=r"command line: '\*.train.stesp' matches no field"):
        parse(f"--config={RECIPE}", "--config.*.train.stesp=7")


def test_a_python_file_without_a_recipe_is_refused(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def get_config():\n    return {}\n")
    with pytest.raises(UserError, match=r"mine\.py has no RECIPE, the dict of what it changes"):
        parse(f"--config={file}")
    (tmp_path / "like.py").write_text('RECIPE = {"like": "mine.py"}\n')
    with pytest.raises(UserError, match=r"^\S*mine\.py has no RECIPE"):
        parse(f"--config={tmp_path / 'like.py'}")


def test_a_workdir_may_be_a_url():
    line = ["x", "--config=configs/quickstart.py", "--workdir=gs://bucket/run/"]
    assert command.parse(line)[1] == "gs://bucket/run/"


def test_flags_of_several_processes_are_jaxs_variables_and_reading_them_changes_nothing():
    line = ["x", "--config=configs/quickstart.py", "--coordinator=host0:1234", "--processes", "2"]
    line += ["--process=0"]
    before = dict(os.environ)
    command.parse(line)
    assert command.processes(line) == {
        "JAX_COORDINATOR_ADDRESS": "host0:1234",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "0",
    }
    assert dict(os.environ) == before
