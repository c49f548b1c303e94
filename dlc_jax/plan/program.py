"""What a compiled program needs: memory, collectives, a static estimate of its time.

Collectives come as instructions, as -start/-done pairs, inside fusions that run them beside other
work, on the SparseCore, and between TPU slices as transfers through the hosts. Each is counted
once, where it starts.
"""

import collections
import dataclasses
import re

import numpy as np

from dlc_jax.plan import hlo

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """The collectives of one kind in a step.

    Attributes:
      count: how many times one device takes part, loops counted by their trips.
      bytes: size on one device of the whole array, before a scatter or after a gather, summed over
        `count`. A ring sends about this much from every device; for an all-reduce twice as much.
    """

    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    `peak` is what must be free: arguments + outputs - aliased + temporaries + code.
    """

    arguments: int
    temporaries: int
    outputs: int
    aliased: int
    code: int
    peak: int


def text(compiled) -> str | None:
    """The optimized HLO; None where this jaxlib cannot read the compiler's (some of libtpu's)."""
    import jax

    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:
        # RET_CHECK in the parser: the two were built at different times
        return None


def memory(compiled) -> Memory:
    """What the compiled program holds on one device.

    For a TPU its peak is below Machine.hbm_bytes; otherwise the compiler would have refused.
    """
    found = compiled.memory_analysis()
    parts = {
        "arguments": found.argument_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "outputs": found.output_size_in_bytes,
        "aliased": found.alias_size_in_bytes,
        "code": found.generated_code_size_in_bytes,
    }
    return Memory(**parts, peak=sum(parts.values()) - 2 * parts["aliased"])


def collectives(text: str | None) -> dict[str, Collective] | None:
    """{kind: Collective} for each of KINDS that occurs; None without a text.

    "<kind> between slices" is what the hosts' network carries. A loop whose trips cannot be read
    counts once; of a conditional every branch counts.
    """
    if text is None:
        return None
    count, size = collections.Counter(), collections.Counter()
    for weight, kind, once, _ in _collectives(hlo.parse(text)):
        count[kind] += weight
        size[kind] += weight * once
    return {kind: Collective(count=count[kind], bytes=size[kind]) for kind in sorted(count)}


def cycles(text: str | None) -> int | None:
    """The compiler's static estimate of a step's cycles on one device; None where there is none.

    Only TPU compilers give it. Loops count by their trips. Left out: collectives, waiting for
    memory, the inside of Pallas kernels, the SparseCore.
    """
    if text is None:
        return None
    total = 0
    for computation, weight, fused in hlo.walk(hlo.parse(text)):
        if not fused and not computation.aside:
            total += weight * sum(
                int(found)
                for found in re.findall(r'"estimated_cycles":"(\d{1,12})"', computation.text)
            )
    return total or None


KERNEL = 3  # times what its matrix products take at peak: a guess, on the slow side


def kernel_cycles(text: str | None, machine) -> float:
    """Cycles inside of the Pallas kernels of a TPU's program, from the FLOPs that they name.

    These are to be of the matrix unit, padded as it pads them.
    """
    flops = 0.0
    for computation, weight, fused in hlo.walk(hlo.parse(text or "")):
        for each in () if fused else computation.instructions.values():
            if 'custom_call_target="tpu_custom_call"' in each.line:
                named = re.search(r'"cost_estimate":\{"flops":"(\d{1,18})"', each.line)
                flops += weight * float(named.group(1) if named else 0)
    return KERNEL * flops / (machine.flops / machine.clock) if flops else 0.0


def _collectives(module: hlo.Module):
    """(times, kind, bytes each time, the instruction's line) for every collective, at its start."""
    for computation, weight, _ in hlo.walk(module):
        starts = {
            each.operands[0]
            for each in computation.instructions.values()
            if 'custom_call_target="AsyncCollectiveStart"' in each.line
        }
        for name, found in computation.instructions.items():
            kind = found.opcode.removesuffix("-start")
            if found.opcode == "send" and "xla_megascale" in found.line:
                transfer = re.search(r'transfer_type="(\w+)"', found.line)
                kind = transfer.group(1).lower().replace("_", "-") if transfer else "transfer"
                kind += " between slices"
            elif kind not in KINDS or (
                '"async_collective_fusion_config"' in found.line and name not in starts
            ):
                continue  # a step or the end of a collective that began in another fusion
            operands = (computation.instructions.get(operand) for operand in found.operands)
            size = sum(hlo.size(operand.shape) for operand in operands if operand)
            if kind == "all-gather":
                size = hlo.size(found.shape) - (size if found.opcode.endswith("-start") else 0)
            elif kind == "all-reduce" and computation.name.startswith("all-reduce-scatter"):
                # a TPU's form of it: each device keeps its slice of the sum
                kind = "reduce-scatter"
            yield weight, kind, size, found.line


# The share of its peak that a device reaches where the compiler gives no cycles, and the words.
EFFICIENCY = 0.4
_GUESS = (
    "model FLOPs at 40 % of peak, half of what a large bf16 matmul reaches on an H200 "
    "(788 of 989 TFLOP/s, measured)"
)
# The compiler's estimate of plain bf16 matmuls, from 4096^3 to (8192, 1024, 4096), as a share of
# peak; libtpu 0.0.42.
_MATMULS = {"v4": "87-97", "v5e": "88-98", "v5p": "90-98", "v6e": "49-87", "tpu7x": "78-95"}


def seconds(machine, *, flops: float, text: str | None, order=None) -> tuple[float, str]:
    """A static estimate of a step's time, and in a sentence where it comes from.

    Computing takes the compiler's cycles, or else the FLOPs at EFFICIENCY, and is never faster than
    peak. Moving the collectives' bytes at the data sheet's rates is added, without overlap. Good
    for comparing programs for one kind of machine; no device was asked.

    Args:
      machine: dlc_jax.plan.machine.Machine.
      flops: what the model does on one device in a step.
      text: the program's, see `text`; without one the collectives are left out.
      order: the devices in the mesh's order, mesh.devices.ravel(); by default that of
        machine.devices.
    """
    peak = flops / machine.flops
    estimated = cycles(text)
    if estimated and machine.clock:
        inside = kernel_cycles(text, machine)
        computing = max((estimated + inside) / machine.clock, peak)
        how = (
            f"the compiler's {estimated / 1e6:.1f} M cycles at {machine.clock / 1e9:g} GHz, "
            f"by which plain bf16 matmuls reach {_MATMULS[machine.kind]} % of peak"
        )
        if '"tpu_custom_call"' in text:
            how += (
                f", and {inside / 1e6:.1f} M inside of Pallas kernels, which are taken for "
                f"{KERNEL} times as long as their matrix products"
            )
    else:
        computing, how = peak / EFFICIENCY, _GUESS
    if text is None:
        how += "; collectives left out, because the program's text cannot be read; nothing was run"
        return computing, how
    devices = machine.devices if order is None else order
    hosts = np.array([device.process_index for device in devices])
    moving = sum(
        times * _transfer(machine, hosts, *each) for times, *each in _collectives(hlo.parse(text))
    )
    how += f", plus {moving * 1e3:.1f} ms of collectives at the data sheet's rates, not overlapped"
    return computing + moving, f"{how}; nothing was run"


def _transfer(machine, hosts: np.ndarray, kind: str, size: int, line: str) -> float:
    """Seconds of one collective as a ring; an all-reduce goes round twice: reduce, then gather."""
    rounds = 2 if kind.startswith("all-reduce") else 1
    rate = machine.network if kind.endswith(" between slices") else machine.interconnect
    has_hosts = machine.platform == "gpu" and machine.slices > 1
    if has_hosts and (members := _members(line, len(hosts))) is not None:
        _, shares = np.unique(hosts[members], return_counts=True)
        if len(shares) > 1:  # a ring leaves a host by the networks of all its members there
            rate = min(rate, machine.network * int(shares.max()))
    return rounds * size / rate


def _members(line: str, devices: int) -> np.ndarray | None:
    """The devices of a collective's first group, in the mesh's order; None for an unknown form."""
    if pair := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line):
        return np.array([int(each) for each in pair.groups()])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return np.array([int(each) for each in listed.group(1).split(",")])
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, sides, order = iota.groups()
        return _count_up(sides, order).reshape(_integers(shape))[0]
    ids = r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    if mesh := re.search(rf"replica_groups=mesh\[([^\]]+)\]{ids} \{{([^}}]*)\}}", line):
        axes, sides, order, along = mesh.groups()
        axes = dict(re.findall(r"'(\w+)'=(\d+)", axes))
        along = re.findall(r"'(\w+)'", along)
        ids = _count_up(sides or str(devices), order).reshape([int(side) for side in axes.values()])
        return ids[tuple(slice(None) if axis in along else 0 for axis in axes)].ravel()
    return np.arange(devices) if "replica_groups={}" in line else None


def _integers(text):
    return [int(each) for each in text.split(",")]


def _count_up(sides, order):
    counted = np.arange(np.prod(_integers(sides), dtype=int)).reshape(_integers(sides))
    return counted.transpose(_integers(order)) if order else counted
