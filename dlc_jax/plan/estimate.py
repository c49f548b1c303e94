"""A program of a recipe's step, compiled for a machine that is not here: does it fit, what does it move, how long may it take?

What is compiled is what runs: `train.lower` for a stage, a job's own `programs`. Nothing is read
from disk and nothing is run.
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
from dlc_jax.plan import program
from dlc_jax.plan.machine import Machine
from dlc_jax.stage import Program, Stage
from dlc_jax.stages import STAGES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """What was found. Bytes, FLOPs and collectives are of one device and one call of the program.

    Attributes:
      step, program: of the recipe: "generator", "train"; "samples", "decode".
      topology: the machine's name; devices: its number of them.
      mesh: {axis: size}.
      batch: examples of a call, all devices together.
      fits: the compiler accepted it, and it needs no more than `available`.
      available: device memory for programs.
      wanted: memory that it needs at its peak; None where the compiler failed without a number.
      memory: its parts, or None if it was refused.
      state: bytes of parameters, moments and averages, from the shardings alone.
      collectives: by kind, or None where the program's text cannot be read.
      flops: of the model; what the compiler computes again is not in it.
      seconds, how: static estimate of a call, and where it comes from; None if it was refused.
      utilization: model FLOPs over what the device could do in that time.
      lower_seconds, compile_seconds: on this host; host_bytes: its largest memory so far.
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
    """What can be compiled of a recipe's section `step`: "train" of a stage, or a job's own; {} for a job without any.

    Raises:
      UserError: the recipe has no such step.
    """
    if step not in config or config[step].stage not in STAGES:
        raise UserError(f"the recipe has no step {step!r}; it has {', '.join(config.steps)}")
    made = STAGES[config[step].stage](config, step=step, workdir=Path("unused"))
    if isinstance(made, Stage):
        state = functools.partial(train.abstract_state, made)
        return {
            "train": Program(
                lower=functools.partial(train.lower, made),
                state=state,
                flops=made.flops,
                batch=made.plan.batch,
            )
        }
    return dict(made.programs)


def check(config, *, step: str, name: str, machine: Machine) -> None:
    """Refuses, before anything is compiled, what the mesh cannot divide.

    Raises:
      UserError: the mesh does not fit the number of devices, or the batch the mesh.
    """
    mesh = parallel.make_mesh(**config.mesh, devices=machine.devices)
    where, accumulate = (
        (f"{step}.train", config[step].train.accumulate) if name == "train" else (step, 1)
    )
    parallel.check_batch(
        programs(config, step)[name].batch, mesh, accumulate=accumulate, where=where
    )


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
        refused = program.out_of_memory(error)
        if refused is None:
            said = " ".join(str(error).split())[:300]
            raise UserError(
                f"{step}, {name}: the compiler of {machine.name} refuses this program ({said}); try another mesh or batch"
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
    accumulate = config[step].train.accumulate if name == "train" else 1
    return (
        found
        if found.fits
        else dataclasses.replace(found, advice=advice(found, accumulate=accumulate))
    )


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
        if spread < devices:
            least = math.ceil(found.state * spread / (found.available // 2))
            size = next(
                (size for size in range(least, devices + 1) if devices % size == 0), devices
            )
            return f"its state alone is {found.state / 2**30:.1f} GiB a device: share it out, --config.mesh.data=-1 --config.mesh.fsdp={size}"
        return f"its state alone is {found.state / 2**30:.1f} GiB a device, shared out over all of them: take more devices"
    if found.program != "train":
        return f"{section}.batch={max(devices, found.batch // 2)} halves what a call holds"
    needed = math.ceil((found.wanted - found.state) / room)
    micro = found.batch // (found.mesh["data"] * found.mesh["fsdp"])
    parts = next(
        (parts for parts in range(needed * accumulate, micro + 1) if micro % parts == 0), None
    )
    if parts:
        return (
            f"{section}.train.accumulate={parts}, or {section}.model.remat=full; --search compares"
        )
    return f"{section}.model.remat=full, or more devices for the same batch; --search compares"
