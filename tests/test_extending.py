"""docs/extending.md: its blocks are put into a copy of the package, and its commands run there."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "extending.md").read_text()
WALKS = {
    title: body
    for title, body in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL)
}


def blocks(walk):
    """(language, path, text) of every fenced block."""
    found = re.findall(r'^```(\w*)(?: title="(.*?)")?\n(.*?)^```$', walk, re.MULTILINE | re.DOTALL)
    return [(kind or "command", path, text) for kind, path, text in found]


def patched(source, diff):
    """A file after a diff without line numbers."""
    lines = [line or " " for line in diff.splitlines()]
    before = "\n".join(line[1:] for line in lines if line[0] in " -")
    after = "\n".join(line[1:] for line in lines if line[0] in " +")
    assert source.count(before) == 1, before
    return source.replace(before, after)


def run(command, here):
    program, *arguments = shlex.split(command)
    arguments = ["-m", "dlc_jax.cli", *arguments] if program == "dlc" else arguments
    environment = os.environ | {"PYTHONPATH": str(here), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=here, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_the_walks_name_every_file_they_touch():
    titles = "Add a stage, Swap the backbone, Add a sampler, Add a sampler of codes, Own images"
    assert list(WALKS) == titles.split(", ")
    for title, walk in WALKS.items():
        said = re.search(r"^Touches: (.*)\.$", walk, re.MULTILINE)[1]
        touched = {path for _, path, _ in blocks(walk) if path.startswith("dlc_jax/")}
        named = set(re.findall(r"`(dlc_jax/[^`]+)`", said))
        assert touched == named, title
    sampler = [path for _, path, _ in blocks(WALKS["Add a sampler"]) if path]
    assert sampler == ["dlc_jax/diffusion/sample.py"]
    backbone = [path for _, path, _ in blocks(WALKS["Swap the backbone"]) if "dlc_jax" in path]
    assert len(backbone) == 2


@pytest.mark.slow
@pytest.mark.parametrize("title", list(WALKS))
def test_walk(title, tmp_path, request):
    for folder in ("dlc_jax", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    commands, code = [], []
    for kind, path, text in blocks(WALKS[title]):
        if kind == "command":
            commands += text.splitlines()
        elif kind == "diff":
            file = tmp_path / path
            file.write_text(patched(file.read_text(), text))
        elif path:
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_text(text)
        else:
            code.append(text)
    if title.startswith("Add a sampler"):
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / "quickstart").symlink_to(request.getfixturevalue("quickstart") / "run")
    if title == "Own images":
        (tmp_path / "images").mkdir()
        for number in range(64):
            pixels = np.random.default_rng(number).integers(0, 256, (40, 48, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / f"{number:02d}.png")
    said = [run(command, tmp_path) for command in commands]
    assert all(said)
    for text in code:
        (tmp_path / "program.py").write_text(text)
        run("python program.py", tmp_path)
    if title == "Add a stage":
        assert "1 passed" in said[0] and "average 30/30 100%" in said[1]
    if title == "Swap the backbone":
        assert "encoder 4/4 100%" in said[0] and "name = 'convnet'" in said[1]
    if title == "Add a sampler":
        assert said[0].startswith("3 steps of midpoint, guidance 1, seed 0")
        assert (tmp_path / "midpoint.png").is_file()
    if title == "Add a sampler of codes":
        assert "codes by left_to_right, 6.0 calls each" in said[0]
