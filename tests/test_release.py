"""What is released: sdist and wheel hold the whole package, and work without the repository."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from dlc_jax import cli, command
from dlc_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
BUILD = "import sys; from setuptools import build_meta; build_meta.build_{}(sys.argv[1])"


def test_the_version_is_the_same_everywhere(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"dlc_jax {VERSION}\n"
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == VERSION
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert newest == VERSION


def test_own_recipes_are_found_from_any_folder(tmp_path, monkeypatch):
    """One beside the user comes first; what is nowhere is still refused."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flowers.py").write_text('RECIPE = {"like": "quickstart.py:tiny", "data.image": 8}')
    _, own = command.read("configs/quickstart.py:tiny")
    path, flowers = command.read("flowers.py")
    assert (path, flowers) == (Path("flowers.py"), own | {"data.image": 8})
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.py").write_text('RECIPE = {"data.image": 32}')
    assert command.read("configs/quickstart.py")[1] == {"data.image": 32}
    for missing in ("configs/none.py", "quickstart.py", "other/quickstart.py"):
        with pytest.raises(UserError, match=f"{missing} does not exist"):
            command.read(missing)


def run(*words, cwd):
    done = subprocess.run(
        list(map(str, words)), cwd=cwd, capture_output=True, text=True, env={"PATH": ""}
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built of the sdist alone, which is built of a copy of the repository."""
    pytest.importorskip("setuptools", minversion="77")
    here = tmp_path_factory.mktemp("release")
    shutil.copytree(
        ROOT,
        here / "copy",
        symlinks=True,
        ignore=lambda folder, names: [
            name
            for name in names
            if name.startswith(".") or name in ("__pycache__", "build", "runs", "dlc_jax.egg-info")
        ],
    )
    run(sys.executable, "-c", BUILD.format("sdist"), here, cwd=here / "copy")
    with tarfile.open(here / f"dlc_jax-{VERSION}.tar.gz") as archive:
        archive.extractall(here / "source", filter="data")
    inside = here / "source" / f"dlc_jax-{VERSION}"
    run(sys.executable, "-c", BUILD.format("wheel"), here, cwd=inside)
    return here / f"dlc_jax-{VERSION}-py3-none-any.whl"


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        shipped = set(archive.namelist())
    folders = {ROOT / "dlc_jax": "dlc_jax", ROOT / "configs": "dlc_jax/configs"}
    wanted = {
        f"{name}/{path.relative_to(folder)}"
        for folder, name in folders.items()
        for path in folder.rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }
    assert {name for name in shipped if name.startswith("dlc_jax/")} == wanted
    assert any(name.startswith("dlc_jax/interop/hub/") for name in wanted)


@pytest.mark.slow
def test_it_works_without_the_repository(wheel, tmp_path):
    """In a fresh environment that borrows the dependencies of this one, and no package of ours."""
    run(sys.executable, "-m", "venv", tmp_path / "fresh", cwd=tmp_path)
    python, bin_ = tmp_path / "fresh" / "bin" / "python", tmp_path / "fresh" / "bin"
    run(python, "-m", "pip", "install", "--no-index", "--no-deps", wheel, cwd=tmp_path)
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'), end='')"
    own = Path(run(python, "-c", purelib, cwd=tmp_path))
    # plain paths: nothing editable in them is followed
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (own / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    assert run(bin_ / "dlc", "--version", cwd=tmp_path) == f"dlc_jax {VERSION}\n"
    where = run(python, "-c", "import dlc_jax; print(dlc_jax.__file__)", cwd=tmp_path)
    assert where.startswith(str(tmp_path))
    (tmp_path / "own.py").write_text('RECIPE = {"like": "quickstart.py", "seed": 7}')
    assert "seed = 7" in run(bin_ / "dlc", "config", "own.py", cwd=tmp_path)
    assert "data.count = 1024" in run(
        bin_ / "dlc", "config", "configs/quickstart.py:tiny", "--all", cwd=tmp_path
    )
