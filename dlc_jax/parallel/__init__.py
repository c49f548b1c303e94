"""The mesh, and where arrays live on it.

One mesh with three axes serves every machine, from a laptop to a pod:

    data    replicas: each holds all parameters and a share of the batch
    fsdp    replicas that also share out parameters, optimizer moments and averages; the batch is
            split over it too
    tensor  splits inside a layer, by explicit rules

Placement is decided here, by path and shape, never inside a module. So it covers whatever is shaped
like a parameter: moments, averages, teachers. A layer multiplies by `matmul`, which puts the kernel
together for that product alone, forward and backward, and sums its gradient straight into shares.
"""

import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dlc_jax.errors import UserError
from dlc_jax.parallel.arrays import BATCH, each, everywhere, replicated, rows, spread, to_global
from dlc_jax.parallel.mesh import AXES, few, make_mesh, replicas, unsplit
from dlc_jax.typing import Tree

SMALLEST = 2**16  # entries of the smallest array that is worth splitting
# Parameters of scanned layers: axis 0 counts layers, and is never split.
STACKED = re.compile(r"(^|/)blocks/")

__all__ = [
    "AXES",
    "BATCH",
    "SMALLEST",
    "STACKED",
    "Rules",
    "abstract",
    "batch_shardings",
    "check_batch",
    "constrain",
    "each",
    "everywhere",
    "make_mesh",
    "matmul",
    "placement",
    "replicas",
    "replicated",
    "rows",
    "shardings",
    "shares",
    "spread",
    "to_global",
    "unsplit",
]

# (regular expression over the path, axis of one layer's shape, mesh axis that splits it)
Rules = tuple[tuple[str, int, str], ...]


def shares(mesh: Mesh) -> int:
    """The number of shares that a batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(batch: int, mesh: Mesh, *, accumulate: int, where: str, group: int = 1) -> None:
    """Refuses a global batch that mesh and microbatches do not divide, or that cuts groups.

    One microbatch may have groups that lie across devices: they then ask each other, and nothing
    else changes.

    Raises:
      UserError: it names the nearest batch that divides.
    """
    each = group if accumulate > 1 else 1
    parts = shares(mesh) * accumulate * each
    if batch < 1 or batch % parts:
        groups = f" x groups of {each}" if each > 1 else ""
        raise UserError(
            f"{where}.batch={batch} does not divide by {parts} (mesh data {mesh.shape['data']} x "
            f"fsdp {mesh.shape['fsdp']} x accumulate {accumulate}{groups}); the nearest that does "
            f"is {max(1, round(batch / parts)) * parts}"
        )


def batch_shardings(spec: Tree, mesh: Mesh) -> Tree:
    return jax.tree.map(lambda _: NamedSharding(mesh, BATCH), spec)


def placement(name: str, shape: tuple[int, ...], mesh: Mapping[str, int], rules: Rules = ()) -> P:
    """Where an array of one layer lives.

    `tensor` splits what a rule says; `fsdp` too, or else the largest other axis that it divides.

    Args:
      name: path of the array, as in "blocks/attention/qkv/kernel".
      shape: of the array, without the axis of layers.
      mesh: {axis: size}.

    Raises:
      UserError: `tensor` does not divide the axis that its rule names.
    """
    spec: list[str | None] = [None] * len(shape)
    matching = [(over, axis) for pattern, axis, over in rules if re.search(pattern, name)]
    wanted = dict(reversed(matching))  # the first of each counts
    if mesh["tensor"] > 1 and "tensor" in wanted:
        axis = wanted["tensor"]
        if shape[axis] % mesh["tensor"]:
            can = [size for size in range(1, shape[axis] + 1) if shape[axis] % size == 0]
            what = "heads" if "qkv" in name else "entries"
            raise UserError(
                f"mesh.tensor={mesh['tensor']} does not divide the {shape[axis]} {what} of {name}; "
                f"sizes that do: {few(can)}"
            )
        spec[axis] = "tensor"
    if mesh["fsdp"] > 1 and math.prod(shape) >= SMALLEST:
        whole = [axis for axis in range(len(shape)) if spec[axis] is None]
        free = [axis for axis in whole if shape[axis] % mesh["fsdp"] == 0]
        if "fsdp" in wanted and wanted["fsdp"] % len(shape) in free:
            spec[wanted["fsdp"]] = "fsdp"
        elif free:
            spec[max(free, key=lambda axis: shape[axis])] = "fsdp"
    while spec and spec[-1] is None:
        spec.pop()
    return P(*spec)


def shardings(shapes: Tree, mesh: Mesh, *, rules: Rules = (), strict: bool = True) -> Tree:
    """A sharding for every array of a tree, by path and shape; see `placement`.

    Args:
      shapes: tree of arrays or jax.ShapeDtypeStruct.
      rules: what goes before the choice by size, and all that `tensor` splits; each must match
        something if `strict`, for a misspelt one would silently replicate.

    Raises:
      UserError: see `placement`; a rule matches no array although the mesh has its axis.
    """
    unused = {pattern for pattern, _, over in rules if strict and mesh.shape[over] > 1}

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        unused.difference_update({pattern for pattern in unused if re.search(pattern, name)})
        if STACKED.search(name) and leaf.shape:
            layer = placement(name, leaf.shape[1:], mesh.shape, rules)
            return NamedSharding(mesh, P(None, *layer))
        return NamedSharding(mesh, placement(name, leaf.shape, mesh.shape, rules))

    placements = jax.tree_util.tree_map_with_path(place, shapes)
    if unused:
        listed = ", ".join(sorted(unused))
        raise UserError(f"mesh {dict(mesh.shape)}: these rules match no array: {listed}")
    return placements


def abstract(shapes: Tree, placements: Tree) -> Tree:
    """Shapes with shardings: what a restore and an ahead-of-time compilation need."""

    def place(leaf, where):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(place, shapes, placements)


def constrain(x: jax.Array, spec: P = BATCH) -> jax.Array:
    """Pins the placement of an activation at a block's entry.

    Without a mesh in context, or with a size that does not divide, it does nothing.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    for length, axes in zip(x.shape, spec):
        axes = (axes,) if isinstance(axes, str) else axes or ()
        if length % math.prod(mesh.shape[axis] for axis in axes):
            return x
    return jax.lax.with_sharding_constraint(x, spec)


def matmul(x: jax.Array, kernel: jax.Array, name: str, rules: Rules = (), dtype=None) -> jax.Array:
    """x [n, d] times a layer's kernel [d, ...], put together from its shares for this product only.

    The kernel's gradient is summed into the same shares over `fsdp` by a reduce-scatter, before
    replicas add theirs. Written out, because left to itself the compiler sums all of it on every
    device and cuts afterwards: twice the bytes. Without a mesh in context, or with rows that it
    does not divide, it is the plain product.

    Args:
      name: path of the kernel, from which `shardings` decided where it lives.
      rules: what `shardings` was given.
      dtype: of the sums and the result; by default that of the factors.
    """
    mesh = jax.sharding.get_abstract_mesh()
    spec = P() if mesh.empty else placement(name, kernel.shape, mesh.shape, rules)

    def dot(x, kernel):
        if "tensor" in spec:  # whose axis would be lost in a flat kernel
            inner = (((1,), (0,)), ((), ()))
            return jax.lax.dot_general(x, kernel, inner, preferred_element_type=dtype)
        # Flat: otherwise it takes half as long again on CPUs.
        return jnp.matmul(x, kernel.reshape(len(kernel), -1), preferred_element_type=dtype)

    if "fsdp" not in spec or x.shape[0] % shares(mesh):
        return dot(x, kernel).reshape(len(x), *kernel.shape[1:])

    axis = spec.index("fsdp")

    def product(x, share):
        # Here, so that replicas add shares and not whole gradients.
        share = jax.lax.pcast(share, "data", to="varying")
        if axis == 0 and "tensor" not in spec:  # TPUs scatter matrices only
            share = share.reshape(len(share), -1)
        return dot(x, jax.lax.all_gather(share, "fsdp", axis=axis, tiled=True))

    # `tensor` stays with the compiler.
    kept = P(*(each if each == "fsdp" else None for each in spec))
    y = jax.shard_map(
        product, in_specs=(BATCH, kept), out_specs=BATCH, axis_names={"data", "fsdp"}
    )(x, kernel)
    return y.reshape(len(x), *kernel.shape[1:])
