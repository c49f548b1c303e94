"""Softmax, Gumbel-softmax and straight-through codes with the same budget, side by side.

    python benchmarks/relaxations.py --workdir runs/relaxations [--steps 400] [--seeds 3] \\
        --config=configs/image_folder.py --config.data.path=PATH

Other arguments are passed to `python -m dlc_jax.main` of every run; only the relaxation and the
seed differ. Each run ends with the checkup of its `monitor`: hard codes (argmax, without noise) of
`monitor.count` training images and as many validation images. Complete runs are not repeated,
interrupted ones continue. Prints a markdown table.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

RELAXATIONS = ("softmax", "gumbel", "straight_through")
SHOWN = {
    "probe/label": ("linear probe of hard codes, %", 100),
    "probe_knn/label": ("5 nearest codes, %", 100),
    "probe_features/label": ("linear probe of the class token, %", 100),
    "codes/perplexity": ("perplexity / V", 1),
    "agreement/times_chance": ("agreement of two views, times chance", 1),
}


def main(arguments, rest) -> None:
    found = {relaxation: [] for relaxation in RELAXATIONS}
    for seed in range(arguments.seeds):
        for relaxation in RELAXATIONS:
            workdir = Path(arguments.workdir) / f"{relaxation}-{seed}"
            fields = {
                "encoder.model.simplicial.relaxation": relaxation,
                "encoder.train.steps": arguments.steps,
                "seed": seed,
                "steps": "('encoder',)",
            }
            command = [sys.executable, "-m", "dlc_jax.main", *rest, f"--workdir={workdir}"]
            command += [f"--config.{name}={value}" for name, value in fields.items()]
            subprocess.run(command, check=True, stdout=sys.stderr)
            found[relaxation].append(json.loads((workdir / "results.json").read_text()))
            print(table(found), flush=True)


def table(found) -> str:
    """Mean and standard deviation over seeds of what is SHOWN."""
    lines = ["| | " + " | ".join(found) + " |", "|---" * (1 + len(found)) + "|"]
    for key, (what, scale) in SHOWN.items():
        name = f"encoder/monitor/{key}"
        cells = [spread([scale * run[name] for run in runs]) for runs in found.values()]
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    counts = " | ".join(str(len(runs)) for runs in found.values())
    return "\n".join([*lines, f"| seeds | {counts} |"])


def spread(numbers: list[float]) -> str:
    if not numbers:
        return ""
    deviation = f" ± {statistics.stdev(numbers):.2f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.2f}{deviation}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    main(*parser.parse_known_args())
