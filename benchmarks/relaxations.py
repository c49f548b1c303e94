"""Softmax, Gumbel-softmax and straight-through codes with the same budget and several seeds, side by side: a markdown table.

    python benchmarks/relaxations.py --workdir runs/relaxations [--steps 400] [--seeds 3]
    --config=configs/image_folder.py --config.data.path=PATH

What it does not know itself is given to `python -m dlc_jax.main` of every run; only the relaxation
and the seed differ. Each run ends with the checkup of its `monitor`: hard codes (argmax, without
noise) of `monitor.count` training and as many validation images. Runs that are complete are not
repeated, interrupted ones go on.
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
            given = [
                f"--config.encoder.model.relaxation={relaxation}",
                f"--config.seed={seed}",
                "--config.steps=('encoder',)",
            ]
            given += [f"--config.encoder.train.steps={arguments.steps}", f"--workdir={workdir}"]
            subprocess.run(
                [sys.executable, "-m", "dlc_jax.main", *rest, *given], check=True, stdout=sys.stderr
            )
            found[relaxation].append(json.loads((workdir / "results.json").read_text()))
            print(table(found), flush=True)


def table(found) -> str:
    """Mean and standard deviation over seeds of what is SHOWN."""
    lines = ["| | " + " | ".join(found) + " |", "|---" * (1 + len(found)) + "|"]
    for key, (what, scale) in SHOWN.items():
        cells = [
            spread([scale * results[f"encoder/monitor/{key}"] for results in runs])
            for runs in found.values()
        ]
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    return "\n".join(
        [*lines, "| seeds | " + " | ".join(str(len(runs)) for runs in found.values()) + " |"]
    )


def spread(numbers: list[float]) -> str:
    if not numbers:
        return ""
    return f"{statistics.mean(numbers):.2f}" + (
        f" ± {statistics.stdev(numbers):.2f}" if len(numbers) > 1 else ""
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    main(*parser.parse_known_args())
