"""The page of dlc demo: what it does without a browser, and in one where there is one."""

import importlib.util
import os
import re
import shutil
import subprocess
import time
from urllib import request

import numpy as np
import pytest
from commands import command
from test_cli import refused

from dlc_jax import pipeline, recipe, workdir
from dlc_jax.cli import demo_board as demo
from dlc_jax.errors import UserError


@pytest.fixture(scope="module")
def board():
    images = demo.images(recipe.of_run(workdir.DEMO))
    with pipeline.load("demo", batch=demo.COUNT) as loaded:
        yield demo.Board(loaded, images)


def test_children_of_two_images(board):
    assert len(board.picks()) == len(board.images) == demo.PICKED
    parents, weights = [board.images[3], None, board.images[5]], [1, 1, 0]
    children = board.children(parents, weights, "coin", [], 0)
    assert len(children.images) == demo.COUNT
    assert all(re.fullmatch(r"\d+\.\d\d bits a position", said) for _, said in children.images)
    names = re.findall("<th>(.*?)</th>", children.table)
    assert names[:3] == ["first", "third", "child 1"]
    # the third has no weight, and so gives next to nothing
    rows = children.table.split("<tr>")[3:]
    assert sum(row.count(demo.COLORS[2]) for row in rows) < 4
    assert sum(row.count(demo.NEITHER) for row in rows) == 0
    assert board.children(parents, weights, "coin", [], 0).table == children.table


def test_every_operator_that_is_offered_draws(board):
    assert board.operators[0] == "chosen"  # the run's own, with its groups
    assert {"coin", "infill"} < set(board.operators)
    tables = {
        name: board.children(board.images[:2], [1, 1], name, ["0-5"], 3).table
        for name in board.operators
    }
    assert len(set(tables.values())) == len(tables)
    assert demo.NEITHER in tables["infill"]


def test_mistakes_in_one_line(board, tmp_path, capsys, monkeypatch):
    with pytest.raises(UserError, match="two images or more"):
        board.children([board.images[0], None, None], [1, 1, 1], "coin", [], 0)
    with pytest.raises(UserError, match="positions lie in"):
        board.children(board.images[:2], [1, 1], "coin", ["99"], 0)
    with pytest.raises(UserError, match="no group of positions 'x'"):
        board.children(board.images[:2], [1, 1], "coin", ["x"], 0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "gradio is not installed; pip install" in refused(capsys, "demo")


def test_colors_are_those_of_the_parents():
    parents = np.array([[1, 2, 3], [1, 5, 6]])
    found = demo.table(parents, ["a", "<b>"], ["red", "blue"], np.array([[1, 5, 9]]))
    assert "&lt;b&gt;" in found and "<b>" not in found
    child = found.split("<tr>")[3]
    assert re.findall("background:(.*?);", child) == ["red", "blue", demo.NEITHER]


def test_the_page_is_made(board):
    pytest.importorskip("gradio")
    from dlc_jax.cli import demo_page

    made = demo_page.page(board)
    labels = {each.get_config().get("label") for each in made.blocks.values()}
    assert {"Unseen images", "First", "Second", "Third", "Operator", "Children"} <= labels
    assert demo_page.looks()["css"]


# ---- in a browser


@pytest.fixture
def served(tmp_path):
    """The address of the page, served by the command."""
    pytest.importorskip("gradio")
    log = tmp_path / "log"
    with open(log, "w") as file:
        how = command("dlc_jax.cli", "demo", cwd=tmp_path)
        how |= {"stdout": file, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(**how)
        try:
            for _ in range(600):
                if found := re.search(r"http://127.0.0.1:\d+", log.read_text()):
                    break
                assert process.poll() is None, log.read_text()
                time.sleep(0.2)
            yield found[0]
        finally:
            process.terminate()
            process.wait(30)


@pytest.mark.slow
def test_a_person_composes_images_in_a_browser(served, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
    browser = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if browser is None:
        pytest.skip("needs chromium on PATH")
    assert request.urlopen(served, timeout=30).status == 200
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page()
        page.goto(served)
        page.wait_for_selector("#codes table", timeout=60_000)
        assert page.locator("#codes tr").count() == 2 + demo.COUNT
        page.locator("#picks .thumbnail-item").nth(6).click()
        page.wait_for_selector("#parent-2 img")
        page.click("#compose")
        page.wait_for_function(
            f"document.querySelectorAll('#codes tr').length == {3 + demo.COUNT}", timeout=60_000
        )
        assert page.locator("#children .thumbnail-item").count() == demo.COUNT
        page.fill("#positions textarea, #positions input", "99")
        page.click("#compose")
        page.wait_for_selector("text=positions lie in", timeout=30_000)
        chromium.close()
