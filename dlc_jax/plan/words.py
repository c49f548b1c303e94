"""What `dlc plan` prints of an estimate."""

import textwrap
from collections.abc import Sequence

import jax
import numpy as np

from dlc_jax.memory import size
from dlc_jax.plan.estimate import Estimate, bytes_here
from dlc_jax.plan.machine import Machine

WIDTH, INDENT = 100, " " * 12


def paragraph(found: Estimate, machine: Machine) -> str:
    """An estimate in some lines."""
    chips = "" if machine.chips == found.devices else f" ({machine.chips} chips)"
    mesh = " x ".join(f"{axis} {size}" for axis, size in found.mesh.items())
    share = found.batch / (found.mesh["data"] * found.mesh["fsdp"])
    head = f"{found.step}, {found.program}, on {found.topology}: {found.devices} devices{chips}"
    lines = [f"{head}, mesh {mesh}", *_item("batch", f"{found.batch}, {share:g} a share")]
    lines += _item("memory", verdict(found))
    if memory := found.memory:
        parts = {
            "arguments": memory.arguments,
            "temporaries": memory.temporaries,
            "code": memory.code,
            "new outputs": memory.outputs - memory.aliased,
        }
        shown = ", ".join(f"{name} {size(amount)}" for name, amount in parts.items())
        lines += _item("", f"{shown}; state {size(found.state)}, donated")
    if machine.hbm_note:
        lines += _item("", machine.hbm_note)
    if found.advice:
        lines += _item("change", found.advice)
    lines += _item("moves", moves(found))
    lines += _item("computes", f"{found.flops / 1e12:.3g} TFLOP a device, counting the model alone")
    if found.seconds:
        rate = found.batch / found.seconds
        rate = f"{rate:,.{0 if rate >= 100 else 2}f} examples/s, {found.utilization:.0%} of peak"
        lines += _item("takes", f"about {duration(found.seconds)}: {rate}")
        lines += _item("", f"from {found.how}")
    lowered, compiled = found.lower_seconds, found.compile_seconds
    took = f"lowered in {lowered:.1f} s, then compiled in {compiled:.1f} s"
    lines += _item("compiler", f"{took}; peak host memory {size(found.host_bytes)}")
    return "\n".join(lines)


def _item(name: str, sentence: str) -> list[str]:
    return textwrap.wrap(
        sentence,
        WIDTH,
        initial_indent=f"  {name:<10}",
        subsequent_indent=INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )


def verdict(found: Estimate) -> str:
    """Whether it fits, with the numbers."""
    compared = f"{size(found.wanted)} of {size(found.available)} a device"
    if found.fits:
        return f"fits: {compared}"
    return f"does not fit: {compared}, {size(found.wanted - found.available)} too much"


def moves(found: Estimate) -> str:
    """Collectives of a call, by kind."""
    if found.collectives is None:
        return "unknown: this jaxlib cannot read the program that this compiler made"
    kinds = [
        f"{kind} {each.count} x, {size(each.bytes)}" for kind, each in found.collectives.items()
    ]
    return "; ".join(kinds) or "nothing"


def shardings(state: object) -> str:
    """Every array of an abstract state: path, shape, type, placement, bytes on one device."""
    rows = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        shape = "x".join(map(str, leaf.shape)) or "-"
        row = (name, shape, str(leaf.dtype), placement(leaf.sharding.spec), size(bytes_here(leaf)))
        rows.append(row)
    total = size(sum(bytes_here(leaf) for leaf in jax.tree.leaves(state)))
    head = ("array", "shape", "type", "placement", "a device")
    return table(head, [*rows, ("in all", "", "", "", total)])


def placement(spec: Sequence) -> str:
    """The mesh axes that split each dimension, "." for none; "whole" for an array not split."""
    names = [axis if isinstance(axis, str) else "+".join(axis or ".") for axis in spec]
    return " ".join(names) or "whole"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be, all to the left."""
    widths = np.max([[len(cell) for cell in row] for row in (head, *rows)], axis=0)
    lines = ((cell.ljust(width) for cell, width in zip(row, widths)) for row in (head, *rows))
    return "\n".join("  ".join(line).rstrip() for line in lines)


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
