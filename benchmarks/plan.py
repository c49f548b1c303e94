"""Every program of the paper, compiled for other machines: the table of docs/results_history.md.

    python benchmarks/plan.py [--only generator] [--out plan.jsonl]

Each program is compiled in a process of its own by `dlc plan --json`. Each line is written at once,
and what --out already holds is not compiled again. Two cores need about a minute for each. Nothing
is run, so no accelerator is needed.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
GIB = 2**30

# program -> (step, its program, batch of one device, other fields). The batch of a recipe is that
# of the paper, on four or eight GPUs; on a pod every device would get a fraction of an image, so
# the table gives each device what fills it.
PROGRAMS = {
    "encoder": ("encoder", "train", 8, {}),
    "codes": ("codes", "encode", 64, {}),
    "prior": ("prior", "train", 16, {}),
    "generator": ("generator", "train", 16, {}),
    "sampling of codes": ("samples", "sample_codes", 16, {}),
    "sampling of images": ("samples", "decode", 16, {}),
}
# machine -> mesh.fsdp: where this libtpu reduce-scatters gradients, a ring of the torus, of a tpu7x
# all of it; a host of eight GPUs
MACHINES = {
    "v5e:8x16": 16,
    "v5p:4x4x8": 16,
    "v6e:16x16": 16,
    "tpu7x:4x4x4": 128,
    "h200:8": 8,
    "h200:64": 8,
}
# the arguments of `compiled` after the name
LARGE = (
    *("generator,8B", "generator", "train", "v5p:16x16x24"),
    *(12288, 16, 4, {"generator.model.remat": "full"}),
)


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add, usual = parser.add_argument, ROOT / "build" / "plan.jsonl"
    add("--only", default="", help="programs and machines whose names contain this")
    add("--out", type=pathlib.Path, default=usual, help="estimates, one JSON object a line")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    lines = arguments.out.read_text().splitlines() if arguments.out.exists() else []
    done = {found["case"]: found for found in map(json.loads, lines)}
    for name, case in cases().items():
        if arguments.only in name and name not in done:
            done[name] = compiled(name, *case)
            with open(arguments.out, "a") as file:
                file.write(json.dumps(done[name]) + "\n")
            print(row(done[name]), flush=True)
    print("\n" + table(done.values()))


def cases():
    found = {}
    for machine, fsdp in MACHINES.items():
        devices = int(machine.split(":")[1]) if machine.startswith("h200") else count(machine)
        for name, (step, program, each, fields) in PROGRAMS.items():
            batch = each * devices
            found[f"{name} on {machine}"] = (step, step, program, machine, batch, fsdp, 1, fields)
    found[f"generator, 8 billion, on {LARGE[3]}"] = LARGE
    return found


def count(machine):
    """Devices of a TPU slice, as jax counts them."""
    kind, shape = machine.split(":")
    chips = 1
    for side in shape.split("x"):
        chips *= int(side)
    return chips * (2 if kind == "tpu7x" else 1)


def compiled(name, variant, step, program, machine, batch, fsdp, tensor, fields):
    section = f"{step}.train.batch" if program == "train" else f"{step}.batch"
    fields = {"mesh.data": -1, "mesh.fsdp": fsdp, "mesh.tensor": tensor, section: batch} | fields
    command = [sys.executable, "-m", "dlc_jax.cli", "plan", "--json", "--topology", machine]
    command += ["--step", step, "--program", program, f"--config=configs/imagenet256.py:{variant}"]
    command += [f"--config.{field}={value}" for field, value in fields.items()]
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = {"error": done.stderr.strip()[-300:]}
    if done.returncode in (0, 1) and done.stdout.strip():
        found = json.loads(done.stdout)[0]
    return {"case": name, "wall_seconds": time.monotonic() - start, **found}


HEAD = (
    "| program | batch | mesh | fits | memory a device | state "
    "| reduce-scatter, all-gather, all-reduce | TFLOP a device | ms | of peak "
    "| compile s | host GiB |"
)


def row(found) -> str:
    if "error" in found:
        return f"| {found['case']} | | | error | {found['error'][-120:]} | | | | | | | |"
    moved, moves = found["collectives"], "unread"
    if moved is not None:
        kinds = ("reduce-scatter", "all-gather", "all-reduce")
        sizes = (moved[kind]["bytes"] / GIB if kind in moved else None for kind in kinds)
        moves = ", ".join("0" if size is None else f"{size:.2f}" for size in sizes)
    took = ("", "")
    if found["seconds"]:
        took = (f"{found['seconds'] * 1e3:.0f}", f"{found['utilization']:.0%}")
    cells = [
        found["case"],
        str(found["batch"]),
        "x".join(str(size) for size in found["mesh"].values()),
        "yes" if found["fits"] else "**no**",
        f"{found['wanted'] / GIB:.1f} of {found['available'] / GIB:.1f} GiB",
        f"{found['state'] / GIB:.2f}",
        moves,
        f"{found['flops'] / 1e12:.1f}",
        *took,
        f"{found['lower_seconds'] + found['compile_seconds']:.0f}",
        f"{found['host_bytes'] / GIB:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def table(found) -> str:
    return "\n".join([HEAD, "|" + "---|" * (HEAD.count("|") - 1), *map(row, found)])


if __name__ == "__main__":
    main()
