"""What becomes of a run whose checkpoints were harmed: python tests/soak/faults.py [WORD...]

Every fault is put into a copy of a small complete run, whose own command then has to go on: notice
it in a line that names the file or the step, go back to the newest good step, and end with the same
results and the same arrays, bit for bit; or refuse with exit code 2 and change nothing. Prints a
table; exits with 1 if anything else happened. Words choose the faults whose name has one of them.
Minutes on two cores; no part of CI, but for what tests/test_faults.py takes of it.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import commands  # noqa: E402

STEPS, EVERY, NEWEST = 6, 2, 6  # checkpoints of steps 2, 4 and 6
FIELDS = {
    "*.model*.width": 32,
    "*.model*.depth": 1,
    "*.model*.heads": 2,
    "*.prototypes": 64,
    "*.hidden": 32,
    "*.bottleneck": 16,
    "log.tensorboard": False,
    "encoder.monitor.count": 0,
    "encoder.train.batch": 64,
    "encoder.train.keep": 3,
    "encoder.train.log_every": EVERY,
    "encoder.train.save_every": EVERY,
    "encoder.train.steps": STEPS,
    "encoder.train.validate_batches": 1,
    "encoder.train.validate_every": EVERY,
}
COMPILED = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def command(workdir, **fields):
    """What `subprocess.run` takes for the small run in a workdir."""
    given = [f"--config.{name}={value}" for name, value in (FIELDS | fields).items()]
    return commands.train(workdir, *given, recipe="configs/quickstart.py:tiny,encoder")


def saves(workdir):
    return workdir / "encoder" / "checkpoints"


def incomplete(base, workdir):
    """A copy of a complete run that has forgotten that it is complete."""
    shutil.copytree(base, workdir)
    (workdir / "encoder" / "done.json").unlink()
    return saves(workdir)


def outcome(workdir):
    """Results but for clocks and the commit, and the hash of every array of the last step."""
    results = json.loads((workdir / "results.json").read_text())
    others = ("seconds/", "peak_memory_gb", "commit")
    numbers = {name: value for name, value in results.items() if not name.startswith(others)}
    return numbers | arrays_of(saves(workdir) / str(NEWEST))


def arrays_of(step):
    import jax
    import numpy as np

    from dlc_jax.checkpoint import arrays

    shapes = arrays.read_meta(step)["arrays"]
    targets = {name: jax.ShapeDtypeStruct(*facts) for name, facts in shapes.items()}
    found = arrays.read(step / "state", targets)
    return {
        name: hashlib.sha256(np.asarray(array).tobytes()).hexdigest()
        for name, array in found.items()
    }


def listing(directory):
    paths = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


# ---- faults: what is done to the checkpoints, and what has to be said of it


@dataclasses.dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
      name: of the table.
      harm: (checkpoints) -> None.
      said: texts that stderr must have.
      code: of the command that meets it.
    """

    name: str
    harm: Callable[[pathlib.Path], None]
    said: tuple[str, ...]
    code: int = 0


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def largest(step):
    return max((path for path in step.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)


def flips(base):
    """A flipped byte in every file of the newest step in turn, and in its seal."""
    step = saves(base) / str(NEWEST)
    names = [path.relative_to(step).as_posix() for path in step.rglob("*") if path.is_file()]
    for name in sorted(names):
        # a step that lacks no file, so the line names the file whose bytes differ
        yield Fault(
            f"flip {name}", lambda saves, name=name: flip(saves / "6" / name), (name, "/6 ")
        )
    yield Fault("flip the seal", lambda saves: flip(saves / "6.sha256.json"), ("/6 skipped",))


def empty(saves):
    shutil.rmtree(saves / "6")
    (saves / "6").mkdir()


def drop_some(saves):
    for path in sorted((saves / "6").rglob("*"))[::2]:
        if path.is_file():
            path.unlink()


def copied(saves, source, number):
    """A step under another number, with its seal."""
    shutil.copytree(source / "6", saves / str(number), dirs_exist_ok=True)
    shutil.copy(source / "6.sha256.json", saves / f"{number}.sha256.json")


def replaced(saves, source):
    shutil.rmtree(saves / "6")
    copied(saves, source, 6)


def newer(saves):
    from dlc_jax.checkpoint import seal

    path = saves / "6" / "meta" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    seal.seal(saves, 6)


def all_flipped(saves):
    for step in ("2", "4", "6"):
        flip(largest(saves / step))


def two_and_a_fake(saves):
    flip(largest(saves / "6"))
    os.truncate(largest(saves / "4"), 100)
    (saves / "9").mkdir()


def shapes(other_model):
    """Faults of whole steps; `other_model` has the checkpoints of a run of another model."""
    yield Fault("truncated file", lambda s: os.truncate(largest(s / "6"), 100), ("bytes and not",))
    yield Fault("emptied file", lambda s: os.truncate(largest(s / "6"), 0), ("has 0 bytes",))
    yield Fault("emptied step", empty, ("/6 skipped: it is empty",))
    yield Fault("item deleted", lambda s: shutil.rmtree(s / "6" / "state"), ("state is missing",))
    yield Fault("half of the files deleted", drop_some, ("is missing",))
    yield Fault("seal deleted", lambda s: (s / "6.sha256.json").unlink(), ("it has no seal",))
    yield Fault("torn seal", lambda s: os.truncate(s / "6.sha256.json", 60), ("cannot be read",))
    yield Fault("empty step 9", lambda s: (s / "9").mkdir(), ("/9 skipped: it is empty",))
    yield Fault("step 9 without a seal", lambda s: shutil.copytree(s / "6", s / "9"), ("no seal",))
    yield Fault("step 6 copied as 9", lambda s: copied(s, s, 9), ("its seal is of step 6",))
    yield Fault(
        "6 flipped, 4 truncated, 9 empty",
        two_and_a_fake,
        ("/9 skipped: it is empty", "/6 skipped: state/", "/4 skipped: state/", "from /"),
    )
    yield Fault(
        "another model's step 6",
        lambda s: replaced(s, other_model),
        ("is of another model or data", "model.backbone.width"),
        2,
    )
    yield Fault("every step flipped", all_flipped, ("is good", "nothing was changed"), 2)
    yield Fault("a newer version's step", newer, ("newer version", "format 99"), 2)


def met(fault, base, workdir):
    """(what the run did in words, whether it is as expected) of a fault in a copy of `base`."""
    harmed = incomplete(base, workdir)
    fault.harm(harmed)
    before = listing(harmed)
    done = subprocess.run(**command(workdir), timeout=300)
    missing = [text for text in fault.said if text not in done.stderr]
    if done.returncode != fault.code or missing:
        return f"exit {done.returncode}, not said: {missing}: {done.stderr[-1000:]}", False
    if fault.code:
        kept, last = listing(harmed) == before, done.stderr.splitlines()[-1]
        good = kept and all(text in last for text in fault.said)
        return "refused in a line, nothing changed" if good else f"kept {kept}: {last}", good
    same = outcome(workdir) == outcome(base)
    gone = set(before.values()) - set(listing(harmed).values())
    if gone and not (harmed / "6.damaged").exists():
        return "files are gone", False
    return "noticed, same results and arrays" if same else "OTHER RESULTS", same


# ---- faults of the machine


def interrupted(base, workdir):
    """A copy of `base` that has to go on from step 2."""
    harmed = incomplete(base, workdir)
    for step in ("4", "6"):
        shutil.rmtree(harmed / step)
        (harmed / f"{step}.sha256.json").unlink()
    return harmed


def storage(base, workdir, said, limit, mode=0o755):
    """A save that the system refuses: a line, and the same command goes on where it may."""
    harmed = interrupted(base, workdir)
    harmed.chmod(mode)
    before, usual = listing(harmed), command(workdir)
    code = f"import ctypes, os, resource, sys; {limit}; os.execv(sys.argv[1], sys.argv[1:])"
    limited = [sys.executable, "-c", code, *usual["args"]]
    done = subprocess.run(**usual | {"args": limited}, timeout=300)
    harmed.chmod(0o755)
    line = "dlc_jax: the checkpoint of step 4 could not be written under "
    if done.returncode != 2 or line not in done.stderr or said not in done.stderr:
        return f"exit {done.returncode}: {done.stderr[-1000:]}", False
    if any(listing(harmed).get(name) != data for name, data in before.items()):
        return "the checkpoint before it was changed", False
    again = subprocess.run(**usual, timeout=300)
    same = again.returncode == 0 and outcome(workdir) == outcome(base)
    return "a line, then same results and arrays" if same else again.stderr[-1000:], same


def full(base, workdir):
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))"
    return storage(base, workdir, "File too large", limit)


def read_only(base, workdir):
    """Root may write everywhere, so the run loses that right; others have none to lose."""
    limit = "ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)"  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE
    return storage(base, workdir, "Permission denied", limit, 0o555)


def two_runs(base, workdir):
    interrupted(base, workdir)
    first = subprocess.Popen(**command(workdir))
    while not (workdir / ".lock").is_file() or not (workdir / ".lock").read_text():
        time.sleep(0.02)
    second = subprocess.run(**command(workdir), timeout=300)
    _, error = first.communicate(timeout=300)
    refused = second.returncode == 2 and f"is in use by process {first.pid}" in second.stderr
    same = first.returncode == 0 and outcome(workdir) == outcome(base)
    said = "second refused in a line, first unharmed"
    return (said, True) if refused and same else (f"{second.stderr[-500:]}{error[-500:]}", False)


MACHINE = {"disk full": full, "read-only": read_only, "two runs on one workdir": two_runs}


def complete(workdir, **fields):
    """Makes the small run."""
    done = subprocess.run(**command(workdir, **fields), timeout=600)
    assert done.returncode == 0, done.stderr
    return workdir


def main(words):
    folder = pathlib.Path(tempfile.mkdtemp(prefix="dlc_jax_faults_"))
    os.environ |= COMPILED | {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    try:
        base = complete(folder / "base")
        other = saves(complete(folder / "other", **{"encoder.model.backbone.width": 48}))
        runs = {
            fault.name: lambda workdir, fault=fault: met(fault, base, workdir)
            for fault in (*flips(base), *shapes(other))
        }
        runs |= {name: lambda workdir, run=run: run(base, workdir) for name, run in MACHINE.items()}
        chosen = [name for name in runs if not words or any(word in name for word in words)]
        print("| fault | what the run did | seconds | |\n|---|---|---|---|", flush=True)
        bad = 0
        for number, name in enumerate(chosen):
            started = time.monotonic()
            said, good = runs[name](folder / str(number) / "run")
            bad += not good
            seconds = time.monotonic() - started
            mark = "as expected" if good else "WRONG"
            print(f"| {name} | {said} | {seconds:.1f} | {mark} |", flush=True)
            shutil.rmtree(folder / str(number), ignore_errors=True)
        print(f"\n{len(chosen)} faults, {bad} not as expected")
        return 1 if bad else 0
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
