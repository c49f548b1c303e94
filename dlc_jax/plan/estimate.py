"""A recipe's program, compiled for a machine that is not here: memory, communication and time.

What is compiled is what would run: `train.lower` for a stage, a job's own `programs`. Nothing is
read from disk and nothing is run.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Mapping
from pathlib import Path

import jax

from dlc_jax import metrics, parallel, train
from dlc_jax.errors import UserError
from dlc_jax.memory import refusal
from dlc_jax.plan import program
from dlc_jax.plan.machine import Machine
from dlc_jax.stage import Program, Stage
from dlc_jax.stages import STAGES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """What was found. Bytes, FLOPs and collectives are of one device and one call of the program.

    Attributes:
      step, program: of the recipe: "generator", "train"; "samples", "decode".
      topology: the machine's name.
      devices: how many the machine has.
      mesh: {axis: size}.
      batch: examples of a call, all devices together.
      fits: the compiler accepted it, and it needs no more than `available`.
      available: device memory for programs.
      wanted: memory that the program needs at its peak; None where the compiler named no number.
      memory: its parts, or None if it was refused.
      state: bytes of parameters, moments and averages, from the shardings alone.
      collectives: by kind, or None where the program's text cannot be read.
      flops: of the model, without what remat computes again.
      seconds, how: static estimate of a call, and where it comes from; None if it was refused.
      utilization: model FLOPs over what the device could do in that time.
      lower_seconds, compile_seconds: on this host.
      host_bytes: the largest memory of this process so far.
      advice: what to change where it does not fit.
    """

    step: str
    program: str
    topology: str
    devices: int
    mesh: Mapping[str, int]
    batch: int
    fits: bool
    available: int
    wanted: int | None
    memory: program.Memory | None
    state: int
    collectives: Mapping[str, program.Collective] | None
    flops: float
    seconds: float | None
    how: str
    utilization: float | None
    lower_seconds: float
    compile_seconds: float
    host_bytes: int
    advice: str


def programs(config, step: str) -> dict[str, Program]:
    """What can be compiled of a recipe's section `step`: "train" of a stage, or a job's own.

    Raises:
      UserError: the recipe has no such step.
    """
    if step not in config or config[step].stage not in STAGES:
        raise UserError(f"the recipe has no step {step!r}; it has {', '.join(config.steps)}")
    stage = STAGES[config[step].stage](config, step=step, workdir=Path("unused"))
    if not isinstance(stage, Stage):
        return dict(stage.programs)
    training = Program(
        lower=functools.partial(train.lower, stage),
        state=functools.partial(train.abstract_state, stage),
        flops=stage.flops,
        batch=stage.plan.batch,
    )
    return {"train": training}


def check(config, *, step: str, name: str, machine: Machine) -> None:
    """Refuses, before anything is compiled, what the mesh cannot divide.

    Raises:
      UserError: the mesh does not fit the number of devices, or the batch the mesh.
    """
    mesh = parallel.make_mesh(**config.mesh, devices=machine.devices)
    where = f"{step}.train" if name == "train" else step
    batch = programs(config, step)[name].batch
    parallel.check_batch(batch, mesh, accumulate=_accumulate(config, step, name), where=where)


def _accumulate(config, step: str, name: str) -> int:
    return config[step].train.accumulate if name == "train" else 1


def estimate(config, *, step: str, name: str, machine: Machine) -> Estimate:
    """Compiles the program `name` of a recipe's section `step` for a machine.

    Raises:
      UserError: the compiler refuses for another reason than device memory; see also `check`.
    """
    made = programs(config, step)[name]
    mesh = parallel.make_mesh(**config.mesh, devices=machine.devices)
    start = time.monotonic()
    lowered = made.lower(mesh)
    lowered_at = time.monotonic()
    memory = refused = text = None
    try:
        compiled = lowered.compile(compiler_options=machine.compiler_options or None)
    except jax.errors.JaxRuntimeError as error:
        refused = refusal(error)
        if refused is None:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"{step}, {name}: the compiler of {machine.name} refuses this program ({reason}); "
                "try another mesh or batch"
            ) from error
    compiled_at = time.monotonic()
    flops = made.flops / len(machine.devices)
    seconds, how = None, "refused by the compiler"
    if refused is None:
        memory, text = program.memory(compiled), program.text(compiled)
        seconds, how = program.seconds(machine, flops=flops, text=text, order=mesh.devices.ravel())
    wanted = memory.peak if memory else refused.wanted
    available = min(machine.hbm_bytes, refused.available) if refused else machine.hbm_bytes
    found = Estimate(
        step=step,
        program=name,
        topology=machine.name,
        devices=len(machine.devices),
        mesh=dict(mesh.shape),
        batch=made.batch,
        fits=refused is None and wanted <= available,
        available=available,
        wanted=wanted,
        memory=memory,
        state=sum(bytes_here(leaf) for leaf in jax.tree.leaves(made.state(mesh))),
        collectives=program.collectives(text),
        flops=flops,
        seconds=seconds,
        how=how,
        utilization=flops / (seconds * machine.flops) if seconds else None,
        lower_seconds=lowered_at - start,
        compile_seconds=compiled_at - lowered_at,
        host_bytes=int(metrics.peak_memory_gb() * 1e9),
        advice="",
    )
    if found.fits:
        return found
    change = advice(found, accumulate=_accumulate(config, step, name))
    return dataclasses.replace(found, advice=change)


def bytes_here(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of an array on one device; of a key, its data."""
    size = 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * size


def advice(found: Estimate, *, accumulate: int) -> str:
    """What to change so that a program fits, in a sentence."""
    section, devices = f"--config.{found.step}", found.devices
    room = found.available - found.state
    spread = found.mesh["fsdp"] * found.mesh["tensor"]
    if room <= 0 or found.state > found.available // 2:
        alone = f"its state alone is {found.state / 2**30:.1f} GiB a device"
        if spread >= devices:
            return f"{alone}, shared out over all of them: take more devices"
        least = math.ceil(found.state * spread / (found.available // 2))
        size = next((size for size in range(least, devices + 1) if devices % size == 0), devices)
        return f"{alone}: share it out, --config.mesh.data=-1 --config.mesh.fsdp={size}"
    if found.program != "train":
        return f"{section}.batch={max(devices, found.batch // 2)} halves what a call holds"
    needed = math.ceil((found.wanted - found.state) / room)
    micro = found.batch // (found.mesh["data"] * found.mesh["fsdp"])
    parts = [part for part in range(needed * accumulate, micro + 1) if micro % part == 0]
    remat = f"'{section}.model*.remat=full'"  # of the network or of its backbone
    if parts:
        return f"{section}.train.accumulate={parts[0]}, or {remat}; --search compares"
    return f"{remat}, or more devices for the same batch; --search compares"
