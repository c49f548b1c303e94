"""The results of finished runs side by side, as a markdown table.

python benchmarks/runs.py runs/seed0 runs/seed1 runs/seed2
"""

import json
import pathlib
import sys

GROUPS = (
    *("judge", "probe", "probe_held_out", "reconstruction", "reconstruction_held_out"),
    *("unconditional", "composition", "composition_of_three", "without_codes"),
    *("seconds", "peak_memory_gb"),
)
PLAIN = ("count", "values", "distance", "seconds", "memory")  # not shares


def cell(key: str, value) -> str:
    if value is None:
        return ""
    if isinstance(value, int) or any(word in key for word in PLAIN):
        return f"{value:.3f}" if "distance" in key else f"{value:.1f}".removesuffix(".0")
    return f"{100 * value:.1f} %"


def table(workdirs: list[str]) -> str:
    paths = [pathlib.Path(workdir) for workdir in workdirs]
    found = [json.loads((path / "results.json").read_text()) for path in paths]
    lines = ["| result | " + " | ".join(path.name for path in paths) + " |"]
    lines.append("|---" * (len(found) + 1) + "|")
    keys = {key for results in found for key in results if key.split("/")[0] in GROUPS}
    for key in sorted(keys, key=lambda key: (GROUPS.index(key.split("/")[0]), key)):
        cells = " | ".join(cell(key, results.get(key)) for results in found)
        lines.append(f"| {key} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(sys.argv[1:]))
