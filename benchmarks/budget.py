"""What the tests cost, room by room, written into docs/budget.md.

    pytest -m '' --costs costs.jsonl
    python benchmarks/budget.py costs.jsonl [earlier.jsonl]

A second file, of an earlier run, adds a column to compare with. Seconds of tests are those of a
worker: two workers spend two of them in a second.
"""

import collections
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "budget.md"
TABLE = re.compile(r"(<!-- costs -->\n).*?(<!-- /costs -->)", re.DOTALL)

# Every test file is in one room.
ROOMS = {
    "house: rules, recipes, launcher, command line": "architecture budget command configs errors "
    "extending fields launch launch_cluster memory mutants readme recipe release site stop turn",
    "loop: steps, agenda, optimizer, workdir": "agenda contract narrow_gradients optim step "
    "train workdir",
    "stages on real networks, several devices": "distill encoder_stage encoder_student "
    "generator_stage mesh parallel prior_scores prior_stage real_stages several hosts remote "
    "remote_runs",
    "images: places, decoding, conversion, crops": "archives cli_data colors convert decoder "
    "files heic images inputs listing loader npz parquet shapes sources survey sweep transforms "
    "webdataset",
    "codes: store, job, health": "checkup cli_probe code_store codes_dtype codes_health codes_job "
    "embeddings latents masks neighbors probe shared_codes batch_file code_likeness",
    "networks, kernel, losses": "attention attention_device attention_gpu attention_tpu "
    "autoencoder dit dit_interop dit_options dit_parity drop_path encoder flops layers "
    "masked_transformer models networks parameters positions shardings ssl_loss tiny_autoencoder "
    "vit vit_parity",
    "diffusion: processes, samplers, guidance": "code_samplers ddpm flow guidance masked noise "
    "processes samplers schedules uniform",
    "checkpoints, metrics, report": "boards checkpoint cli_checkpoints failed_saves metrics report "
    "retention",
    "pipeline, samples, verbs": "cli code_positions composition demo demo_page factors judge "
    "baselines notebooks operators pictures pipeline profile samples",
    "evaluation: metrics of samples": "evaluate evaluate_parity frechet inception_score "
    "kernel_distance manifold metrics_parity training_scores vendi",
    "feature networks": "features features_parity",
    "import and export": "diffusers_folders export_torch export_torch_parity exported import_torch "
    "interop interop_cli interop_refusals official sedd_interop tensor_files torch_zip",
    "plans for other machines": "plan plan_machine plan_program",
    "whole runs: quickstart, own images": "faults image_folder latent_runs main",
}
ROOM = {name: room for room, names in ROOMS.items() for name in names.split()}


def room(test: str) -> str:
    """The room of a test's id, as in tests/contracts/test_mesh.py::test_x[y]."""
    return ROOM[Path(test.partition("::")[0]).stem.removeprefix("test_")]


def read(path: str) -> tuple[dict[str, collections.Counter], dict]:
    """({room: sums over its tests}, what was noted of the whole run)."""
    rooms, whole = {name: collections.Counter() for name in [*ROOMS, "all"]}, {}
    for line in Path(path).read_text().splitlines():
        costs = json.loads(line)
        if "test" not in costs:
            whole = costs
            continue
        for sums in (rooms[room(costs["test"])], rooms["all"]):
            sums["tests"] += 1
            for key in ("wall_s", "cpu_s", "compiles", "compile_s"):
                sums[key] += costs[key]
            sums["slow_s"] += costs["slow"] * costs["wall_s"]
    return rooms, whole


def table(rooms: dict, whole: dict, before: dict | None = None) -> str:
    """Markdown; `before` is another run's rooms."""
    names = ["room", "tests", "seconds", "of them slow", "CPU-seconds"]
    names += ["programs compiled", "seconds of compiling"]
    lines = [names + ["CPU-seconds before"] * bool(before)]
    lines.append(["---", *["---:"] * (len(lines[0]) - 1)])
    for name, sums in rooms.items():
        keys = ("tests", "wall_s", "slow_s", "cpu_s", "compiles", "compile_s")
        cells = [name, *(f"{sums[key]:,.0f}" for key in keys)]
        lines.append(cells + ([f"{before[name]['cpu_s']:,.0f}"] if before else []))
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    seconds = "unfinished"
    if whole:
        seconds = f"**{whole['session_s']:,.0f} s** by {whole['workers']} workers"
    return f"{text}\n\nThe whole run: {seconds}.\n"


def main(path: str, earlier: str | None = None) -> None:
    found = table(*read(path), before=read(earlier)[0] if earlier else None)
    PAGE.write_text(TABLE.sub(lambda match: f"{match[1]}{found}{match[2]}", PAGE.read_text()))
    print(found, end="")


if __name__ == "__main__":
    main(*sys.argv[1:])
