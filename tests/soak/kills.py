"""What becomes of runs that are killed: python tests/soak/kills.py --mode=MODE [--kills=N].

Modes, each on the recipe configs/quickstart.py:tiny, one device a process:

    one      SIGKILL at N random moments spread over all steps, the same command after each
    two      the same for one of two processes, drawn at random; the other has to end by itself
    term     SIGTERM in six situations, each for a lone process and for one of two
    elastic  the encoder on 2, then 4, then 1 processes, stopped by SIGTERM in between

The finished result has to equal that of an uninterrupted run with as many processes bit for bit:
results, logged metrics, codes, pictures and the arrays of the newest checkpoints, but for clocks,
rates and peak memory. Of `elastic` the losses are compared. Prints a table; exits with 1 if
anything else happened. Minutes on two cores for each mode; no part of CI.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "launch")]
import local_multiprocess  # noqa: E402

TINY = ("--config=configs/quickstart.py:tiny",)
STEPS = ("encoder", "codes", "probe", "prior", "generator", "samples")
HEARTBEAT = 20  # seconds within which the others notice a killed process
BOUND = 20  # seconds from SIGTERM to the end of every process
TIMEOUT = 600  # seconds that one start of a command may take
CLOSE = 1e-5  # relative difference of losses
SITUATIONS = ("compiling", "training", "evaluating", "saving", "codes", "samples")
UNLIKE = (
    r"seconds/.*|seconds_per_step|data_wait|.*images_per_s(econd)?|peak_memory_gb|commit"
    r"|goodput|restarts"
)


# ---- within the process: a file says that a situation has come


def hooked(situation, mark, arguments):
    """Runs `dlc_jax.main` with the arguments; `mark` appears once the situation has come."""
    from dlc_jax import main, stop, train
    from dlc_jax.checkpoint import Checkpoints

    calls = 0

    def once(number, pause):
        nonlocal calls
        calls += 1
        if calls == number:
            pathlib.Path(mark).touch()
            time.sleep(pause)

    def before(owner, name, number=1, pause=0.0, only=lambda: True):
        original = getattr(owner, name)

        def wrapped(*given, **named):
            if only():
                once(number, pause)
            return original(*given, **named)

        setattr(owner, name, wrapped)

    compile_step = train.compile_step

    def compiled(*given):
        step, abstract = compile_step(*given)

        class Step:
            def __call__(self, *values):
                once(1 if situation == "compiling" else 4, 0.0)
                return step(*values)

        return Step(), abstract

    if situation in ("compiling", "training"):
        train.compile_step = compiled
    if situation == "evaluating":  # past the two batches of validation: in the monitor
        before(stop, "breathe", 4, 2.0, only=lambda: stop._measuring)
    if situation == "codes":
        before(stop, "breathe", 2, 2.0, only=lambda: not stop._measuring)
    if situation == "saving":  # in the background
        before(Checkpoints, "_finish", 1, 2.0)
    sys.argv = ["dlc_jax.main", *arguments]
    sys.exit(main.main())


# ---- runs


class Job:
    """The processes of one start of the command; what they say is in files beside the workdir.

    Args:
      arguments: of the command, but for the workdir.
      hook: the situation at which `mark` appears, see `hooked`; "" for the command itself.
      environment: what is added to that of every process.
    """

    def __init__(self, workdir, count, arguments=TINY, hook="", **environment):
        self.workdir = workdir
        self.mark = workdir.with_name(f"{workdir.name}.mark")
        self.mark.unlink(missing_ok=True)
        program = [str(pathlib.Path(__file__)), "hooked", hook, str(self.mark)] if hook else []
        program = program or ["-m", "dlc_jax.main"]
        words = [sys.executable, *program, *arguments, f"--workdir={workdir}"]
        usual = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "DLC_HEARTBEAT": str(HEARTBEAT)}
        names = [workdir.with_name(f"{workdir.name}.{index}.err") for index in range(count)]
        self.errors, self.started, self.processes = names, time.monotonic(), []
        variables = local_multiprocess.variables(count, 1, os.environ.get("XLA_FLAGS", ""))
        for name, added in zip(names, variables, strict=True):
            with open(name, "wb") as error:
                self.processes.append(
                    subprocess.Popen(
                        words,
                        cwd=ROOT,
                        env=os.environ | added | usual | environment,
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=error,
                    )
                )

    def wait_for(self, ready):
        """Whether `ready()` came before any process ended and before the time limit."""
        late = self.started + TIMEOUT
        while not ready():
            if self.ended() or time.monotonic() > late:
                return False
            time.sleep(0.02)
        return True

    def begun(self):
        """Whether process 0 holds the workdir, so all have joined."""
        with contextlib.suppress(OSError):
            return f'"pid": {self.processes[0].pid},' in (self.workdir / ".lock").read_text()
        return False

    def reached(self, name):
        """Waits for a step of the recipe, or a later one, to be the current one."""
        later = (*STEPS, "end")[STEPS.index(name) :]
        return self.wait_for(lambda: self.begun() and current(self.workdir) in later)

    def goes_on_for(self, seconds):
        """Whether no process ends meanwhile."""
        end = time.monotonic() + seconds
        return self.wait_for(lambda: time.monotonic() > end)

    def ended(self):
        return any(process.poll() is not None for process in self.processes)

    def codes(self, seconds=TIMEOUT):
        """The exit codes; a process that goes on for longer is killed and None."""
        late, found = time.monotonic() + seconds, []
        for process in self.processes:
            try:
                found.append(process.wait(max(0.01, late - time.monotonic())))
            except subprocess.TimeoutExpired:
                found.append(None)
        self.close()
        return found

    def close(self):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def said(self, index):
        lines = self.errors[index].read_text(errors="replace").splitlines()
        return [line for line in lines if line.startswith("dlc_jax:")]


def finish(workdir, count, arguments=TINY):
    """Runs the command to its end; raises RuntimeError if it does not end well."""
    job = Job(workdir, count, arguments)
    codes = job.codes()
    if any(codes):
        raise RuntimeError(f"exit codes {codes}: {job.errors[0].read_text()[-2000:]}")
    return workdir


def current(workdir):
    return next((name for name in STEPS if not (workdir / name / "done.json").exists()), "end")


# ---- what is compared


def rows(workdir, name):
    """{(step, metric): value} of metrics.jsonl; of what was logged twice both must agree."""
    found = {}
    for line in (workdir / name / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for key, value in row.items():
            if key != "step" and not re.fullmatch(UNLIKE, key):
                if found.setdefault((row["step"], key), value) != value:
                    found[row["step"], key] = "logged with two values"
    return found


def differences(workdir, reference):
    """What differs from the uninterrupted run, in words; and how many values were compared."""
    facts = [outcome(path) for path in (workdir, reference)]
    missing = [f"{name} is missing" for name in facts[1] if name not in facts[0]]
    changed = [name for name in facts[1] if name in facts[0] and facts[0][name] != facts[1][name]]
    return [*missing, *map(str, changed)], len(facts[1])


def outcome(workdir):
    results = json.loads((workdir / "results.json").read_text())
    found = {name: value for name, value in results.items() if not re.fullmatch(UNLIKE, name)}
    for name in STEPS:
        if (workdir / name / "metrics.jsonl").exists():
            found |= {(name, *key): value for key, value in rows(workdir, name).items()}
        for path in sorted((workdir / name).rglob("*")):
            if path.suffix in (".arrayrecord", ".png"):
                found[path.relative_to(workdir).as_posix()] = path.read_bytes()
        saves = [path for path in (workdir / name / "checkpoints").glob("*") if path.name.isdigit()]
        if saves:
            newest = max(saves, key=lambda path: int(path.name))
            found[name, "newest step"] = newest.name
            found |= {(name, key): value for key, value in arrays_of(newest).items()}
    return found


def arrays_of(step):
    import jax
    import numpy as np

    from dlc_jax.checkpoint import arrays

    shapes = arrays.read_meta(step)["arrays"]
    targets = {name: jax.ShapeDtypeStruct(*facts) for name, facts in shapes.items()}
    return {k: np.asarray(v).tobytes() for k, v in arrays.read(step / "state", targets).items()}


class Table:
    def __init__(self, *titles):
        self.bad = self.number = 0
        print(f"| {' | '.join(titles)} | |\n|{'---|' * (len(titles) + 1)}", flush=True)

    def add(self, good, *cells):
        self.bad, self.number = self.bad + (not good), self.number + 1
        print(
            f"| {' | '.join(map(str, cells))} | {'as expected' if good else 'WRONG'} |", flush=True
        )

    def compare(self, workdir, reference):
        differing, count = differences(workdir, reference)
        self.bad += bool(differing)
        said = f"{len(differing)} differ: {differing[:5]}" if differing else "all bit-equal"
        print(f"\n{count} results, metrics, files and arrays compared: {said}", flush=True)


# ---- modes


def spans(reference):
    """{step: seconds} that it lasts once its programs are compiled, rather less than more."""
    results = json.loads((reference / "results.json").read_text())
    found = {name: 0.4 * results[f"seconds/{name}"] for name in STEPS}
    for name in STEPS:
        if (reference / name / "metrics.jsonl").exists():
            lines = (reference / name / "metrics.jsonl").read_text().splitlines()
            logged = [row for row in map(json.loads, lines) if "seconds_per_step" in row]
            paces = sorted(row["seconds_per_step"] for row in logged)
            found[name] = logged[-1]["step"] * paces[len(paces) // 2]
    return found


def killed(count, folder, kills, draw, reference):
    reference = reference or finish(folder / "reference", count)
    lasted = spans(reference)
    said = ", ".join(f"{name} {lasted[name]:.0f} s" for name in STEPS)
    print(f"moments are drawn within: {said}\n", flush=True)
    aims = sorted((STEPS[number % len(STEPS)] for number in range(kills)), key=STEPS.index)
    workdir, hit, longest = folder / "run", [], 0.0
    table = Table("kill", "during", "seconds into it", "killed", "the others")
    for number, aim in enumerate(aims):
        job, moment = Job(workdir, count), draw.uniform(0, lasted[aim])
        come = job.reached(aim) and job.goes_on_for(moment)
        name, victim = current(workdir), draw.randrange(count)
        job.processes[victim].kill()
        at, seconds = time.monotonic(), []
        others = [index for index in range(count) if index != victim]
        for index in others:
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.processes[index].wait(HEARTBEAT)
            seconds.append(time.monotonic() - at)
        codes = job.codes(0.1)
        lines = [job.said(index) for index in others]
        good = come and codes[victim] == -signal.SIGKILL and all(codes[i] == 75 for i in others)
        good = good and all(len(x) == 1 and x[0].startswith("dlc_jax: process ") for x in lines)
        words = [
            f"process {index}: exit {codes[index]} after {spent:.1f} s, {len(line)} line"
            for index, spent, line in zip(others, seconds, lines, strict=True)
        ]
        if not good:
            words += [job.errors[index].read_text()[-600:] for index in range(count)]
        hit, longest = [*hit, name], max([longest, *seconds])
        table.add(
            good, number + 1, name, f"{moment:.1f}", f"process {victim}", "; ".join(words) or "-"
        )
    finish(workdir, count)
    if missed := set(STEPS) - set(hit):
        print(f"\nno kill during {', '.join(sorted(missed))}: WRONG", flush=True)
    table.compare(workdir, reference)
    counts = ", ".join(f"{name} {hit.count(name)}" for name in STEPS)
    print(f"{kills} kills ({counts}); the others ended within {longest:.1f} s", flush=True)
    return table.bad + len(missed)


def come_to(job, situation, draw):
    """Waits for the situation; False if it does not come."""
    if situation == "samples":
        ready = job.reached(situation) and job.goes_on_for(draw.uniform(0.5, 2.5))
        return ready and current(job.workdir) == situation
    ready = job.wait_for(job.mark.exists)
    time.sleep(draw.uniform(0.5, 4.0) if situation == "compiling" else 0.0)
    return ready


def kept(situation, workdir):
    """What is on disk of the encoder after the end: (in words, whether it is as expected)."""
    directory = workdir / "encoder" / "checkpoints"
    steps = sorted(int(p.name.split(".")[0]) for p in directory.glob("*.sha256.json"))
    if situation == "compiling":
        return f"steps {steps}", steps in ([], [0])  # step 0 is saved before the first compiles
    if situation in ("codes", "samples"):
        return "-", True
    meta = json.loads((directory / str(steps[-1]) / "meta" / "metadata").read_text())
    unmeasured = meta.get("unmeasured")
    words = f"step {steps[-1]} saved" + (", unmeasured" if unmeasured else "")
    return words, unmeasured is (situation == "evaluating")


def terminated(folder, draw):
    bad = 0
    for count in (1, 2):
        reference = finish(folder / f"reference_{count}", count)
        workdir, longest = folder / f"run_{count}", 0.0
        print(f"\n{count} process{'es' * (count > 1)}:\n", flush=True)
        table = Table("SIGTERM while", "to", "exit codes", "lines", "seconds", "on disk")
        for situation in SITUATIONS:
            fresh = {"JAX_COMPILATION_CACHE_DIR": str(folder / f"none_{count}")}
            hook = "" if situation == "samples" else situation
            job = Job(workdir, count, hook=hook, **(fresh if situation == "compiling" else {}))
            come, victim = come_to(job, situation, draw), draw.randrange(count)
            job.processes[victim].send_signal(signal.SIGTERM)
            at = time.monotonic()
            codes = job.codes(BOUND)
            seconds = time.monotonic() - at
            longest = max(longest, seconds)
            lines = [job.said(index) for index in range(count)]
            words, saved = kept(situation, workdir) if None not in codes else ("?", False)
            good = come and saved and codes == [75] * count and all(len(x) == 1 for x in lines)
            shown = "; ".join(sorted({line for each in lines for line in each}))
            table.add(good, situation, f"process {victim}", codes, shown, f"{seconds:.1f}", words)
            if not good:
                print(f"come {come}", *(error.read_text()[-1500:] for error in job.errors))
        finish(workdir, count)
        table.compare(workdir, reference)
        print(f"all ended within {longest:.1f} s, {BOUND} s allowed", flush=True)
        bad += table.bad
    return bad


def elastic(folder):
    arguments = (f"{TINY[0]},encoder", "--config.encoder.train.log_every=1")
    reference = finish(folder / "reference", 1, arguments)
    workdir, changes = folder / "run", []
    table = Table("processes", "stopped at step", "exit codes", "seconds")
    for count in (2, 4):
        job = Job(workdir, count, arguments, hook="training")
        come = job.wait_for(job.mark.exists)
        job.processes[-1].send_signal(signal.SIGTERM)
        at = time.monotonic()
        codes = job.codes(3 * BOUND)
        steps = (workdir / "encoder" / "checkpoints").glob("*.sha256.json")
        changes.append(max((int(p.name.split(".")[0]) for p in steps), default=0))
        good = come and codes == [75] * count and 0 < changes[-1] < 24
        table.add(good, count, changes[-1], codes, f"{time.monotonic() - at:.1f}")
        if not good:
            print(job.errors[0].read_text()[-1500:], flush=True)
    finish(workdir, 1, arguments)
    table.add(True, 1, "complete", [0], "-")
    found, wanted = (
        {step: value for (step, key), value in rows(path, "encoder").items() if key == "loss"}
        for path in (workdir, reference)
    )
    table.bad += set(found) != set(wanted) or len(set(changes)) < 2
    apart = {step: abs(found[step] - wanted[step]) / abs(wanted[step]) for step in wanted}
    at_changes = max(apart[step + 1] for step in changes)
    table.bad += at_changes > CLOSE
    print(f"\nlosses of {len(apart)} steps, relative difference to 1 process:")
    print(f"first step after each change {at_changes:.1e}, largest {max(apart.values()):.1e}")
    return table.bad


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--mode", required=True, choices=("one", "two", "term", "elastic"))
    parser.add_argument("--kills", type=int, help="default: 20 of mode one, 8 of mode two")
    parser.add_argument(
        "--reference",
        type=pathlib.Path,
        help="of modes one and two: a complete uninterrupted run (default: it is made)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    given = parser.parse_args()
    folder, started = pathlib.Path(tempfile.mkdtemp(prefix="dlc_jax_kills_")), time.monotonic()
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
    draw = random.Random(given.seed)
    try:
        if given.mode in ("one", "two"):
            count = 1 if given.mode == "one" else 2
            bad = killed(count, folder, given.kills or {1: 20, 2: 8}[count], draw, given.reference)
        else:
            bad = terminated(folder, draw) if given.mode == "term" else elastic(folder)
        print(f"{time.monotonic() - started:.0f} s, {bad} not as expected", flush=True)
        return 1 if bad else 0
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["hooked"]:
        hooked(sys.argv[2], sys.argv[3], sys.argv[4:])
    sys.exit(main())
