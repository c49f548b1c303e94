"""Arrays between hosts and devices, of one process or of several: how they get there, and back.

A process sees the shares of an array that its own devices hold, no others. So whoever puts values
on the mesh or reads them does it here.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dlc_jax import stop
from dlc_jax.typing import Tree

BATCH = P(("data", "fsdp"))  # the leading axis of every batch


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def rows(mesh: Mesh, batch: int, *, process: int | None = None) -> np.ndarray:
    """Rows int [n] of a global batch that the devices of a process hold, in ascending order.

    On a torus the devices of a host need not be neighbors on the mesh, so its rows need not be
    either; and where `tensor` spans hosts, several of them hold the same rows.

    Args:
      process: this one by default.
    """
    process = jax.process_index() if process is None else process
    places = NamedSharding(mesh, BATCH).devices_indices_map((batch,))
    blocks = {
        place[0].indices(batch)[:2]
        for device, place in places.items()
        if device.process_index == process
    }
    return np.concatenate([np.arange(*block) for block in sorted(blocks)])


def to_global(batch: Tree, mesh: Mesh, size: int | None = None) -> Tree:
    """Host-local numpy arrays to global arrays split over the batch axes.

    Args:
      batch: arrays [n, ...] of those rows of the global batch that `rows` names, in their order.
      size: of the global batch; None if the arrays have all of its rows.
    """
    size = len(jax.tree.leaves(batch)[0]) if size is None else size
    where, own = NamedSharding(mesh, BATCH), _own(mesh, size)

    def place(leaf):
        def share(index):
            start, end, _ = index[0].indices(size)
            first = int(np.searchsorted(own, start))
            return leaf[first : first + end - start]

        return _placed((size, *leaf.shape[1:]), where, share)

    return jax.tree.map(place, batch)


def _placed(shape: tuple[int, ...], where: NamedSharding, share) -> jax.Array:
    """The array of which share(index) is what is at an index; said to be sent, to be allowed to."""
    places = where.addressable_devices_indices_map(shape)
    pieces = jax.device_put([share(index) for index in places.values()], list(places))
    return jax.make_array_from_single_device_arrays(shape, where, pieces)


@functools.lru_cache(maxsize=8)
def _own(mesh: Mesh, size: int) -> np.ndarray:
    return rows(mesh, size)


def spread(array, where: NamedSharding) -> jax.Array:
    """An array, or keys, that every process has whole, placed on all devices."""
    if where.is_fully_addressable:
        return jax.device_put(array, where)
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(spread(jax.random.key_data(array), where))
    whole = np.asarray(array)
    return _placed(whole.shape, where, lambda index: whole[index])


def everywhere(results: Tree) -> Tree:
    """Arrays that any process may read whole: what spans processes is sent to all of them."""
    return jax.tree.map(_whole, results)


def _whole(leaf):
    is_here = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable
    if is_here or leaf.is_fully_replicated:
        return leaf
    return _copier(leaf.sharding.mesh)(leaf)


@functools.lru_cache(maxsize=8)
def _copier(mesh: Mesh):
    return jax.jit(lambda leaf: leaf, out_shardings=replicated(mesh))


def each(
    function, params, batches: Iterable[Sequence[np.ndarray]], *, mesh: Mesh, size: int
) -> Iterator:
    """Yields function(params, *arrays) of each batch.

    While the devices work on one, the next is taken, and so may be read. Of several processes that
    share the mesh each gives the same arrays, and each gets all results.

    Args:
      function: jitted; its results are arrays [size, ...], or a tree of them.
      batches: arrays [at most size, ...]; fewer are padded with the last, and what comes of those
        is cut off.
    """
    before = None
    for arrays in batches:
        stop.breathe()
        count = len(arrays[0])
        padded = np.minimum(np.arange(size), count - 1)
        with jax.set_mesh(mesh):
            batch = [spread(array[padded], NamedSharding(mesh, BATCH)) for array in arrays]
            results = everywhere(function(params, *batch))
        if before is not None:
            yield _cut(*before)
        before = results, count
    if before is not None:
        yield _cut(*before)


def _cut(results, count: int):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:count], results)
