"""The codes job at scale, in one process and in two, and what three kills cost.

    ./launch/local.sh python benchmarks/codes.py [--images 100000] [--workdir DIR]

An encoder of the quickstart's size, trained for a few steps, encodes generated 16-pixel images on
CPUs: in one process, in two, and in two that are killed three times (both, the first alone, the
second alone). Then `dlc codes verify` runs, and all shards and manifests are compared. Prints
markdown tables and exits with 1 if a byte differs. What is in DIR is used again: the encoder, and
the measurements of complete runs. The batch per device is the same everywhere: bytes depend on it.
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
    """One process that makes `steps` in `workdir`, on one CPU device; its output goes to `log`."""
    command = [sys.executable, "-m", "dlc_jax.main", "--config=configs/quickstart.py"]
    command += [f"--workdir={workdir}", *TRAINING, f"--config.steps={steps}"]
    command += [f"--config.data.count={images}", f"--config.codes.batch={BATCH * count}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    if count > 1:
        environment["JAX_COORDINATOR_ADDRESS"] = address
        environment |= {"JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(index)}
    with open(log(workdir, index), "wb") as out:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)


def log(workdir, index):
    """The file of a process's output, beside the workdir."""
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
            output = log(workdir, index).read_text()[-2000:]
            sys.exit(f"process {index} ended with {process.returncode}:\n{output}")


def shards(workdir, ending="arrayrecord"):
    """{name: inode} of the complete shards, or with "tmp" of those being written.

    A shard that is made again has another inode.
    """
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
    """Two processes, killed in turn and restarted: what each kill did, and what it cost in all."""
    shutil.rmtree(workdir, ignore_errors=True)
    shutil.copytree(workdir.with_name("encoder"), workdir)
    began, before, rows, kept = time.monotonic(), cpu(), [], {}
    for number, victims in enumerate(KILLS, start=1):
        processes = together(workdir, images, 2)
        enough = max(len(kept) + 1, number * total // (len(KILLS) + 1))
        while len(shards(workdir)) < enough and running(processes):
            time.sleep(0.02)
        time.sleep(0.3)  # into the next shards
        if not running(processes):
            output = log(workdir, 0).read_text()[-2000:]
            sys.exit(f"too late to kill: more --images are needed\n{output}")
        for index in victims:
            os.kill(processes[index].pid, signal.SIGKILL)
        at, complete = time.monotonic(), len(shards(workdir))
        for process in processes:
            process.wait()
        waited, now = time.monotonic() - at, shards(workdir)
        again = sum(name in now and now[name] != inode for name, inode in kept.items())
        kept = now
        other = "" if len(victims) == 2 else end(processes, 1 - victims[0], workdir, waited)
        cut = len(shards(workdir, "tmp"))
        rows.append([" and ".join(map(str, victims)), complete, len(now), cut, again, other])
    processes = together(workdir, images, 2)
    finish(processes, workdir)
    now = shards(workdir)
    remade = sum(now[name] != inode for name, inode in kept.items())
    results = json.loads((workdir / "results.json").read_text())
    spent = {"seconds": time.monotonic() - began, "cpu": cpu() - before}
    return rows, remade, spent | {"memory": results["peak_memory_gb"]}


def running(processes):
    return all(process.poll() is None for process in processes)


def end(processes, survivor, workdir, waited):
    """How the process that was not killed ended, in words."""
    lines = log(workdir, survivor).read_text().splitlines()
    ours = [line for line in lines if line.startswith("dlc_jax: ")]
    jax = [line for line in lines if "Terminating process" in line]
    jax = [line.partition("] ")[2].partition(". ")[0] for line in jax]
    words, code = (ours or jax or ["nothing"])[-1], processes[survivor].returncode
    return f'process {survivor}: after {waited:.1f} s, exit code {code}, "{words}"'


def digests(workdir):
    """{name: SHA-256} of what is in a store: shards and manifest."""
    paths = (workdir / "codes" / "train").iterdir()
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def dlc(*arguments):
    command = [sys.executable, "-m", "dlc_jax.cli", *arguments]
    return subprocess.check_output(command, cwd=ROOT, text=True)


def table(head, rows):
    for row in [head, ["---"] * len(head), *rows]:
        print("| " + " | ".join(map(str, row)) + " |")
    print(flush=True)


def main(images, directory):
    encoder = directory / "encoder"
    finish([start(encoder, images, ("encoder",))], encoder)
    one, two = measured(directory / "one", images, 1), measured(directory / "two", images, 2)
    total = len(shards(directory / "one"))
    manifest = directory / "one" / "codes" / "train" / "manifest.json"
    size = json.loads(manifest.read_text())["shard_size"]
    rows, remade, thrice = killed(directory / "killed", images, total)
    runs = (("1 process", one), ("2 processes", two), ("2 processes, killed three times", thrice))
    print(f"{images:,} images of 16 pixels, {total} shards of {size:,}, {BATCH} images a device.\n")
    head = ["run", "images/s", "seconds", "CPU seconds", "peak memory of a process, GB"]
    cells = []
    for name, run in runs:
        pace = f"{run['pace']:,.0f}" if "pace" in run else ""
        seconds = (f"{run['seconds']:.0f}", f"{run['cpu']:.0f}")
        cells.append([name, pace, *seconds, f"{run['memory']:.2f}"])
    table(head, cells)
    head = ["killed", "shards complete then", "… when all had ended", "cut short: made again"]
    head += ["images encoded twice, at most", "how the other ended"]
    table(head, [[*row[:4], f"{row[3] * size:,}", row[5]] for row in rows])
    print(f"Complete shards that were made again: {sum(row[4] for row in rows) + remade}.\n")
    printed = "".join(dlc("codes", what, str(directory / "killed")) for what in ("verify", "info"))
    print("```\n" + printed.replace(f"{directory}/", "") + "```\n")
    of_one = digests(directory / "one")
    equal = {name: digests(directory / name) == of_one for name in ("two", "killed")}
    for name, same in equal.items():
        compared = "the bytes of" if same else "OTHER BYTES THAN"
        files = f"{len(of_one) - 1} shards and the manifest of `{name}`"
        print(f"{files}: {compared} one process's.")
    return 0 if all(equal.values()) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    where = "where everything is written (default: a temporary folder)"
    parser.add_argument("--workdir", type=pathlib.Path, help=where)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = (given.workdir or pathlib.Path(temporary)).absolute()
        place.mkdir(parents=True, exist_ok=True)
        sys.exit(main(given.images, place))
