"""What tests cost is told by room: every test file has one, and sums are sums."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def load():
    spec = importlib.util.spec_from_file_location("budget", ROOT / "benchmarks" / "budget.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_test_file_has_a_room_and_every_room_its_files():
    files = {path.stem.removeprefix("test_") for path in (ROOT / "tests").rglob("test_*.py")}
    assert files == set(load().ROOM)


def test_sums_by_room(tmp_path):
    budget, costs = load(), tmp_path / "costs.jsonl"
    line = {"wall_s": 2.0, "cpu_s": 3.0, "compiles": 4, "compile_s": 1.0}
    rows = [
        {"test": f"tests/test_processes.py::test_{k}", "slow": k == 2, **line} for k in range(3)
    ]
    rows += [
        {"test": "tests/contracts/test_mesh.py::test_x[y::z]", "slow": False, **line},
        {"session_s": 61.0, "workers": 2},
    ]
    costs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rooms, whole = budget.read(str(costs))
    lines = budget.table(rooms, whole, before=rooms).splitlines()
    found = {
        cells[1].strip(): [cell.strip() for cell in cells[2:-1]]
        for cells in (line.split("|") for line in lines if "|" in line)
    }
    assert found["diffusion: processes, samplers, guidance"] == ["3", "6", "2", "9", "12", "3", "9"]
    assert found["all"] == ["4", "8", "2", "12", "16", "4", "12"]
    assert found["import and export"] == ["0"] * 7
    assert "**61 s** by 2 workers" in lines[-1]
