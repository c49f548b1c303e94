"""The mesh, and where arrays live on it.

One mesh with three axes serves every machine, from a laptop to a pod:

    data    replicas: each holds all parameters and a share of the batch
    fsdp    replicas that also share out parameters, optimizer moments and averages; the batch is split over it too
    tensor  splits inside a layer, by explicit rules

Placement is decided here, by path and shape, never inside a module. So it covers whatever is shaped like a parameter: moments,
averages, teachers.
"""

import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dlc_jax.errors import UserError
from dlc_jax.typing import Tree

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))  # the leading axis of every batch


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """The mesh of all devices; one size may be -1 and is inferred.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(free) > 1 or any(size == 0 or size < -1 for size in sizes.values()):
        raise UserError(f"mesh: sizes {sizes} need at most one -1 and otherwise positive numbers")
    if free and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    if int(np.prod(list(sizes.values()))) != len(devices):
        raise UserError(f"mesh: sizes {sizes} do not multiply to the {len(devices)} devices here; set config.mesh.data=-1")
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def shares(mesh: Mesh) -> int:
    """The number of shares that a batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(batch: int, mesh: Mesh, *, accumulate: int, where: str) -> None:
    """Refuses a global batch that does not split evenly over the mesh and the microbatches."""
    parts = shares(mesh) * accumulate
    if batch < 1 or batch % parts:
        raise UserError(
            f"{where}.batch={batch} does not divide by {parts} (mesh data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']} "
            f"x accumulate {accumulate}); the nearest that does is {max(1, round(batch / parts)) * parts}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_shardings(spec: Tree, mesh: Mesh) -> Tree:
    return jax.tree.map(lambda _: NamedSharding(mesh, BATCH), spec)


def shardings(shapes: Tree, mesh: Mesh, *, rules: tuple[tuple[str, P], ...] = (), smallest: int = 2**14) -> Tree:
    """A sharding for every array of a tree, by path and shape.

    The largest dimension that `fsdp` divides is split over it; arrays of fewer than `smallest` entries are replicated.

    Args:
      shapes: tree of arrays or jax.ShapeDtypeStruct.
      rules: (regular expression over the path, spec) overrides, the first match wins; each must match something.

    Raises:
      ValueError: a rule matches no array: a misspelt one would silently replicate.
    """
    unused = {pattern for pattern, _ in rules}
    size = mesh.shape["fsdp"]

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, spec in rules:
            if re.search(pattern, name):
                unused.discard(pattern)
                return NamedSharding(mesh, spec)
        shape = leaf.shape
        divisible = [axis for axis, length in enumerate(shape) if length % size == 0]
        if size == 1 or np.prod(shape, dtype=np.int64) < smallest or not divisible:
            return NamedSharding(mesh, P())
        largest = max(divisible, key=lambda axis: shape[axis])
        return NamedSharding(mesh, P(*(None,) * largest, "fsdp"))

    placed = jax.tree_util.tree_map_with_path(place, shapes)
    if unused:
        raise ValueError(f"sharding rules that match no array: {sorted(unused)}")
    return placed


def abstract(shapes: Tree, placed: Tree) -> Tree:
    """Shapes with shardings: what a restore and an ahead-of-time compilation need."""
    return jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, placed)


def to_global(batch: Tree, mesh: Mesh) -> Tree:
    """Host-local numpy arrays to global arrays split over the batch axes; each process gives its own share."""
    where = NamedSharding(mesh, BATCH)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(where, leaf), batch)


def constrain(x: jax.Array, spec: P = BATCH) -> jax.Array:
    """Pins the placement of an activation at a block's entry; without a mesh in context it does nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec)
