"""The results of finished runs side by side, as a markdown table: python benchmarks/runs.py runs/seed0 runs/seed1 runs/seed2"""

import json
import pathlib
import sys

GROUPS = (
    "judge", "probe", "probe_held_out", "reconstruction", "reconstruction_held_out", "unconditional", "composition",
    "composition_of_three", "without_codes", "seconds", "peak_memory_gb",
)  # fmt: skip
PLAIN = ("count", "values", "distance", "seconds", "memory")  # not shares


def cell(key: str, value) -> str:
    if value is None:
        return ""
    if isinstance(value, int) or any(word in key for word in PLAIN):
        return f"{value:.3f}" if "distance" in key else f"{value:.1f}".removesuffix(".0")
    return f"{100 * value:.1f} %"


def table(workdirs: list[str]) -> str:
    found = [
        json.loads((pathlib.Path(workdir) / "results.json").read_text()) for workdir in workdirs
    ]
    lines = [
        "| result | " + " | ".join(pathlib.Path(workdir).name for workdir in workdirs) + " |",
        "|---" * (len(found) + 1) + "|",
    ]
    for key in sorted(
        {key for results in found for key in results},
        key=lambda key: (
            (GROUPS.index(key.split("/")[0]), key) if key.split("/")[0] in GROUPS else (99, key)
        ),
    ):
        if key.split("/")[0] in GROUPS:
            lines.append(
                f"| {key} | " + " | ".join(cell(key, results.get(key)) for results in found) + " |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(sys.argv[1:]))
