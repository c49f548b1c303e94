"""The list of breaks fits the code: what is replaced is there once, and the tests exist."""

import ast
import importlib.util
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def mutants():
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "benchmarks" / "mutants.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_break_fits_its_file(mutants):
    assert mutants.stale(mutants.MUTANTS) == []
    for mutant in mutants.MUTANTS:
        assert mutant.before != mutant.after
        source = (ROOT / mutant.file).read_text()
        ast.parse(source.replace(mutant.before, mutant.after), mutant.what)


def test_every_test_that_should_see_a_break_exists(mutants):
    trees = {}
    for mutant in mutants.MUTANTS:
        assert mutant.tests
        for name in mutant.tests:
            path, _, function = name.partition("[")[0].partition("::")
            if path not in trees:
                trees[path] = ast.parse((ROOT / path).read_text())
            found = [node for node in trees[path].body if getattr(node, "name", "") == function]
            assert found, f"{mutant.what}: {name} does not exist"
            slow = any("slow" in ast.unparse(each) for each in found[0].decorator_list)
            assert slow == (mutant.speed == "slow"), f"{mutant.what}: {name} is not {mutant.speed}"


def test_a_break_that_no_longer_fits_is_named(mutants):
    for before in ("not in this file", "jax"):
        mutant = mutants.Mutant("dlc_jax/step.py", "gone", before, "", ())
        (line,) = mutants.stale([mutant])
        assert line.startswith(f"dlc_jax/step.py: {before!r} occurs ")
