"""Which step of a recipe reads which, where steps are, and a recipe that was written down by a run is the same recipe."""

import json
from pathlib import Path

import pytest
from ml_collections import ConfigDict
from test_configs import ROOT, load

from dlc_jax import recipe, workdir


@pytest.fixture
def quickstart():
    return load(ROOT / "configs" / "quickstart.py")


def test_what_each_step_of_the_quickstart_reads(quickstart):
    assert {name: recipe.upstream(quickstart, name) for name in quickstart.steps} == {
        "encoder": (),
        "codes": ("encoder",),
        "probe": ("codes", "encoder"),
        "prior": ("codes", "encoder"),
        "generator": ("codes", "encoder"),
        "samples": ("codes", "encoder", "generator", "prior"),
    }
    assert recipe.upstream(quickstart, "without_codes") == ()


def test_a_step_that_is_elsewhere_reads_nothing_and_spares_what_it_was_made_with(quickstart):
    assert recipe.unneeded(quickstart) == {}
    assert recipe.place(quickstart, "W2", "codes") == Path("W2/codes")
    quickstart.codes.path = "W1/codes"
    assert recipe.place(quickstart, "W2", "codes") == Path("W1/codes")
    assert recipe.place(quickstart, "W2", "prior") == Path("W2/prior")
    assert recipe.upstream(quickstart, "prior") == ("codes",)
    assert recipe.unneeded(quickstart) == {"encoder": "codes are those of W1/codes"}


def test_a_recipe_that_was_written_down_is_the_same_recipe(quickstart, tmp_path):
    workdir.remember(tmp_path, quickstart.to_dict())
    again = recipe.get_config(str(tmp_path / "config.json"))
    assert again.steps == quickstart.steps and again.encoder.objective.teacher_temperature == (0.05, 0.05, 1)
    workdir.remember(tmp_path, again.to_dict())
    assert not (tmp_path / "config_history.jsonl").exists()
    again.encoder.model.layer_scale = 0.1  # null in the file, any value on the command line
    with pytest.raises(TypeError):
        again.encoder.model.width = "wide"


@pytest.mark.parametrize("text", ["", "[1]", '{"steps": 3}', '{"seed": 0}', "def get_config(): pass"])
def test_other_files_are_no_recipes(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path}/config.json is no recipe"):
        recipe.get_config(str(tmp_path / "config.json"))
    with pytest.raises(OSError):
        recipe.get_config(str(tmp_path / "absent.json"))


def test_names_that_are_no_steps_are_not_followed():
    config = ConfigDict({"steps": ("a",), "data": {"name": "a"}, "a": {"stage": "a", "about": "data", "of": "nothing", "b": 3}})
    assert recipe.upstream(config, "a") == ()
    json.dumps(recipe.upstream(config, "a"))
