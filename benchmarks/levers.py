"""The levers of configs/imagenet256_fast.py, one at a time, at equal model FLOPs, on small images.

    python benchmarks/levers.py PLACE --weights squeezenet_v1.0_decoded_OIHW.npz --workdir DIR

PLACE is CIFAR-10 or any place of images, taken at 16 pixels. One encoder and its codes serve all.
The table has the validation loss where it is of the same kind as the first row's, and the Fréchet
distance of SqueezeNet's features between images drawn from codes of the validation split and images
of the training split. What is done in DIR is not done again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from dlc_jax import command
from dlc_jax.stages import STAGES

RECIPE = Path(__file__).parents[1] / "configs" / "image_folder.py"
SHARED = {
    "data.image": 16,
    "*.model*.image": 16,
    "encoder.crops.*_size": 16,
    "encoder.train.steps": 300,
    "encoder.monitor.every": 300,
    "*.threads": 1,
    "*.model*positions": 32,
    "*.model*values": 16,
}
GENERATOR = {
    "generator.model.patch": 4,
    "generator.model.width": 192,
    "generator.model.depth": 6,
    "generator.model.heads": 6,
    "generator.model.qk_norm": False,
    "generator.process.prediction": "v",
    "generator.process.time": "uniform",
    "generator.objective.drop_positions": 0.0,
    "generator.objective.foreign": 0.0,
    "generator.train.batch": 64,
    "generator.train.validate_every": 10_000,
    "generator.train.validate_batches": 32,
    "generator.train.save_every": 10_000,
    "generator.ema_decay": 0.995,
    "generator.optimizer.learning_rate": 1e-3,
    "generator.scores.network": "squeezenet",
    "generator.scores.protocol": "stretch",
    "generator.scores.count": 1000,
    "generator.scores.reference_count": 5000,
    "generator.scores.metrics": "('fd',)",
    "generator.scores.sampler.method": "heun",
    "generator.scores.sampler.steps": 10,
    "generator.grid.count": 16,
}
LEVERS = {
    "velocity, uniform times, DiT's block, AdamW": {},
    "x-prediction": {"process.prediction": "x"},
    "logit-normal times": {"process.time": "logit_normal"},
    "RMSNorm, SwiGLU, RoPE": {"model.block": "modern"},
    "8 code tokens in context": {"model.context": 8},
    "wide head, 2 blocks of 288": {
        "model.head_width": 288,
        "model.head_depth": 2,
        "model.depth": 5,
    },
    "Muon": {"optimizer": None, "optimizer.name": "muon", "optimizer.learning_rate": 1e-3},
    "internal guidance 1.5": {
        "model.early": 2,
        "objective.drop": 0.0,
        "scores.sampler.guidance.base": "internal",
        "grid.sampler.guidance.base": "internal",
        "scores.sampler.guidance.scale": 1.5,
    },
    "guidance 1.5 by the null condition": {"scores.sampler.guidance.scale": 1.5},
    "75 % of the tokens dropped, then none": {
        "model.route": True,
        "objective.route": 0.75,
        "objective.route_until": 0.8,  # of the steps
    },
    "aligned with the encoder's patches": {
        "model.align": 2,
        "model.align_width": 128,
        "objective.align": 0.5,
    },
}
OTHER_LOSS = ("x-prediction", "logit-normal times", "internal guidance 1.5")


def config_of(lines, workdir, place):
    """The expanded config of some lines, and the arguments that make it."""
    lines = {"data.path": place, **lines}
    given = [f"--config.{name}={value}" for name, value in lines.items()]
    given = [f"--config={RECIPE}", *given, f"--workdir={workdir}"]
    return command.parse(["dlc", *given])[0], given


def run(given, steps):
    given = [given[0].replace(".py", f".py:{steps}"), *given[1:]]
    subprocess.run([sys.executable, "-m", "dlc_jax.main", *given], check=True)


def lines_of(name, workdir, weights, steps):
    own = {f"generator.{field}": value for field, value in LEVERS[name].items()}
    if own.get("generator.objective.route_until"):
        own["generator.objective.route_until"] = round(0.8 * steps)
    shared = {**SHARED, **GENERATOR, "generator.scores.weights": weights}
    shared = {
        field: value
        for field, value in shared.items()
        if not ("generator.optimizer" in own and field.startswith("generator.optimizer"))
    }
    own.pop("generator.optimizer", None)
    return {
        **shared,
        **own,
        "generator.train.steps": steps,
        "codes.path": f"{workdir}/shared/codes",
    }


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("place")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    workdir = Path(arguments.workdir)
    _, given = config_of(SHARED, workdir / "shared", arguments.place)
    run(given, "encoder,codes")
    rows, first = [], None
    for number, name in enumerate(LEVERS):
        if arguments.only and arguments.only not in name and number:
            continue
        place = workdir / f"lever{number}"
        lines = lines_of(name, workdir, arguments.weights, arguments.steps)
        config, _ = config_of(lines, place, arguments.place)
        flops = STAGES["generator"](config, step="generator", workdir=place).flops
        first = first or flops
        steps = round(arguments.steps * first / flops)
        lines = lines_of(name, workdir, arguments.weights, steps)
        _, given = config_of(lines, place, arguments.place)
        run(given, "generator")
        results = json.loads((place / "results.json").read_text())
        loss = "" if name in OTHER_LOSS else f"{results['generator/validation/loss']:.4f}"
        distance, error = (
            results[f"generator/scores/fd_squeezenet{end}"] for end in ("", "_error")
        )
        rows.append(f"| {name} | {steps} | {loss} | {distance:.0f} ± {error:.0f} |")
        print(rows[-1], flush=True)
    print("\n| lever | steps | validation loss | Fréchet distance, SqueezeNet |\n|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
