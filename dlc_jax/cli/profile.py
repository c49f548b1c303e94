"""dlc profile W: a few training steps under the profiler: a trace, and where the time goes.

The step is the one that `main` would run, from the newest good checkpoint. Nothing is saved: the
run stays as it is.
"""

import collections
import contextlib
import gzip
import json
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from dlc_jax import memory, recipe
from dlc_jax.cli import networks
from dlc_jax.errors import UserError

EXAMPLE = "dlc profile runs/quickstart --step generator --steps 5"
SHOWN = 20  # lines of a table
# by platform: within a CUDA graph no kernel would tell its operation
OPTIONS = {"gpu": {"xla_gpu_enable_command_buffer": ""}}
# Names that jax gives to its own machinery, between those of modules and scopes.
_MACHINERY = re.compile(
    r"while|body|cond|closed_call|checkpoint|rematted_computation|branch_\d+_fun|shard_map"
    r"|.*[().<>;].*"
)


def arguments(parser) -> None:
    add = parser.add_argument
    add("workdir", metavar="W", help="folder of a run")
    add("--step", metavar="NAME", help="a trained step of its recipe; by default the last")
    add("--steps", type=networks.whole, default=5, metavar="N", help="training steps; 5")
    add("--out", metavar="DIR", help="where the trace is written; W/profile by default")


def run(arguments, rest) -> None:
    """Trains for a few steps under the profiler, and prints what they spent their time on.

    Raises:
      UserError: no run, no such step, one that trains nothing or whose records are not there.
    """
    workdir = Path(arguments.workdir)
    config = recipe.of_run(workdir)
    memory.reserve()
    from dlc_jax import parallel
    from dlc_jax.stage import Stage
    from dlc_jax.stages import STAGES

    steps = [arguments.step] if arguments.step else config.steps
    if unknown := [name for name in steps if name not in config.steps]:
        raise UserError(f"{unknown[0]!r} is not a step of {workdir}: {', '.join(config.steps)}")
    made = {name: STAGES[config[name].stage](config, step=name, workdir=workdir) for name in steps}
    trained = [name for name, step in made.items() if isinstance(step, Stage)]
    if not trained:
        raise UserError(f"{', '.join(steps)}: nothing is trained there; name another --step")
    name, mesh = trained[-1], parallel.make_mesh(**config.mesh)
    out = Path(arguments.out) if arguments.out else workdir / "profile"
    found = traced(made[name], workdir / name / "checkpoints", out, mesh, arguments.steps)
    print(
        f"{name} of {workdir}, from step {found.first}: {found.seconds * 1e3:.1f} ms a step, "
        f"{found.waited * 1e3:.1f} of them waiting for data\n"
    )
    operations = spent(json.loads(gzip.open(found.trace).read()))
    total = sum(each.microseconds for each in operations.values())
    if not total:
        raise UserError(f"{found.trace}: the profiler recorded no operation of the device")
    parts: collections.Counter = collections.Counter()
    calls: collections.Counter = collections.Counter()
    for operation, each in operations.items():
        part = part_of(found.scopes.get(operation, ""))
        parts[part] += each.microseconds
        calls[part] += each.count
    rows = [(*part, spent, calls[part]) for part, spent in parts.most_common(SHOWN)]
    print(table(("pass", "part"), rows, total, arguments.steps) + "\n")
    largest = sorted(operations, key=lambda name: -operations[name].microseconds)[:SHOWN]
    rows = [
        (name, " ".join(part_of(found.scopes.get(name, ""))), *operations[name]) for name in largest
    ]
    print(table(("operation", "part"), rows, total, arguments.steps) + "\n")
    print(f"{found.trace}: open it at ui.perfetto.dev; its folder in TensorBoard or XProf")


class Traced(NamedTuple):
    """Steps that ran under the profiler.

    Attributes:
      trace: the file of events.
      scopes: {operation of the compiled step: jax's name of what it is for}.
      first: step from which they went on.
      seconds: of a step.
      waited: of these, for its batch.
    """

    trace: Path
    scopes: Mapping[str, str]
    first: int
    seconds: float
    waited: float


def traced(stage, checkpoints: Path, out: Path, mesh, steps: int) -> Traced:
    """Compiles the step, warms it up, and runs it `steps` times under the profiler."""
    import jax

    from dlc_jax import parallel, train

    batch = stage.plan.batch
    parallel.check_batch(batch, mesh, accumulate=stage.plan.accumulate, where="train")
    with jax.set_mesh(mesh), contextlib.ExitStack() as closing:
        iterator = stage.batches("train", parallel.rows(mesh, batch))
        if hasattr(iterator, "close"):
            closing.callback(iterator.close)
        compiled = train.lower(stage, mesh).compile(
            compiler_options=OPTIONS.get(jax.default_backend())
        )
        frozen = stage.load_frozen(mesh)
        root = parallel.spread(jax.random.key(0), parallel.replicated(mesh))
        state, first = _state(stage, train.abstract_state(stage, mesh), checkpoints)
        waited = 0.0

        def one(state):
            nonlocal waited
            begun = time.perf_counter()
            records = next(iterator)
            waited += time.perf_counter() - begun
            return compiled(state, parallel.to_global(records, mesh, batch), frozen, root)

        for _ in range(2):
            state, metrics = one(state)
        jax.block_until_ready(metrics)
        options, waited = jax.profiler.ProfileOptions(), 0.0
        options.python_tracer_level = 0
        begun, before = time.perf_counter(), set(out.rglob("*.trace.json.gz"))
        with jax.profiler.trace(str(out), profiler_options=options):
            for number in range(steps):
                with jax.profiler.StepTraceAnnotation("train", step_num=number):
                    state, metrics = one(state)
            jax.block_until_ready(metrics)
            seconds = time.perf_counter() - begun
    trace = max(set(out.rglob("*.trace.json.gz")) - before, key=lambda path: path.stat().st_mtime)
    scopes = _scopes(compiled)
    return Traced(trace, scopes, first, seconds / steps, waited / steps)


def _state(stage, abstract, checkpoints: Path):
    """(state, step) of the newest good checkpoint, which is only read; else a fresh one."""
    import jax
    import jax.numpy as jnp

    from dlc_jax.checkpoint import Checkpoints, load_params
    from dlc_jax.step import TrainState, make_init

    placements = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    step = Checkpoints(checkpoints).latest()
    if step is None:
        init = jax.jit(make_init(stage), out_shardings=placements)
        return init(jax.random.key(0)), 0
    counters = jnp.asarray(step, jnp.int32), jnp.zeros((2,), jnp.int32)
    counters = jax.device_put(counters, (placements.step, placements.skipped))
    parts = {name: getattr(abstract, name) for name in ("params", "opt_state", "ema", "extra")}
    for name, part in parts.items():
        if jax.tree.leaves(part):
            parts[name] = load_params(checkpoints, part, collection=name, step=step)
    return TrainState(step=counters[0], skipped=counters[1], **parts), step


def _scopes(compiled) -> dict[str, str]:
    """{instruction: its op_name} of a compiled program; {} where its text cannot be read."""
    from dlc_jax.plan import program

    line = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*?op_name="([^"]*)"', re.MULTILINE)
    return dict(line.findall(program.text(compiled) or ""))


class Spent(NamedTuple):
    """Microseconds of an operation's own, over all threads and streams, and how often it ran."""

    microseconds: float
    count: int


def spent(trace: Mapping) -> dict[str, Spent]:
    """{operation: Spent} of a trace of the profiler, in the format of Chrome's trace events.

    An operation's own time leaves out that of operations within it, such as a loop's body. Of a GPU
    what ran outside XLA's operations counts under its kernel's name.
    """
    events, threads, devices = collections.defaultdict(list), {}, set()
    for event in trace["traceEvents"]:
        place = event.get("pid"), event.get("tid")
        if event.get("name") == "thread_name":
            threads[place] = event["args"]["name"]
        elif event.get("name") == "process_name" and event["args"]["name"].startswith("/device:"):
            devices.add(event["pid"])
        elif event.get("ph") == "X":
            events[place].append(event)
    microseconds: collections.Counter = collections.Counter()
    count: collections.Counter = collections.Counter()
    for place, row in events.items():
        whole = place[0] in devices and re.match("Stream|XLA Ops", threads.get(place, ""))
        for name, own in _own(row, whole):
            microseconds[name] += own
            count[name] += 1
    return {name: Spent(microseconds[name], count[name]) for name in microseconds}


def _own(row: list, whole) -> Iterator[tuple[str, float]]:
    """(operation, its own microseconds) of the events of one thread; all of them, if `whole`."""
    named = [(event.get("args", {}).get("hlo_op"), event) for event in row]
    named = [(name or event["name"], event) for name, event in named if name or whole]
    named.sort(key=lambda pair: (pair[1]["ts"], -pair[1]["dur"]))
    around: list[list] = []  # [name, end, own] of those that are not over yet
    for name, event in named:
        while around and around[-1][1] <= event["ts"]:
            yield around[-1][0], around.pop()[2]
        if around:
            around[-1][2] -= event["dur"]
        around.append([name, event["ts"] + event["dur"], event["dur"]])
    for name, _, own in around:
        yield name, own


def part_of(scope: str) -> tuple[str, str]:
    """(pass, part of the network) of jax's name of an operation.

    A pass is "forward", "recomputed", "backward", or "no gradient": teachers, optimizer, average.
    "(loop)" is what a loop over layers does of its own: it slices their parameters and stacks what
    is kept.
    """
    parts = scope.split("/")
    names = [part for part in parts[:-1] if not _MACHINERY.fullmatch(part)]
    found = "/".join(names) or ("(loop)" if "while" in parts else "(other)")
    if "rematted_computation" in parts:
        return "recomputed", found
    if "transpose(" in scope:
        return "backward", found
    return ("forward" if "jvp(" in scope else "no gradient"), found


def table(head: tuple[str, str], rows: list, total: float, steps: int) -> str:
    """Rows of (word, words, microseconds, times) over `steps` steps, in columns."""
    cells = [(*head, "ms a step", "share", "times")]
    for first, second, microseconds, count in rows:
        numbers = f"{microseconds / 1e3 / steps:.2f}", f"{microseconds / total:.1%}"
        cells.append((first, second, *numbers, f"{count / steps:.0f}"))
    widths = [max(len(row[column]) for row in cells) for column in range(5)]
    lines = [
        "  ".join(
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)
