"""Training continued from a backbone without its heads, frozen at first and not frozen.

    python benchmarks/continued.py W --workdir runs/continued \\
        [--steps 300] [--frozen 150] [--every 50] [--config.NAME=VALUE …]

W is a finished run of an encoder. Its backbone goes out through `dlc export dinov2` and comes back
through `dlc import dinov2` like DINOv2's own weights: without simplicial and DINO heads
(facebookresearch/dinov2#204). Then it is trained further by W's own recipe, twice with the same
seed. Measured on the way are features of the teacher's backbone, which need no head: the weighted
vote of the 20 nearest class tokens, and a linear probe of class token and patches, on
`monitor.count` training images and on validation images. Prints markdown tables.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

SHOWN = {
    "probe_features_knn/label_20": "20 nearest class tokens",
    "probe_features_patches/label": "linear, class token and patches",
    "probe/label": "linear, hard codes",
}


def main(arguments, rest) -> None:
    workdir, source = Path(arguments.workdir), Path(arguments.run)
    exported, imported = workdir / "exported", workdir / "imported"
    printed = workdir / "imported.txt"
    if not printed.exists():
        dlc("export", "dinov2", str(source), "--out", str(exported))
        weights = str(exported / "model.safetensors")
        printed.write_text(dlc("import", "dinov2", weights, "--out", str(imported)))
    # the flags that import prints: those of the model, and of the start
    start = shlex.split(printed.read_text().splitlines()[-1])
    curves = {"before": [(0, evaluated(source)[-1][1])]}
    for name, frozen in (("frozen first", (("vit/.*", arguments.frozen),)), ("not frozen", ())):
        directory = workdir / name.replace(" ", "_")
        fields = {
            "steps": "('encoder',)",
            "encoder.optimizer.freeze": frozen,
            "encoder.train.steps": arguments.steps,
            "encoder.monitor.every": arguments.every,
        }
        command = [sys.executable, "-m", "dlc_jax.main", f"--config={source}/config.json"]
        command += [f"--workdir={directory}", *start]
        command += [f"--config.{name}={value}" for name, value in fields.items()]
        subprocess.run([*command, *rest], check=True, stdout=sys.stderr)
        curves[name] = evaluated(directory)
    print("\n\n".join(f"**{what}**, %\n\n{table(key, curves)}" for key, what in SHOWN.items()))


def dlc(*arguments: str) -> str:
    command = [sys.executable, "-m", "dlc_jax.cli", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def evaluated(directory: Path) -> list[tuple[int, dict]]:
    """[(step, what the monitor found)] of a run's encoder."""
    lines = (directory / "encoder" / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    return [(line["step"], line) for line in lines if f"monitor/{next(iter(SHOWN))}" in line]


def table(key: str, curves) -> str:
    steps = sorted({step for name in curves if name != "before" for step, _ in curves[name]})
    lines = ["| steps | " + " | ".join(map(str, steps)) + " |", "|---" * (1 + len(steps)) + "|"]
    for name, curve in curves.items():
        if name != "before":
            found = {step: f"{100 * line[f'monitor/{key}']:.1f}" for step, line in curve}
            lines.append(f"| {name} | " + " | ".join(found.get(step, "") for step in steps) + " |")
    before = 100 * curves["before"][0][1][f"monitor/{key}"]
    return "\n".join([*lines, "", f"The encoder that it comes from: {before:.1f}."])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("run", metavar="W")
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--frozen", type=int, default=150)
    parser.add_argument("--every", type=int, default=50)
    main(*parser.parse_known_args())
