"""README.md and docs/ say what is so: the map of the files, commands, recipes, Python, links.

UPDATE_GOLDEN=1 rewrites the map and the list of fields.
"""

import ast
import importlib
import inspect
import keyword
import operator
import os
import re
import shlex
from pathlib import Path

import pytest

from dlc_jax import cli, command, pipeline, recipe
from dlc_jax.errors import UserError
from dlc_jax.recipe import expansion, fields
from dlc_jax.recipe.fields import REQUIRED
from dlc_jax.recipe.listing import described

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
MAP = ROOT / "docs" / "map.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
GUIDES = [
    README,
    *(
        ROOT / "docs" / f"{name}.md"
        for name in "codes data distill encoder evaluation faq generator gpu index planning prior "
        "prior_scores probe recipes running samples sampling tpu weights".split()
    ),
]
TABLE = re.compile(r"(<!-- map -->\n).*?(<!-- /map -->)", re.DOTALL)


def stem(page):
    return page.stem


def file_map():
    """A line for each module and recipe: its path, and the first line of its docstring."""
    lines = []
    for pattern in ("dlc_jax/**/*.py", "configs/*.py", "benchmarks/*.py"):
        for path in sorted(ROOT.glob(pattern)):
            docstring = ast.get_docstring(ast.parse(path.read_text()))
            assert docstring, f"{path} has no docstring"
            summary = docstring.splitlines()[0].replace("|", "\\|")
            lines.append(f"| `{path.relative_to(ROOT)}` | {summary} |")
    return "| file | what it is |\n|---|---|\n" + "\n".join(lines) + "\n"


def test_map_of_the_files():
    text = MAP.read_text()
    found = TABLE.search(text)
    assert found, "docs/map.md has lost its <!-- map --> section"
    wanted = found[1] + file_map() + found[2]
    if os.environ.get("UPDATE_GOLDEN"):
        MAP.write_text(text.replace(found[0], wanted))
    else:
        hint = "the map is out of date; run UPDATE_GOLDEN=1 pytest -n 0 tests/test_readme.py"
        assert found[0] == wanted, hint


FIELDS = re.compile(r"(<!-- fields (.+) -->\n)(.*?)(<!-- /fields -->)", re.DOTALL)


def field_tables(sections):
    """A table for each section and those in it: name, value, type and what it is."""
    _, lines = command.read(str(ROOT / "configs" / "imagenet256.py"))
    steps = (*lines.get("steps", recipe.kinds()), "distill")
    above, text = None, ""
    for name, kind, value, default, doc in described(recipe.expanded(lines | {"steps": steps})):
        section, _, field = name.rpartition(".")
        if name.partition(".")[0] not in sections:
            continue
        if section != above:
            title = f"\n**`{section}`**\n" if section else ""
            text += f"{title}\n| field | value | type | what it is |\n|---|---|---|---|\n"
        above = section
        usual = "" if value == default or default is REQUIRED else f"; default `{default!r}`"
        cells = (f"`{field}`", f"`{value!r}`{usual}", f"`{kind}`", doc)
        row = " | ".join(cell.replace("|", r"\|") for cell in cells)
        text += f"| {row} |\n"
    return f"{text}\n"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if FIELDS.search(page.read_text())], ids=stem
)
def test_list_of_the_fields(page):
    """Those of the sections that the mark names, as the constructors have them."""
    text = page.read_text()
    wanted = FIELDS.sub(lambda at: at[1] + field_tables(at[2].split()) + at[4], text)
    if os.environ.get("UPDATE_GOLDEN"):
        page.write_text(wanted)
    else:
        hint = "the list is out of date; run UPDATE_GOLDEN=1 pytest -n 0 tests/test_readme.py"
        assert text == wanted, hint


def test_every_section_is_on_one_page():
    marks = [mark[1] for page in PAGES for mark in FIELDS.findall(page.read_text())]
    own = fields.fields(expansion.ROOT)
    assert sorted(" ".join(marks).split()) == sorted([*own, *recipe.kinds()])


def test_the_readme_is_short():
    assert len(README.read_text().splitlines()) < 100


@pytest.mark.parametrize("page", PAGES, ids=stem)
def test_linked_files_and_pictures_exist(page):
    text = page.read_text()
    targets = re.findall(r"\]\(([^)\s#]+)", text) + re.findall(r'src="([^"]+)"', text)
    for target in targets:
        assert target.startswith("http") or (page.parent / target).exists(), target


# ---- commands


BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"(\$ )?(\./launch/local\.sh )?(?='?(dlc |python -m dlc|--config\.))")


def written(page):
    """Commands and fields in blocks and code spans of a page, each as a list of words."""
    text = page.read_text()
    blocks = [block for language, block in BLOCK.findall(text) if not language]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    for line in lines + re.findall("`([^`\n]+)`", BLOCK.sub("", text)):
        start = COMMAND.match(line)
        if start and "VERB" not in line and "…" not in line:
            yield shlex.split(line[start.end() :], comments=True)


COMMANDS = sorted({(page.stem, shlex.join(words)) for page in GUIDES for words in written(page)})
ALL_RECIPES = [f"--config={path.relative_to(ROOT)}" for path in sorted(ROOT.glob("configs/*.py"))]


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=lambda value: value)
def test_a_command_is_understood(page, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)
    if words[0].startswith("--config."):
        assert any(accepts([recipe, *words]) for recipe in ALL_RECIPES)
    elif words[0] == "python":
        assert words[1:3] == ["-m", "dlc_jax.main"]
        if words[3:]:
            command.parse(words[2:])
    elif words[1:] != ["--version"]:
        check_verb(*words[1:])


def accepts(words):
    try:
        return bool(command.parse(["dlc", *words]))
    except UserError:
        return False


def check_verb(verb, *words):
    """The verb knows every argument, and the recipe every field; bare names are in the help."""
    assert verb in cli.VERBS
    module = importlib.import_module(f"dlc_jax.cli.{verb}{'_' * keyword.iskeyword(verb)}")
    parser = cli._Parser(prog=verb, allow_abbrev=False)
    module.arguments(parser)
    if all(word.isalpha() and word.islower() for word in words):
        assert all(word in parser.format_help() for word in words)
        return
    arguments, rest = parser.parse_known_args(words)
    samplers = {
        "sampler": pipeline.Sampler(steps=1, guidance=pipeline.Guidance(scale=1.0)),
        "code_sampler": pipeline.CodeSampler(),
    }
    if verb == "compose":
        samplers["operator"] = pipeline.OPERATORS[arguments.operator or "coin"]()
    for word in rest:
        place, _, path = word.removeprefix("--").partition("=")[0].partition(".")
        assert place in ("config", *samplers), rest
        if place in samplers:
            operator.attrgetter(path)(samplers[place])
    if getattr(arguments, "config", None):
        fields = [word for word in rest if word.startswith("--config.")]
        command.parse([*command.given(arguments), *fields])


def test_commands_are_found():
    lines = {line for _, line in COMMANDS}
    assert "python -m dlc_jax.main --config=configs/quickstart.py" in lines
    assert len([line for line in lines if line.startswith("dlc ")]) > 15
    assert len([line for line in lines if line.startswith("--config.")]) > 3


@pytest.mark.parametrize(
    "wrong", ["dlc smaple -w W", "dlc sample -w W --nubmer 3", "dlc info W X", "dlc data look"]
)
def test_a_command_that_is_not_understood_is_red(wrong, monkeypatch):
    with pytest.raises((AssertionError, UserError)):
        test_a_command_is_understood("", wrong, monkeypatch)


# ---- Python


@pytest.mark.parametrize("page, least", [("README", 4), ("docs/sampling", 8)])
def test_python_calls_what_exists(page, least):
    text = (ROOT / f"{page}.md").read_text()
    (block,) = [block for language, block in BLOCK.findall(text) if language]
    known = {"pipeline": pipeline}
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("dlc_jax."):
            module = importlib.import_module(node.module)
            known |= {alias.name: getattr(module, alias.name) for alias in node.names}
    calls = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    for call in calls:
        name = ast.unparse(call.func)
        if name == "range":
            continue
        owner, _, attribute = name.rpartition(".")
        owner = {"p": pipeline.Pipeline, "pipeline": pipeline}.get(owner)
        function = getattr(owner, attribute) if owner else known[name]
        itself = [None] if owner is pipeline.Pipeline else []
        keywords = {each.arg: None for each in call.keywords}
        inspect.signature(function).bind(*itself, *call.args, **keywords)
    assert len(calls) >= least
