"""What the README says of the files is what the files say of themselves. UPDATE_GOLDEN=1 rewrites the map."""

import ast
import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
MAP = re.compile(r"(<!-- map -->\n).*?(<!-- /map -->)", re.DOTALL)


def file_map():
    """A line for each module and recipe: its path, and the first sentence of its docstring."""
    lines = []
    for path in [
        *sorted(ROOT.glob("dlc_jax/**/*.py")),
        *sorted(ROOT.glob("configs/*.py")),
        *sorted(ROOT.glob("benchmarks/*.py")),
    ]:
        said = ast.get_docstring(ast.parse(path.read_text()))
        assert said, f"{path} has no docstring"
        lines.append(
            f"| `{path.relative_to(ROOT)}` | {said.splitlines()[0].replace('|', chr(92) + '|')} |"
        )
    return "| file | what it is |\n|---|---|\n" + "\n".join(lines) + "\n"


def test_map_of_the_files():
    text = README.read_text()
    found = MAP.search(text)
    assert found, "README.md has lost its <!-- map --> section"
    wanted = found[1] + file_map() + found[2]
    if os.environ.get("UPDATE_GOLDEN"):
        README.write_text(text.replace(found[0], wanted))
    else:
        assert found[0] == wanted, (
            "the map is out of date; run UPDATE_GOLDEN=1 pytest tests/test_readme.py"
        )


def test_commands_name_recipes_that_exist():
    named = set(re.findall(r"configs/(\w+)\.py", README.read_text()))
    assert named and all((ROOT / "configs" / f"{name}.py").exists() for name in named), named


def test_linked_files_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        assert target.startswith("http") or (ROOT / target).exists(), target
