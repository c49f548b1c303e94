"""The mesh of all devices."""

import math

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from dlc_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")


def make_mesh(
    *,
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    dcn_data: int = 1,
    dcn_fsdp: int = 1,
    devices=None,
) -> Mesh:
    """The mesh of all devices, in an order that follows their network.

    Neighbors on an axis are neighbors on the torus. All but `devices` is the `mesh` section of a
    recipe.

    Args:
      data: Size of the axis of replicas. One of the three sizes may be -1 and is inferred.
      fsdp: Size of the axis of replicas that also share out the parameters.
      tensor: Size of the axis that splits inside a layer. It never leaves a slice.
      dcn_data: Number of parts that the slow network between slices cuts `data` into. For GPUs it
        is the one between hosts. Together with `dcn_fsdp` it multiplies to the number of slices.
      dcn_fsdp: Number of parts that the slow network cuts `fsdp` into.
      devices: jax.devices() by default.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or the parts to the number of
        slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = _sizes(len(devices), data=data, fsdp=fsdp, tensor=tensor)
    parts = {"data": dcn_data, "fsdp": dcn_fsdp, "tensor": 1}
    for axis, part in parts.items():
        if part < 1 or sizes[axis] % part:
            raise UserError(
                f"mesh.dcn_{axis}={part} does not divide mesh.{axis}={sizes[axis]}; make {axis} a "
                "multiple of it"
            )
    inner, outer = tuple(sizes[axis] // parts[axis] for axis in AXES), tuple(parts.values())
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform == "tpu" and math.prod(outer) != slices:
        raise UserError(
            f"mesh: these devices are {slices} slices, but dcn_data={dcn_data} x "
            f"dcn_fsdp={dcn_fsdp}; set mesh.dcn_data={slices}"
        )
    if slices == math.prod(outer) > 1:
        ordered = mesh_utils.create_hybrid_device_mesh(
            inner, outer, devices=devices, allow_split_physical_axes=True
        )
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
        raise UserError(
            f"mesh.{wrong}={sizes[wrong]} does not divide the {count} devices; sizes that do: "
            f"{few(can)}"
        )
    shown = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size != -1)
    if free:
        raise UserError(
            f"mesh: {shown} is {fixed}, which does not divide the {count} devices; make one of "
            "them smaller"
        )
    raise UserError(
        f"mesh: {shown} is {fixed}, not the {count} devices here; set one of them to -1 and it is "
        "inferred"
    )


def few(numbers: list[int]) -> str:
    """The numbers in words; of many, the first ones and the last."""
    shown = [str(number) for number in numbers]
    return ", ".join(shown if len(shown) <= 12 else [*shown[:11], "…", shown[-1]])


def _ordered(devices, sizes: tuple[int, ...]) -> np.ndarray:
    """Devices on the axes; in the order of their numbers if the torus cannot be cut that way."""
    try:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    except (NotImplementedError, ValueError, AssertionError):
        return np.asarray(devices).reshape(sizes)


def _nested(devices, inner: tuple[int, ...], outer: tuple[int, ...]) -> np.ndarray:
    """Blocks of neighbors of shape `inner`, laid out as `outer`."""
    count = math.prod(inner)
    blocks = [
        _ordered(devices[start : start + count], inner) for start in range(0, len(devices), count)
    ]
    grid = np.empty(len(blocks), object)
    grid[:] = blocks
    return np.block(grid.reshape(outer).tolist())


def unsplit(mesh: Mesh) -> Mesh:
    """The same devices without `fsdp`: batches lie as before, `tensor` alone cuts parameters."""
    return Mesh(mesh.devices.reshape(-1, 1, mesh.shape["tensor"]), AXES, axis_types=mesh.axis_types)


def replicas(mesh: Mesh, *, local: bool = False) -> Mesh:
    """The same devices, or this process's own ones, as replicas.

    Each holds all parameters and a share of the batch.
    """
    devices = mesh.local_devices if local else mesh.devices.flatten()
    return Mesh(np.reshape(devices, (-1, 1, 1)), AXES, axis_types=mesh.axis_types)
