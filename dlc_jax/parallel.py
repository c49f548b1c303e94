"""The mesh, and where arrays live on it.

One mesh with three axes serves every machine, from a laptop to a pod:

    data    replicas: each holds all parameters and a share of the batch
    fsdp    replicas that also share out parameters, optimizer moments and averages; the batch is split over it too
    tensor  splits inside a layer, by explicit rules

Placement is decided here, by path and shape, never inside a module. So it covers whatever is shaped like a parameter: moments,
averages, teachers. A layer multiplies by `matmul`, which puts the kernel together for that product alone, forward and backward, and
sums its gradient straight into shares.
"""

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dlc_jax.errors import UserError
from dlc_jax.typing import Tree

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))  # the leading axis of every batch
SMALLEST = 2**16  # entries of the smallest array that is worth splitting
STACKED = re.compile(r"(^|/)blocks/")  # parameters of scanned layers: axis 0 counts layers, and is never split

# (regular expression over the path, axis of one layer's shape, mesh axis that splits it)
Rules = tuple[tuple[str, int, str], ...]


def join() -> None:
    """Makes this process one of several, if the environment names them; to be called before anything asks for devices.

    It names all three: JAX_COORDINATOR_ADDRESS=HOST:PORT, a free port of process 0's host, JAX_NUM_PROCESSES and JAX_PROCESS_ID. A process
    that dies takes the others with it: at once if it is process 0, else once it was silent for half a minute.

    Raises:
      UserError: only some of the three are set, or they are no numbers that go together; the others do not come.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, *numbers = (os.environ.get(name, "") for name in names)
    if jax.distributed.is_initialized() or not any((address, *numbers)):
        return
    if not address or not all(number.isdecimal() for number in numbers) or int(numbers[1]) >= int(numbers[0]):
        said = " ".join(f"{name}={value}" for name, value in zip(names, (address, *numbers), strict=True))
        raise UserError(f"several processes need an address and the numbers from 0 in each; the environment says {said}")
    jax.config.update("jax_enable_preemption_service", False)  # which swallows SIGTERM; training has its own handler
    count, index = map(int, numbers)
    try:
        jax.distributed.initialize(address, count, index, heartbeat_timeout_seconds=30)
    except RuntimeError as error:
        raise UserError(
            f"process {index} of {count} cannot meet the others at {address}: {str(error).splitlines()[0]}"
        ) from error


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1, dcn_data: int = 1, dcn_fsdp: int = 1, devices=None) -> Mesh:
    """The mesh of all devices, in an order that follows their network: neighbors on an axis are neighbors on the torus.

    Args:
      data, fsdp, tensor: sizes of the axes; one may be -1 and is inferred.
      dcn_data, dcn_fsdp: into how many parts of `data` and of `fsdp` the slow network between slices (between hosts, for GPUs) cuts
        them; they multiply to the number of slices. `tensor` never leaves a slice.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or the parts to the number of slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes, parts = _sizes(len(devices), data=data, fsdp=fsdp, tensor=tensor), {"data": dcn_data, "fsdp": dcn_fsdp, "tensor": 1}
    for axis, part in parts.items():
        if part < 1 or sizes[axis] % part:
            raise UserError(f"mesh.dcn_{axis}={part} does not divide mesh.{axis}={sizes[axis]}; make {axis} a multiple of it")
    inner, outer = tuple(sizes[axis] // parts[axis] for axis in AXES), tuple(parts.values())
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform == "tpu" and math.prod(outer) != slices:
        raise UserError(
            f"mesh: these devices are {slices} slices, but dcn_data={dcn_data} x dcn_fsdp={dcn_fsdp}; set mesh.dcn_data={slices}"
        )
    if slices == math.prod(outer) > 1:
        ordered = mesh_utils.create_hybrid_device_mesh(inner, outer, devices=devices, allow_split_physical_axes=True)
    else:
        ordered = _nested(devices, inner, outer)
    return Mesh(ordered, AXES, axis_types=(AxisType.Auto,) * 3)


def _sizes(count: int, **sizes: int) -> dict[str, int]:
    """The sizes with -1 inferred."""
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size == 0 or size < -1 for size in sizes.values()):
        raise UserError(f"mesh: sizes {sizes} need at most one -1 and otherwise positive numbers")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and count % fixed == 0:
        return sizes | {free[0]: count // fixed}
    if not free and fixed == count:
        return sizes
    wrong = next((axis for axis, size in sizes.items() if size > 0 and count % size), None)
    if wrong:
        can = [size for size in range(1, count + 1) if count % size == 0]
        raise UserError(f"mesh.{wrong}={sizes[wrong]} does not divide the {count} devices; sizes that do: {_few(can)}")
    shown = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size != -1)
    if free:
        raise UserError(f"mesh: {shown} is {fixed}, which does not divide the {count} devices; make one of them smaller")
    raise UserError(f"mesh: {shown} is {fixed}, not the {count} devices here; set one of them to -1 and it is inferred")


def _few(numbers: list[int]) -> str:
    shown = [str(number) for number in numbers]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:11], "…", shown[-1]])


def _ordered(devices, sizes: tuple[int, ...]) -> np.ndarray:
    """Devices on the axes; a torus that cannot be cut that way falls back to the order in which the devices are numbered."""
    try:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    except (NotImplementedError, ValueError, AssertionError):
        return np.asarray(devices).reshape(sizes)


def _nested(devices, inner: tuple[int, ...], outer: tuple[int, ...]) -> np.ndarray:
    """Blocks of neighbors of shape `inner`, laid out as `outer`."""
    count = math.prod(inner)
    blocks = [_ordered(devices[start : start + count], inner) for start in range(0, len(devices), count)]
    grid = np.empty(len(blocks), object)
    grid[:] = blocks
    return np.block(grid.reshape(outer).tolist())


def unsplit(mesh: Mesh) -> Mesh:
    """The same devices without `fsdp`: batches lie as before, parameters are whole but for `tensor`."""
    return Mesh(mesh.devices.reshape(-1, 1, mesh.shape["tensor"]), AXES, axis_types=mesh.axis_types)


def replicas(mesh: Mesh, *, local: bool = False) -> Mesh:
    """The same devices, or this process's own ones, each for itself: every one holds all parameters and a share of the batch."""
    devices = mesh.local_devices if local else mesh.devices.flatten()
    return Mesh(np.reshape(devices, (-1, 1, 1)), AXES, axis_types=mesh.axis_types)


def shares(mesh: Mesh) -> int:
    """The number of shares that a batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(batch: int, mesh: Mesh, *, accumulate: int, where: str, group: int = 1) -> None:
    """Refuses a global batch that does not split evenly over the mesh and the microbatches, or whose microbatches would cut groups.

    One microbatch may have groups that lie across devices: they then ask each other, and nothing else changes.
    """
    each = group if accumulate > 1 else 1
    parts = shares(mesh) * accumulate * each
    if batch < 1 or batch % parts:
        groups = f" x groups of {each}" if each > 1 else ""
        raise UserError(
            f"{where}.batch={batch} does not divide by {parts} (mesh data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']} "
            f"x accumulate {accumulate}{groups}); the nearest that does is {max(1, round(batch / parts)) * parts}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_shardings(spec: Tree, mesh: Mesh) -> Tree:
    return jax.tree.map(lambda _: NamedSharding(mesh, BATCH), spec)


def placement(name: str, shape: tuple[int, ...], mesh: Mapping[str, int], rules: Rules = ()) -> P:
    """Where an array of one layer lives: `tensor` splits what a rule says, `fsdp` too, or else the largest other axis that it divides.

    Args:
      name: path of the array, as in "blocks/attention/qkv/kernel".
      shape: of the array, without the axis of layers.
      mesh: {axis: size}.

    Raises:
      UserError: `tensor` does not divide the axis that its rule names.
    """
    spec: list[str | None] = [None] * len(shape)
    wanted = {over: axis for pattern, axis, over in reversed(rules) if re.search(pattern, name)}  # the first of each counts
    if mesh["tensor"] > 1:
        axis = wanted.get("tensor")
        if axis is not None:
            if shape[axis] % mesh["tensor"]:
                can = [size for size in range(1, shape[axis] + 1) if shape[axis] % size == 0]
                what = "heads" if "qkv" in name else "entries"
                raise UserError(
                    f"mesh.tensor={mesh['tensor']} does not divide the {shape[axis]} {what} of {name}; sizes that do: {_few(can)}"
                )
            spec[axis] = "tensor"
    if mesh["fsdp"] > 1 and math.prod(shape) >= SMALLEST:
        free = [axis for axis, length in enumerate(shape) if spec[axis] is None and length % mesh["fsdp"] == 0]
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
      rules: what goes before the choice by size, and all that `tensor` splits; each must match something if `strict`, for a misspelt
        one would silently replicate.

    Raises:
      UserError: see `placement`; a rule matches no array although the mesh has its axis.
    """
    unused = {pattern for pattern, _, over in rules if strict and mesh.shape[over] > 1}

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        unused.difference_update({pattern for pattern in unused if re.search(pattern, name)})
        if STACKED.search(name) and leaf.shape:
            return NamedSharding(mesh, P(None, *placement(name, leaf.shape[1:], mesh.shape, rules)))
        return NamedSharding(mesh, placement(name, leaf.shape, mesh.shape, rules))

    placed = jax.tree_util.tree_map_with_path(place, shapes)
    if unused:
        raise UserError(f"mesh {dict(mesh.shape)}: these rules match no array: {', '.join(sorted(unused))}")
    return placed


def abstract(shapes: Tree, placed: Tree) -> Tree:
    """Shapes with shardings: what a restore and an ahead-of-time compilation need."""
    return jax.tree.map(lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, placed)


def to_global(batch: Tree, mesh: Mesh) -> Tree:
    """Host-local numpy arrays to global arrays split over the batch axes; each process gives its own share."""
    where = NamedSharding(mesh, BATCH)
    return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(where, leaf), batch)


def constrain(x: jax.Array, spec: P = BATCH) -> jax.Array:
    """Pins the placement of an activation at a block's entry; without a mesh in context, or a size that does not divide, it does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    for length, axes in zip(x.shape, spec):
        if length % math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ())):
            return x
    return jax.lax.with_sharding_constraint(x, spec)


def matmul(x: jax.Array, kernel: jax.Array, name: str, rules: Rules = (), dtype=None) -> jax.Array:
    """x [n, d] times a layer's kernel [d, ...] whose shares over `fsdp` are put together for this product only.

    The kernel's gradient is summed into the same shares by a reduce-scatter, before replicas add theirs. Written out, because left to
    itself the compiler sums all of it on every device and cuts afterwards: twice the bytes. Without a mesh in context, or with rows that
    it does not divide, it is the plain product.

    Args:
      name: path of the kernel, from which `shardings` decided where it lives.
      rules: what `shardings` was given.
      dtype: of the sums and the result; by default that of the factors.
    """
    mesh = jax.sharding.get_abstract_mesh()
    spec = P() if mesh.empty else placement(name, kernel.shape, mesh.shape, rules)

    def dot(x, kernel):
        if "tensor" in spec:  # whose axis would be lost in a flat kernel
            return jax.lax.dot_general(x, kernel, (((1,), (0,)), ((), ())), preferred_element_type=dtype)
        y = jnp.matmul(x, kernel.reshape(len(kernel), -1), preferred_element_type=dtype)  # half as slow again on CPUs if not flat
        return y.reshape(len(x), *kernel.shape[1:])

    if "fsdp" not in spec or x.shape[0] % shares(mesh):
        return dot(x, kernel)

    def product(x, share):
        share = jax.lax.pcast(share, "data", to="varying")  # here, so that replicas add shares and not whole gradients
        return dot(x, jax.lax.all_gather(share, "fsdp", axis=spec.index("fsdp"), tiled=True))

    kept = P(*(axis if axis == "fsdp" else None for axis in spec))  # `tensor` stays with the compiler
    return jax.shard_map(product, in_specs=(BATCH, kept), out_specs=BATCH, axis_names={"data", "fsdp"})(x, kernel)


def each(function, params, batches: Iterable[Sequence[np.ndarray]], *, mesh, size: int) -> Iterator:
    """Yields function(params, *arrays) of each batch; while the devices work on one, the next is taken, and so may be read.

    Args:
      function: jitted; its results are arrays [size, ...], or a tree of them.
      batches: arrays [at most size, ...]; fewer are padded with the last, and what comes of those is cut off.
    """
    before = None
    for arrays in batches:
        count = len(arrays[0])
        rows = np.minimum(np.arange(size), count - 1)
        with jax.set_mesh(mesh):
            batch = [jax.device_put(array[rows], NamedSharding(mesh, BATCH)) for array in arrays]
            found = function(params, *batch)
        if before is not None:
            yield _cut(*before)
        before = found, count
    if before is not None:
        yield _cut(*before)


def _cut(found, count: int):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:count], found)
