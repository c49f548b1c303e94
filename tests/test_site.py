"""docs/ as a site: every link and heading that a page names exists, and every page is listed."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("material"), reason="mkdocs-material, the extra `docs`, is missing"
)


def build(folder, there):
    """The exit code and what was said; what would be a warning is an error."""
    words = ["mkdocs", "build", "--strict", "--config-file", folder / "mkdocs.yml"]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, words), "--site-dir", str(there)],
        env=environment,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr


def test_the_site_builds_without_a_warning(tmp_path):
    code, said = build(ROOT, tmp_path / "site")
    assert code == 0, said
    made = {path.stem: path.read_text() for path in (tmp_path / "site").glob("*.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} <= made.keys()
    assert not [name for name, text in made.items() if "googleapis" in text]  # nothing is fetched
    assert not [name for name, text in made.items() if "```" in text]  # no block is taken for text


@pytest.mark.parametrize(
    "text", ["[x](none.md)", "[x](faq.md#none)", "![x](pictures/none.png)"], ids=lambda text: text
)
def test_what_does_not_exist_is_refused(text, tmp_path):
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    with (tmp_path / "docs" / "index.md").open("a") as page:
        page.write(f"\n{text}\n")
    code, said = build(tmp_path, tmp_path / "site")
    assert code == 1 and "none" in said
