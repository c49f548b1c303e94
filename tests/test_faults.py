"""Harmed checkpoints through the command's own resume: a small part of tests/soak/faults.py."""

import pytest
from soak import faults

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def base(once):
    return once("faults", lambda folder: faults.complete(folder / "run")) / "run"


@pytest.mark.parametrize("name", ["6 flipped, 4 truncated, 9 empty", "a newer version's step"])
def test_a_run_goes_back_to_the_newest_good_step_or_refuses_in_a_line(name, base, tmp_path):
    (fault,) = (fault for fault in faults.shapes(other_model=None) if fault.name == name)
    said, is_expected = faults.met(fault, base, tmp_path / "run")
    assert is_expected, said


def test_a_full_disk_is_a_line_and_the_same_command_goes_on(base, tmp_path):
    said, is_expected = faults.full(base, tmp_path / "run")
    assert is_expected, said
