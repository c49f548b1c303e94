"""Arrays and JSON of one step: flat dicts by dotted name, read through Orbax, compared in words."""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from dlc_jax.errors import UserError
from dlc_jax.typing import Tree

FORMAT = 1  # of a checkpoint, in its meta; absent means 1. Raise it when older code would misread.


def flat(tree: Tree) -> dict[str, Any]:
    """Leaves by dotted name: the format need not know optax's namedtuples, None and empty dicts."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two arrays of the state have the same dotted name; rename one")
    return named


def unflat(like: Tree, named: Mapping[str, Any]) -> Tree:
    return jax.tree.unflatten(jax.tree.structure(like), [named[name] for name in flat(like)])


def part(named: Mapping[str, Any], collection: str) -> dict[str, Any]:
    prefix = f"{collection}."
    return {
        name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)
    }


def read(path: Path, targets: Mapping[str, Any]) -> dict[str, Any]:
    """The named arrays, placed and typed as the targets say.

    The caller has compared the names, so `partial_restore` hides nothing.
    """
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted, empty = {}, {}
    for name, leaf in targets.items():
        where = getattr(leaf, "sharding", None) or here
        if leaf.size:
            wanted[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
        else:  # not on disk: Orbax refuses arrays of no entries
            empty[name] = jnp.zeros(leaf.shape, leaf.dtype, device=where)
    if not wanted:
        return empty
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        how = ocp.checkpoint_utils.construct_restore_args(wanted)
        return empty | reader.restore(
            path, args=ocp.args.PyTreeRestore(item=wanted, restore_args=how, partial_restore=True)
        )


def read_json(path: Path) -> dict:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(path, args=ocp.args.JsonRestore())


def read_meta(path: Path) -> dict:
    """The meta of the step in `path`, read without Orbax, so by one process alone too.

    Raises:
      UserError: a newer version saved it.
    """
    meta = json.loads((path / "meta" / "metadata").read_text())
    if meta.get("format", FORMAT) > FORMAT:
        raise UserError(
            f"{path} was saved by a newer version of dlc_jax (checkpoint format {meta['format']}; "
            f"this version reads up to {FORMAT}); update dlc_jax, or use another --workdir"
        )
    return meta


def metrics_of(path: Path) -> dict[str, float | None]:
    """What was measured at the step in `path`; {} if nothing was, or if it cannot be read."""
    try:
        return dict(read_meta(path).get("metrics", {}))
    except (OSError, ValueError, TypeError, AttributeError, UserError):
        return {}


def shapes(named: Mapping[str, Any]) -> dict[str, list]:
    """What `mismatch` compares, as JSON."""
    return {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in named.items()}


def mismatch(saved: Mapping[str, list], targets: Mapping[str, Any], *, dtypes: bool) -> list[str]:
    """One line for each array that is absent, of another shape or, if `dtypes`, another dtype."""
    lines = []
    for name in sorted(saved.keys() | targets.keys()):
        if name not in targets:
            lines.append(f"{name} has no place here")
        elif name not in saved:
            lines.append(f"{name} is not in the checkpoint")
        else:
            (shape, dtype), leaf = saved[name], targets[name]
            if tuple(shape) != tuple(leaf.shape):
                lines.append(f"{name} is {tuple(shape)} and not {tuple(leaf.shape)}")
            elif dtypes and dtype != str(leaf.dtype):
                lines.append(f"{name} is {dtype} and not {leaf.dtype}")
    return lines


def changes(old: Any, new: Any, name: str = "") -> list[str]:
    """The fields that differ between two nested dicts, as "dotted.name: old -> new"."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [
            (f"{name}.{key}".strip("."), old.get(key, "absent"), new.get(key, "absent"))
            for key in sorted(old | new)
        ]
        return [line for field, before, after in pairs for line in changes(before, after, field)]
    return [] if old == new else [f"{name}: {json.dumps(old)} -> {json.dumps(new)}"]


def listed(lines: Sequence[str], most: int = 10) -> str:
    return "; ".join(lines[:most]) + (
        f"; and {len(lines) - most} more" if len(lines) > most else ""
    )


def plain(value: Any) -> Any:
    """As it comes back from JSON: tuples are lists, numpy numbers are numbers, paths are text."""

    def default(other):
        return (
            other.item()
            if hasattr(other, "item")
            else dict(other)
            if isinstance(other, Mapping)
            else str(other)
        )

    return json.loads(json.dumps(value, default=default))


def pack(state: Any) -> dict:
    """An iterator's state, bytes or JSON, as JSON."""
    return (
        {"bytes": base64.b64encode(state).decode()}
        if isinstance(state, bytes)
        else {"json": plain(state)}
    )


def unpack(packed: Mapping[str, Any]) -> Any:
    return base64.b64decode(packed["bytes"]) if "bytes" in packed else packed["json"]
