"""The notebooks of colab/: what is committed, their first cell's logic, and whole runs of each."""

import ast
import importlib.metadata
import os
import subprocess
import sys
import types

import pytest
from commands import ROOT

BOOKS = sorted((ROOT / "colab").glob("*.ipynb"))


def read(path):
    return pytest.importorskip("nbformat").read(path, as_version=4)


def first_cell():
    """The namespace of the first cell's functions; what it does at its end is left out."""
    book = read(BOOKS[0])
    tree = ast.parse(next(cell.source for cell in book.cells if cell.cell_type == "code"))
    tree.body = [each for each in tree.body if not isinstance(each, ast.If)]
    space = {}
    exec(compile(tree, "first cell", "exec"), space)
    return space


def test_there_are_four():
    names = {path.stem for path in BOOKS}
    assert names == {"composition", "train_your_own", "inside_the_codes", "export_to_pytorch"}


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_no_outputs_are_committed(path):
    book = read(path)
    for cell in book.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
            assert all(len(line) <= 100 for line in cell.source.splitlines())
            ast.parse(cell.source)
    assert book.cells[0].cell_type == "markdown" and book.cells[0].source.startswith("# ")
    own, shared = (
        next(cell.source for cell in each.cells if cell.cell_type == "code")
        for each in (book, read(BOOKS[0]))
    )
    assert own == shared, "the first cell is one and the same"


# ---- the first cell


@pytest.mark.parametrize(
    ("program", "paths", "kind"),
    [("nvidia-smi", (), "gpu"), (None, ("/dev/vfio/0",), "tpu"), (None, (), "cpu")],
)
def test_the_accelerator_is_found(program, paths, kind, monkeypatch):
    space = first_cell()
    monkeypatch.setattr("shutil.which", lambda name: program)
    monkeypatch.setattr(os.path, "exists", lambda path: path in paths)
    assert space["attached"]() == kind


@pytest.mark.parametrize(
    ("kind", "driver", "wanted"),
    [
        ("cpu", "", "jax"),
        ("tpu", "", "jax[tpu]"),
        ("gpu", "CUDA Version: 13.0 ", "jax[cuda13]"),
        ("gpu", "CUDA Version: 12.4 ", "jax[cuda12]"),
    ],
)
def test_jax_is_that_of_the_accelerator(kind, driver, wanted, monkeypatch):
    space = first_cell()
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: types.SimpleNamespace(stdout=driver))
    with pytest.raises(SystemExit, match="into SOURCE"):
        space["packages"](kind)
    space["SOURCE"] = "git+https://example.org/dlc_jax"
    ours = "dlc_jax[colab] @ git+https://example.org/dlc_jax"
    assert space["packages"](kind) == [ours, wanted]
    space["SOURCE"] = str(ROOT)
    assert space["packages"](kind) == [f"{ROOT}[colab]", wanted]


@pytest.mark.parametrize("is_loaded", [False, True])
def test_a_restart_is_asked_for_if_jax_was_loaded(is_loaded, monkeypatch):
    """pip changes jax's version: only what was loaded before is too old."""
    space, versions, asked = first_cell(), {"jax": "0.7.2", "jaxlib": "0.7.2", "numpy": "2"}, []

    def run(line, check):
        asked.append(line)
        versions.update(jax="0.10.2", jaxlib="0.10.2")

    space["SOURCE"] = str(ROOT)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(importlib.metadata, "version", versions.get)
    for name in ("jax", "jaxlib"):
        if is_loaded:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        else:
            monkeypatch.delitem(sys.modules, name, raising=False)
    if is_loaded:
        with pytest.raises(SystemExit, match="jax, jaxlib had been loaded.*Restart session"):
            space["install"]("cpu")
    else:
        space["install"]("cpu")
    assert [line[-2:] for line in asked] == [[f"{ROOT}[colab]", "jax"]]
    assert "--upgrade" in asked[0]


def test_another_accelerator_than_the_chosen_is_refused(monkeypatch, capsys):
    space, jax = first_cell(), types.ModuleType("jax")
    jax.default_backend, jax.device_count, jax.__version__ = lambda: "cpu", lambda: 1, "0.10.2"
    monkeypatch.setitem(sys.modules, "jax", jax)
    space["check"]("cpu")
    assert "on 1 x cpu" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="jax runs on cpu, not on gpu"):
        space["check"]("gpu")


# ---- whole runs


@pytest.mark.slow
@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_to_its_end(path, tmp_path, monkeypatch):
    """Top to bottom in a kernel of its own, as the tests of the package do it: DLC_FAST=1."""
    for name in ("nbclient", "ipykernel", "matplotlib"):
        pytest.importorskip(name)
    if path.stem == "export_to_pytorch":
        pytest.importorskip("torch")
    from nbclient import NotebookClient

    usual = {"DLC_FAST": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    usual["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # compiles in half the time
    for name, value in usual.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MPLBACKEND", raising=False)  # pictures go into the notebook
    book = read(path)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(book, timeout=120, kernel_name="python3", resources=where).execute()
    assert not list(tmp_path.iterdir())
    pictures = [
        output
        for cell in book.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) >= 4
