"""Recipes: lines to the full config, what is refused, and which step of a recipe reads which."""

import itertools
import json
from pathlib import Path

import pytest
import recipes
from ml_collections import ConfigDict

from dlc_jax import command, recipe, workdir
from dlc_jax.errors import UserError
from dlc_jax.recipe import values
from dlc_jax.recipe.fields import Either, Tuple


@pytest.fixture
def quickstart():
    return recipes.load("quickstart.py")


# ---- values


NAMES, PAIR = Tuple((str,), True), Tuple((float, int), False)


@pytest.mark.parametrize(
    "kind, value, found",
    [
        (int, 3, 3),
        (int, 1e6, 1_000_000),
        (int, "1e6", 1_000_000),
        (int, "-2", -2),
        (float, 3, 3.0),
        (float, "3", 3.0),
        (float, "1e-4", 1e-4),
        (str, "3", "3"),
        (str, "'a'", "a"),
        (str, "a b", "a b"),
        (str, "", ""),
        (str, "None", "None"),
        (bool, True, True),
        (bool, "true", True),
        (bool, "False", False),
        (Either((float, None)), None, None),
        (Either((float, None)), "None", None),
        (Either((float, None)), "2", 2.0),
        (Either((str, None)), "None", None),
        (Either((str, None)), "flash", "flash"),
        (NAMES, "a", ("a",)),
        (NAMES, "a, b", ("a", "b")),
        (NAMES, "('a', 'b')", ("a", "b")),
        (NAMES, "()", ()),
        (NAMES, ["a"], ("a",)),
        (PAIR, "(1, 2.0)", (1.0, 2)),
        (Tuple((PAIR,), True), ((1, 2), [3.5, 4]), ((1.0, 2), (3.5, 4))),
    ],
)
def test_a_value_as_its_field_holds_it(kind, value, found):
    given = recipe.Text(value) if isinstance(value, str) else value
    accepted = values.accepted(kind, given, "it")
    assert accepted == found and type(accepted) is type(found)
    if isinstance(found, tuple):
        assert list(map(type, accepted)) == list(map(type, found))


@pytest.mark.parametrize(
    "kind, value, words",
    [
        (int, 1.5, "1.5 is not of type int"),
        (int, "1.5", "'1.5' is not of type int"),
        (int, "many", "'many' is not of type int"),
        (int, True, "True is not of type int"),
        (int, None, "None is not of type int"),
        (float, "1,5", "'1,5' is not of type float"),
        (float, False, "False is not of type float"),
        (str, 3, "3 is not of type str"),
        (bool, "1", "'1' is not of type bool"),
        (bool, 1, "1 is not of type bool"),
        (Either((float, None)), "none", r"'none' is not of type float \| None"),
        (NAMES, (1,), r"\(1,\) is not of type tuple\[str, ...\]"),
        (PAIR, "(1,)", r"'\(1,\)' is not of type tuple\[float, int\]"),
        (PAIR, (1, 2, 3), r"is not of type tuple\[float, int\]"),
        (PAIR, "1.5,2.5", r"is not of type tuple\[float, int\]"),
        (PAIR, "[" * 10_000, r"is not of type tuple\[float, int\]"),
    ],
)
def test_a_value_of_another_type_is_refused(kind, value, words):
    given = recipe.Text(value) if isinstance(value, str) else value
    with pytest.raises(UserError, match=f"it=.*{words}"):
        values.accepted(kind, given, "it")


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("seeed", 1, "unknown field 'seeed'; did you mean 'seed'\\?"),
        ("encodr.threads", 1, "unknown field 'encodr'; did you mean 'encoder'\\?"),
        ("wholly.other", 1, "unknown field 'wholly'; there are seed, steps, .*encoder, codes"),
        ("other.stage", "priot", "other.stage='priot' is unknown; did you mean 'prior'\\?"),
        ("encoder.thread", 1, "unknown field 'encoder.thread'; did you mean 'encoder.threads'\\?"),
        ("data.nam", "shapes", "'data.nam'; did you mean 'data.name'"),
        ("data.name", "shape", "data.name='shape' is unknown; did you mean 'shapes'"),
        ("data.name", 3, "data.name=3 is not of type str"),
        ("mesh.fsdb", 2, "'mesh.fsdb'; did you mean 'mesh.fsdp'"),
        ("encoder.model.width", 96, "unknown field 'encoder.model.width'; .*there are backbone"),
        ("encoder.model.backbone.widht", 96, "did you mean 'encoder.model.backbone.width'"),
        ("encoder.crops.form.blurr", 1, "did you mean 'encoder.crops.form.blur'"),
        ("samples.sampler.guidance.scal", 1, "did you mean 'samples.sampler.guidance.scale'"),
        ("samples.sampler", 3, "samples.sampler is a section, not '3': set its fields"),
        ("encoder", "big", "encoder is a section, not 'big': set its fields"),
        ("encoder.crops", "big", "encoder.crops is a section, not 'big'"),
        ("data", "shapes", "data is a section, not 'shapes'"),
        ("encoder.threads.more", 1, "encoder.threads is not a section; it is of type int"),
        ("prior.ema_decay", "much", "prior.ema_decay='much' is not of type float"),
    ],
)
def test_a_field_that_no_recipe_has_is_refused(field, value, words):
    with pytest.raises(UserError, match=words):
        recipe.expand({"data.name": "shapes", field: value})


# ---- lines


def fields(lines):
    return recipe.flat(recipe.expand({"data.name": "shapes", **lines}).to_dict())


def test_a_line_changes_its_field_alone():
    usual, found = fields({}), fields({"prior.train.steps": 7})
    assert {name for name in usual if found[name] != usual[name]} == {"prior.train.steps"}
    assert fields({"prior": {"train": {"steps": 7}}}) == found


def test_patterns():
    found = fields({"*.train.steps": 7, "*.sampler.steps": 3, "encoder.crops.*_size": 28})
    steps = {name: value for name, value in found.items() if name.endswith(".train.steps")}
    assert steps == dict.fromkeys(
        ("encoder.train.steps", "prior.train.steps", "generator.train.steps"), 7
    )
    assert found["samples.sampler.steps"] == found["generator.grid.sampler.steps"] == 3
    assert found["encoder.crops.all.local_size"] == found["encoder.crops.all.global_size"] == 28
    with pytest.raises(UserError, match=r"'\*.train.step' matches no field"):
        fields({"*.train.step": 7})
    with pytest.raises(UserError, match="prior.train.steps='x' is not of type int"):
        fields({"prior.*.steps": recipe.Text("x")})


def test_what_comes_later_counts():
    assert fields({"prior.train.steps": 5, "*.train.steps": 7})["prior.train.steps"] == 7
    assert fields({"*.train.steps": 7, "prior.train.steps": 5})["prior.train.steps"] == 5
    again = recipe.later({"*.train.steps": 7, "prior.train.steps": 5}, {"*.train.steps": 9})
    assert fields(again)["prior.train.steps"] == 9


def test_taking_back():
    lines = {"prior.train.steps": 5, "prior.ema_decay": 0.5, "encoder.threads": 2}
    usual = fields({})
    found = fields({**lines, "prior.train": None})
    assert (found["prior.train.steps"], found["prior.ema_decay"]) == (
        usual["prior.train.steps"],
        0.5,
    )
    assert fields({**lines, "prior": None}) == fields({"encoder.threads": 2})
    again = fields(recipe.later(lines, {"prior": None, "prior.train.steps": 6}))
    assert again["prior.train.steps"] == 6 and again["prior.ema_decay"] == usual["prior.ema_decay"]
    assert fields({"probe": None}) == usual
    fresh = recipe.expand({**lines, "*": None, "data.name": "images"})
    assert fresh == recipe.expand({"data.name": "images"})


def test_a_step_that_is_like_another():
    config = recipe.expand(
        {
            "data.name": "shapes",
            "generator.train.steps": 5,
            "generator.model.width": 96,
            "other.like": "generator",
            "other.model.width": 48,
            "third.like": "other",
        }
    )
    assert config.other.stage == config.third.stage == config.generator.stage == "generator"
    assert config.other.train.steps == config.third.train.steps == 5
    assert config.other.model.width == config.third.model.width == 48
    assert config.generator.model.width == 96
    assert config.other.model.depth == config.generator.model.depth
    lines = {"data.name": "shapes", "generator.grid.every": 5, "generator.grid.count": 6}
    found = fields({**lines, "other.like": "generator", "other.grid": None, "other.grid.count": 7})
    assert found["other.grid.every"] == fields({})["generator.grid.every"] != 5
    assert found["other.grid.count"] == 7
    with pytest.raises(
        UserError, match="other.stage='generater' is unknown; did you mean 'generator'"
    ):
        recipe.expand({"other.like": "generater"})


def test_a_value_for_a_section_is_its_path():
    for lines in (
        {"codes": "W1/codes", "codes.batch": 8},
        {"codes.batch": 8, "codes": recipe.Text("W1/codes")},
    ):
        found = fields(lines)
        assert (found["codes.path"], found["codes.batch"]) == ("W1/codes", 8)


def test_an_optional_section_is_there_once_it_has_a_line(quickstart):
    assert "autoencoder" not in quickstart
    config = recipes.load("quickstart.py", {"autoencoder.path": "W/vae"})
    assert config.autoencoder.path == "W/vae" and config.autoencoder.model


def test_a_config_is_locked(quickstart):
    with pytest.raises(AttributeError):
        quickstart.encoder.treads = 1
    with pytest.raises(TypeError):
        quickstart.encoder.threads = "many"


# ---- files


def test_a_recipe_of_ones_own(tmp_path):
    (tmp_path / "base.py").write_text(
        "RECIPE = {'data.name': 'shapes', 'prior.train.steps': 5, 'prior.ema_decay': 0.5}\n"
        "VARIANTS = {'only_here': {}}"
    )
    (tmp_path / "mine.py").write_text(
        "RECIPE = {'like': 'base.py', 'prior.train.steps': 6}\n"
        "VARIANTS = {'long': lambda lines: {'prior.train.steps': 10 * lines['prior.train.steps']},"
        " 'plain': {'prior': None}}"
    )

    def prior(words):
        config = recipe.expand(command.read(f"{tmp_path}/mine.py{words}")[1])
        return config.prior.train.steps, config.prior.ema_decay

    assert prior("") == prior(":") == (6, 0.5) and prior(":long") == (60, 0.5)
    assert prior(":long,long") == (600, 0.5) and prior(":long,plain") == prior(":plain")
    assert command.read(f"{tmp_path}/mine.py:prior,long,codes")[1]["steps"] == ("prior", "codes")
    with pytest.raises(UserError, match="unknown variant 'only_here'; .*mine.py has long, plain"):
        prior(":only_here")


def test_a_recipe_that_was_written_down_is_the_same_recipe(quickstart, tmp_path):
    workdir.remember(tmp_path, quickstart.to_dict())
    again, place = command.parse(["dlc", f"--config={tmp_path}/config.json"])
    assert again == quickstart and place == tmp_path
    assert again.encoder.objective.teacher_temperature == (0.05, 0.05, 1)
    assert recipe.of_run(tmp_path) == quickstart
    workdir.remember(tmp_path, again.to_dict())
    assert not (tmp_path / "config_history.jsonl").exists()


@pytest.mark.parametrize("text", ["", "[1]", '{"steps": 3}', '{"seed": 0}', "RECIPE = {}"])
def test_other_files_are_not_recipes(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=f"{tmp_path}/config.json is not a recipe"):
        command.read(str(tmp_path / "config.json"))
    with pytest.raises(UserError, match="absent.json does not exist"):
        command.read(str(tmp_path / "absent.json"))


def test_samplers_of_codes_had_an_order_and_priors_no_process(tmp_path, quickstart):
    saved = json.loads(json.dumps(quickstart.to_dict()))
    saved["samples"]["code_sampler"] = {"calls": 7, "temperature": 0.5, "order": "random"}
    for field in ("process", "drop_label"):
        del saved["prior"][field]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    found = recipe.of_run(tmp_path)
    wanted = {"calls": 7, "temperature": 0.5, "method": "first_hitting"}
    assert wanted.items() <= found.samples.code_sampler.to_dict().items()
    assert (found.prior.process.name, found.prior.process.objective) == ("masked", "elbo")


def test_a_run_of_an_earlier_version_has_todays_fields(tmp_path, quickstart):
    """Flat encoder section, `view`, samplers spread over their step, fields that are gone."""
    model = recipe.flat(quickstart.encoder.model.to_dict())
    del model["backbone.name"]
    saved = json.loads(json.dumps(quickstart.to_dict()))
    saved["encoder"]["model"] = {name.split(".")[-1]: value for name, value in model.items()}
    saved["encoder"]["view"] = {"image": "encoded"}
    del saved["encoder"]["encoded"], saved["codes"]["dtype"], saved["codes"]["image"]
    del saved["generator"]["scores"]
    saved["codes"]["view"] = {"image": 24}
    for section in (saved["samples"], saved["generator"]["grid"]):
        section |= {"sampling_steps": 9, "method": "euler", "guidance": 2}
        del section["sampler"]
    saved["samples"] |= {"calls": 5, "prefix": "", "held_out": ["held_out"]}
    del saved["samples"]["code_sampler"]
    train = saved["prior"]["train"]
    train["clip_apart"] = train.pop("clip_separately")
    (tmp_path / "config.json").write_text(json.dumps(saved))
    found = recipe.of_run(tmp_path)
    changes = {
        "encoder.encoded": True,
        "student.encoded": False,
        "codes.dtype": "",
        "codes.image": 24,
        "samples.code_sampler.calls": 5,
        "*.sampler.method": "euler",
        "*.sampler.steps": 9,
        "*.sampler.guidance.scale": 2.0,
        "generator.scores.sampler.method": "heun",  # what has been added has its defaults
        "generator.scores.sampler.steps": 50,
        "generator.scores.sampler.guidance.scale": 1.0,
        "without_codes.grid": None,
        "without_codes.grid.sampler.steps": 12,
        "samples_without_codes.sampler": None,
        "samples_without_codes.sampler.steps": 12,
    }
    wanted = recipes.load("quickstart.py", changes)
    skipped = ("without_codes", "samples_without_codes")
    assert {name: found[name] for name in found if name not in skipped} == {
        name: wanted[name] for name in wanted if name not in skipped
    }
    assert command.parse(["dlc", f"--config={tmp_path}/config.json"])[0] == found


@pytest.mark.parametrize("text", ['{"encoder": {"stage": "encoder", "model": 3}}', "[]"])
def test_a_damaged_config_of_a_run_is_told(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json (is damaged|does not fit this version)"):
        recipe.of_run(tmp_path)


def test_a_few_fields_of_an_expanded_config_can_be_changed(quickstart):
    found = recipe.changed(quickstart, {"samples.sampler.steps": recipe.Text("3"), "seed": 4})
    assert (found.samples.sampler.steps, found.seed) == (3, 4)
    assert quickstart.samples.sampler.steps == 12 and found.encoder == quickstart.encoder
    with pytest.raises(UserError, match="did you mean 'samples.sampler.steps'"):
        recipe.changed(quickstart, {"samples.sampler.stesp": 3})


def test_the_list_of_all_fields():
    lines = command.read(str(recipes.CONFIGS / "quickstart.py"))[1]
    shown = list(recipe.listing(recipe.expanded(lines)))
    assert all(len(line) <= 100 for line in shown)
    named = [line.partition(" = ")[0] for line in shown if line and not line.startswith(" ")]
    assert sorted(named) == sorted(recipe.flat(recipes.load("quickstart.py").to_dict()))
    sections = [name for name, _ in itertools.groupby(name.rpartition(".")[0] for name in named)]
    assert len(sections) == len(set(sections))  # each in one piece
    tops = list(dict.fromkeys(name.partition(".")[0] for name in named))
    steps = ["encoder", "student", "codes", "probe", "prior", "generator", "samples"]
    extra = ["without_codes", "samples_without_codes"]
    assert tops == ["seed", "steps", "mesh", "log", "data", *steps, *extra]
    assert (
        "prior.ema_decay = 0.99  # float, default 0.9999: of the average of the parameters" in shown
    )
    at = shown.index("encoder.encoded = False")
    assert shown[at + 1].startswith("    # bool, default True: ") and shown[at - 1].startswith(
        "encoder.stage = "
    )


# ---- steps


def test_what_each_step_of_the_quickstart_reads(quickstart):
    assert {name: recipe.upstream(quickstart, name) for name in quickstart.steps} == {
        "encoder": (),
        "student": ("encoder",),
        "codes": ("encoder", "student"),
        "probe": ("codes", "encoder", "student"),
        "prior": ("codes", "encoder", "student"),
        "generator": ("codes", "encoder", "student"),
        "samples": ("codes", "encoder", "generator", "prior", "student"),
    }
    assert recipe.upstream(quickstart, "without_codes") == ()
    assert recipe.of_stage(quickstart, "generator") == ["generator", "without_codes"]


def test_a_step_that_is_elsewhere_reads_nothing_and_spares_what_it_was_made_with(quickstart):
    assert recipe.unneeded(quickstart) == {}
    assert recipe.place(quickstart, "W2", "codes") == Path("W2/codes")
    quickstart.codes.path = "W1/codes"
    assert recipe.place(quickstart, "W2", "codes") == Path("W1/codes")
    assert recipe.place(quickstart, "W2", "prior") == Path("W2/prior")
    assert recipe.upstream(quickstart, "prior") == ("codes",)
    spared = "codes are those of W1/codes"
    assert recipe.unneeded(quickstart) == {"encoder": spared, "student": spared}


def test_names_that_are_not_steps_are_not_followed():
    step = {"stage": "a", "about": "data", "of": "nothing", "b": 3}
    config = ConfigDict({"steps": ("a",), "data": {"name": "a"}, "a": step})
    assert recipe.upstream(config, "a") == ()
    json.dumps(recipe.upstream(config, "a"))


def test_a_part_of_the_usual_steps_keeps_the_sections_of_all():
    """`dlc sample` after each step was run by a command of its own finds how the recipe samples."""
    lines = {"data.name": "shapes"}
    whole, part = (recipe.expand(lines | more).to_dict() for more in ({}, {"steps": ("prior",)}))
    assert part == whole | {"steps": ("prior",)}
    other = recipe.expand({"steps": ("again",), "again.stage": "codes", "data.name": "shapes"})
    assert "samples" not in other and "encoder" in other  # what codes read, and no more


def test_a_config_that_is_misshapen_is_refused_in_one_line(tmp_path):
    saved = recipe.expand(command.read("configs/quickstart.py")[1]).to_dict()
    for section, words in (
        ({"stage": "encoder", "model": 3}, "is damaged"),
        ({"stage": "encoder"}, "is damaged"),
        (saved["encoder"] | {"colour": 1}, "does not fit this version: unknown field"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(saved | {"encoder": section}))
        with pytest.raises(UserError, match=f"config.json {words}"):
            recipe.of_run(tmp_path)
        with pytest.raises(UserError, match=f"config.json {words}"):
            workdir.remember(tmp_path, saved, present=recipe.read_back)


def test_another_choice_takes_back_the_fields_of_the_one_before():
    """Those of earlier lines; what is set after the name must be a field of it."""
    process = {"generator.process.prediction": "x", "generator.process.mean": 0.8}
    config = recipe.expand(process | {"generator.process.name": "edm"}).generator.process
    assert config.name == "edm" and "mean" not in config
    later = {"generator.process.name": "edm", "generator.process.prediction": "x"}
    with pytest.raises(UserError, match="unknown field 'generator.process.prediction'"):
        recipe.expand(later)
