"""What `dlc plan` prints of an estimate."""

import textwrap
from collections.abc import Sequence

import jax
import numpy as np

from dlc_jax.plan.estimate import Estimate, bytes_here
from dlc_jax.plan.machine import Machine

GIB = 2**30
WIDTH = 130  # columns


def paragraph(found: Estimate, machine: Machine) -> str:
    """An estimate in some lines."""
    chips = "" if machine.chips == found.devices else f" ({machine.chips} chips)"
    mesh = " x ".join(f"{axis} {size}" for axis, size in found.mesh.items())
    each = found.batch / (found.mesh["data"] * found.mesh["fsdp"])
    lines = [
        f"{found.step}, {found.program}, on {found.topology}: {found.devices} devices{chips}, mesh {mesh}, batch {found.batch}, {each:g} a share",
        f"  memory    {verdict(found)}",
    ]
    if found.memory:
        parts = {
            "arguments": found.memory.arguments,
            "temporaries": found.memory.temporaries,
            "code": found.memory.code,
        }
        new = found.memory.outputs - found.memory.aliased
        shown = ", ".join(
            f"{name} {size(amount)}" for name, amount in (parts | {"new outputs": new}).items()
        )
        lines.append(f"            {shown}; state {size(found.state)}, donated")
    if machine.hbm_note:
        lines.append(f"            {machine.hbm_note}")
    if found.advice:
        lines.append(f"  change    {found.advice}")
    lines += textwrap.wrap(
        moves(found), WIDTH, initial_indent="  moves     ", subsequent_indent=" " * 12
    )
    lines.append(f"  computes  {found.flops / 1e12:.3g} TFLOP a device, of the model alone")
    if found.seconds:
        rate = found.batch / found.seconds
        lines.append(
            f"  takes     about {duration(found.seconds)}: {rate:,.{0 if rate >= 100 else 2}f} examples/s, {found.utilization:.0%} of peak"
        )
        lines += textwrap.wrap(
            f"from {found.how}", WIDTH, initial_indent=" " * 12, subsequent_indent=" " * 12
        )
    lines.append(
        f"  compiled  in {found.lower_seconds:.1f} + {found.compile_seconds:.1f} s, lowered and compiled; "
        f"{found.host_bytes / GIB:.1f} GiB of host memory at most"
    )
    return "\n".join(lines)


def verdict(found: Estimate) -> str:
    wanted, available = size(found.wanted), size(found.available)
    if found.fits:
        return f"fits: {wanted} of {available} a device"
    return f"does not fit: {wanted} of {available} a device, {size(found.wanted - found.available)} too much"


def moves(found: Estimate) -> str:
    """Collectives of a call, by kind."""
    if found.collectives is None:
        return "unknown: this jaxlib cannot read the program that this compiler made"
    return (
        ", ".join(
            f"{kind} {each.count} x, {size(each.bytes)}" for kind, each in found.collectives.items()
        )
        or "nothing"
    )


def shardings(state: object) -> str:
    """Every array of an abstract state: path, shape, type, placement, bytes on one device."""
    rows = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rows.append(
            (
                name,
                "x".join(map(str, leaf.shape)) or "-",
                str(leaf.dtype),
                placed(leaf.sharding.spec),
                size(bytes_here(leaf)),
            )
        )
    total = size(sum(bytes_here(leaf) for leaf in jax.tree.leaves(state)))
    return table(
        ("array", "shape", "type", "placement", "a device"), [*rows, ("in all", "", "", "", total)]
    )


def placed(spec: Sequence) -> str:
    return (
        " ".join(
            "." if axis is None else axis if isinstance(axis, str) else "+".join(axis)
            for axis in spec
        )
        or "whole"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need, numbers and all to the left."""
    widths = np.max([[len(cell) for cell in row] for row in (head, *rows)], axis=0)
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
        for row in (head, *rows)
    )


def size(count: int) -> str:
    for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count} B"


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
