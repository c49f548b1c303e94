"""The codes job at scale: images/s of one and of two processes, and what three kills cost; every byte compared: python benchmarks/codes.py

    ./launch/local.sh python benchmarks/codes.py [--images 100000] [--workdir DIR]

An encoder of the quickstart's size, trained for a few steps (codes of an untrained one would do as
well), codes generated 16-pixel images on CPUs: by one process, by two, and by two that are killed
three times: both, the first alone, the second alone. Then `dlc codes verify`, and all shards and
manifests are compared. Prints markdown tables and exits with 1 if a byte differs. What is in DIR is
used again: the encoder, and a run that is complete says what it measured. The same batch per device
everywhere: bytes depend on it.
"""

import argparse
import contextlib
import hashlib
import json
import os
import pathlib
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
BATCH = 128  # of a device
KILLS = ((0, 1), (0,), (1,))  # which processes, in turn
TRAINING = (
    "--config.encoder.train.steps=4",
    "--config.encoder.train.batch=64",
    "--config.encoder.train.validate_batches=1",
    "--config.encoder.monitor.every=0",
    "--config.codes.splits=('train',)",
)


def start(workdir, images, steps, *, index=0, count=1, address=""):
    """One process of the command that makes `steps` in `workdir`, on one CPU device; what it says goes to a file beside the workdir."""
    command = [
        sys.executable,
        "-m",
        "dlc_jax.main",
        "--config=configs/quickstart.py",
        f"--workdir={workdir}",
        *TRAINING,
    ]
    command += [
        f"--config.steps={steps}",
        f"--config.data.count={images}",
        f"--config.codes.batch={BATCH * count}",
    ]
    several = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
    }
    environment = (
        os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""} | (several if count > 1 else {})
    )
    with open(said(workdir, index), "wb") as file:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )


def said(workdir, index):
    return workdir.with_name(f"{workdir.name}.{index}.log")


def together(workdir, images, count):
    """The processes of a codes step."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    steps = ("encoder", "codes")
    return [
        start(workdir, images, steps, index=index, count=count, address=address)
        for index in range(count)
    ]


def finish(processes, workdir):
    for index, process in enumerate(processes):
        if process.wait():
            sys.exit(
                f"process {index} ended with {process.returncode}:\n{said(workdir, index).read_text()[-2000:]}"
            )


def shards(workdir, ending="arrayrecord"):
    """{name: inode} of the shards that are complete, or with "tmp" of those being written; a shard made again has another inode."""
    found = {}
    for path in (workdir / "codes" / "train").glob(f"*.{ending}"):
        with contextlib.suppress(FileNotFoundError):  # renamed just now
            found[path.name] = path.stat().st_ino
    return found


def measured(workdir, images, count):
    """Runs a step without a stop: seconds by the clock, CPU seconds, and the job's results."""
    note = workdir.with_name(f"{workdir.name}.json")
    if not note.exists():
        shutil.rmtree(workdir, ignore_errors=True)
        shutil.copytree(workdir.with_name("encoder"), workdir)
        began, before = time.monotonic(), cpu()
        finish(together(workdir, images, count), workdir)
        results = json.loads((workdir / "results.json").read_text())
        found = {"seconds": time.monotonic() - began, "cpu": cpu() - before}
        found |= {"pace": results["codes/images_per_s"], "memory": results["peak_memory_gb"]}
        note.write_text(json.dumps(found))
    return json.loads(note.read_text())


def cpu():
    """Seconds that the processes which have ended had of the processors."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def killed(workdir, images, total):
    """Two processes, killed in turn and started again; what each kill did, and how long it all took."""
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.copytree(workdir.with_name("encoder"), workdir)
    began, before, rows, kept = time.monotonic(), cpu(), [], {}
    for number, victims in enumerate(KILLS, start=1):
        processes = together(workdir, images, 2)
        enough = max(len(kept) + 1, number * total // (len(KILLS) + 1))
        while len(shards(workdir)) < enough and all(
            process.poll() is None for process in processes
        ):
            time.sleep(0.02)
        time.sleep(0.3)  # into the next shards
        if any(process.poll() is not None for process in processes):
            sys.exit(
                f"too late to kill: more --images are needed\n{said(workdir, 0).read_text()[-2000:]}"
            )
        for index in victims:
            os.kill(processes[index].pid, signal.SIGKILL)
        at, complete = time.monotonic(), len(shards(workdir))
        for process in processes:
            process.wait()
        waited, now = time.monotonic() - at, shards(workdir)
        again = sum(name in now and now[name] != inode for name, inode in kept.items())
        kept = now
        rows.append(
            [
                " and ".join(map(str, victims)),
                complete,
                len(now),
                len(shards(workdir, "tmp")),
                again,
            ]
        )
        rows[-1].append(
            "" if len(victims) == 2 else end(processes, 1 - victims[0], workdir, waited)
        )
    processes = together(workdir, images, 2)
    finish(processes, workdir)
    now = shards(workdir)
    remade = sum(now[name] != inode for name, inode in kept.items())
    results = json.loads((workdir / "results.json").read_text())
    return (
        rows,
        remade,
        {
            "seconds": time.monotonic() - began,
            "cpu": cpu() - before,
            "memory": results["peak_memory_gb"],
        },
    )


def end(processes, survivor, workdir, waited):
    """How the process that was not killed ended, in words."""
    lines = said(workdir, survivor).read_text().splitlines()
    ours = [line for line in lines if line.startswith("dlc_jax: ")]
    jaxs = [
        line.partition("] ")[2].partition(". ")[0]
        for line in lines
        if "Terminating process" in line
    ]
    words = (ours or jaxs or ["nothing"])[-1]
    return f'process {survivor}: after {waited:.1f} s, exit code {processes[survivor].returncode}, "{words}"'


def digests(workdir):
    """{name: SHA-256} of what is in a store: shards and manifest."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (workdir / "codes" / "train").iterdir()
    }


def dlc(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "dlc_jax.cli", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def table(head, rows):
    print(
        "\n".join(
            "| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows]
        ),
        end="\n\n",
        flush=True,
    )


def main(images, directory):
    encoder = directory / "encoder"
    finish([start(encoder, images, ("encoder",))], encoder)
    one, two = (
        measured(directory / name, images, count) for name, count in (("one", 1), ("two", 2))
    )
    total = len(shards(directory / "one"))
    size = json.loads((directory / "one" / "codes" / "train" / "manifest.json").read_text())[
        "shard_size"
    ]
    rows, remade, thrice = killed(directory / "killed", images, total)
    runs = (("1 process", one), ("2 processes", two), ("2 processes, killed three times", thrice))
    print(f"{images:,} images of 16 pixels, {total} shards of {size:,}, {BATCH} images a device.\n")
    table(
        ["run", "images/s", "seconds", "CPU seconds", "peak memory of a process, GB"],
        [
            [
                name,
                f"{run['pace']:,.0f}" if "pace" in run else "",
                f"{run['seconds']:.0f}",
                f"{run['cpu']:.0f}",
                f"{run['memory']:.2f}",
            ]
            for name, run in runs
        ],
    )
    head = [
        "killed",
        "shards complete then",
        "… when all had ended",
        "cut short: made again",
        "images coded twice, at most",
    ]
    table(
        [*head, "how the other ended"], [[*row[:4], f"{row[3] * size:,}", row[5]] for row in rows]
    )
    print(f"Complete shards that were made again: {sum(row[4] for row in rows) + remade}.\n")
    told = dlc("codes", "verify", str(directory / "killed")) + dlc(
        "codes", "info", str(directory / "killed")
    )
    print("```\n" + told.replace(f"{directory}/", "") + "```\n")
    of_one = digests(directory / "one")
    equal = {name: digests(directory / name) == of_one for name in ("two", "killed")}
    for name, same in equal.items():
        print(
            f"{len(of_one) - 1} shards and the manifest of `{name}`: {'the bytes of' if same else 'OTHER BYTES THAN'} one process's."
        )
    return 0 if all(equal.values()) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument(
        "--workdir",
        type=pathlib.Path,
        help="where everything is written (default: a temporary folder)",
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = (given.workdir or pathlib.Path(temporary)).absolute()
        place.mkdir(parents=True, exist_ok=True)
        sys.exit(main(given.images, place))
