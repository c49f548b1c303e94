"""What one program of the TPU kernel computes of its examples; `pallas_tpu` calls it.

An example is turned as it comes, to [width, n]: a head's vectors are then the columns of k rows,
which are cut out without shifting any lanes, and fill them whatever k is. Logits stand as
[keys, queries], so that a query's maximum and sum run down the rows, where whole registers are
added. Gradients of the projection take the place of what they are the gradients of.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from dlc_jax.kernels.reference import QK_EPS
from dlc_jax.typing import Array

WHOLE, TILE = 512, 256  # up to so many queries at a time; of more, so many
UNROLL = 4  # heads in a turn of the loop over them, half as many of long sequences
ALL = slice(0, None)
LOWEST = float(jnp.finfo(jnp.float32).min)


def forward(refs, h, causal):
    def head(example, start):
        key, value = example.prepared(1, start), example.read("qkv", 2, start)

        def tile(queries):
            query = example.prepared(0, start, queries)
            weights, total = _weights(key, query, example.counts, queries if causal else None)
            out = _dot(value, weights.astype(value.dtype), 1, 0) * (1 / total)
            example.write("out", 0, start, out, queries)
            return ()

        _tiles(tile, key.shape[1])

    _every_head(head, refs, h, "out")


def backward(refs, h, causal):
    for name in ("dbias", "dscales"):  # in this order on every host
        if name in refs:
            refs[name][...] = jnp.zeros_like(refs[name])

    def head(example, start):
        key, value = example.prepared(1, start), example.read("qkv", 2, start)

        def tile(queries):
            query = example.prepared(0, start, queries)
            dout = example.read("dout", 0, start, queries)
            weights, total = _weights(key, query, example.counts, queries if causal else None)
            weights = weights * (1 / total)
            dvalue = _dot(dout, weights.astype(dout.dtype), 1, 1)
            change = weights * _dot(value, dout, 0, 0)
            change = change - weights * jnp.sum(change, axis=0, keepdims=True)
            change = change.astype(query.dtype)  # of the logits
            example.write_back(0, start, _dot(key, change, 1, 0), queries)
            return _dot(query, change, 1, 1), dvalue

        dkey, dvalue = _tiles(tile, key.shape[1], [refs["dkey"], refs["dvalue"]])
        example.write_back(1, start, dkey)
        example.write("qkv", 2, start, dvalue)

    _every_head(head, refs, h, "qkv")


def _every_head(compute, refs, h, result):
    """compute(_Example, the head's first row) for all heads of all examples of a program."""
    from jax.experimental import pallas as pl

    target = {"out": "out", "qkv": "dqkv"}[result]
    k = refs["qkv"].shape[-1] // (3 * h)
    most = UNROLL if refs["qkv"].shape[1] <= 128 else UNROLL // 2
    step = next(size for size in (most, 2, 1) if h % size == 0)

    def one(index, _):
        counts = None
        if "mask" in refs:  # a column, one row for each key
            row = refs["mask"][index]
            counts = jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1] > 0
        for name in ("qkv", "dout"):
            if name in refs:
                refs[f"{name}_turned"][...] = refs[name][index].T.astype(jnp.float32)
        example = _Example(refs, index, h * k, k, counts, refs[target].dtype)

        def heads(i, _):
            for j in range(step):
                compute(example, pl.multiple_of((i * step + j) * k, 8))
            return 0

        jax.lax.fori_loop(0, h // step, heads, 0)
        found = refs[f"{result}_turned"][...].astype(refs[target].dtype).T
        refs[target][index] = found
        if "dbias" in refs:
            refs["dbias"][...] += jnp.sum(found.astype(jnp.float32), axis=0, keepdims=True)
        return 0

    jax.lax.fori_loop(0, len(refs["qkv"]), one, 0)


def _tiles(compute, n, sums=()):
    """The sum of compute(which queries) over all of n; where that takes several, in `sums`."""
    from jax.experimental import pallas as pl

    if n <= WHOLE:
        return compute(ALL)

    def add(queries):
        for ref, x in zip(sums, compute(queries)):
            ref[...] += x

    def one(i, _):
        add(pl.ds(pl.multiple_of(i * TILE, TILE), TILE))
        return 0

    for ref in sums:
        ref[...] = jnp.zeros_like(ref)
    jax.lax.fori_loop(0, n // TILE, one, 0)
    if n % TILE:
        add(slice(n // TILE * TILE, n))
    return [ref[...] for ref in sums]


@dataclasses.dataclass
class _Example:
    """What is computed of one example, turned: [width, n], a head's vectors are columns.

    `part` is 0 for queries, 1 for keys, 2 for values; `start` the head's first row of its part.
    """

    refs: dict
    index: Array
    width: int
    k: int
    counts: Array | None
    dtype: jnp.dtype

    def _rows(self, part, start):
        from jax.experimental import pallas as pl

        return pl.ds(part * self.width + start, self.k)

    def read(self, name, part, start, queries=ALL):
        found = self.refs[f"{name}_turned"][self._rows(part, start), queries]
        return found.astype(self.dtype)

    def write(self, name, part, start, x, queries=ALL):
        self.refs[f"{name}_turned"][self._rows(part, start), queries] = x

    def _angles(self, queries):
        table = self.refs["rotary"]
        table = table[:, queries] if len(table.shape) == 2 else table[self.index, :, queries]
        return jnp.split(table, 2)

    def prepared(self, part, start, queries=ALL):
        """Queries or keys, normalized and rotated."""
        x = self.refs["qkv_turned"][self._rows(part, start), queries]
        if "scales" in self.refs:
            x = x * _over_rms(x) * self.refs["scales"][:, part : part + 1]
        if "rotary" in self.refs:
            x = _rotate(x, *self._angles(queries))
        return x.astype(self.dtype)

    def write_back(self, part, start, gradient, queries=ALL):
        """Turns a gradient of prepared queries or keys into that of the projection, in its place.

        The gradient is still to be multiplied by the logits' scale.
        """
        gradient = gradient * self.k**-0.5
        if "rotary" in self.refs:
            cos, sin = self._angles(queries)
            gradient = _rotate(gradient, cos, -sin)
        if "scales" in self.refs:
            x = self.refs["qkv_turned"][self._rows(part, start), queries]
            over, column = _over_rms(x), slice(part, part + 1)
            x = x * over
            self.refs["dscales"][:, column] += jnp.sum(gradient * x, axis=1, keepdims=True)
            gradient = gradient * self.refs["scales"][:, column]
            gradient = over * (gradient - x * jnp.mean(x * gradient, axis=0, keepdims=True))
        self.write("qkv", part, start, gradient, queries)


def _over_rms(x):
    return jax.lax.rsqrt(jnp.mean(x * x, axis=0, keepdims=True) + QK_EPS)


def _rotate(x, cos, sin):
    first, second = jnp.split(x, 2)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin])


def _weights(key, query, counts, queries):
    """(softmax before it is divided, [keys, queries]; what divides it, [1, queries]).

    Causal where `queries` says which these are.
    """
    logits = _dot(key, query, 0, 0)
    if counts is not None:
        logits = jnp.where(counts, logits, LOWEST)
    if queries is not None:
        row, column = (jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis) for axis in (0, 1))
        logits = jnp.where(row <= column + queries.start, logits, LOWEST)
    logits = logits - jnp.max(logits, axis=0, keepdims=True)
    weights = jnp.exp2(logits * (len(key) ** -0.5 * math.log2(math.e)))
    return weights, jnp.sum(weights, axis=0, keepdims=True)


def _dot(a, b, i, j):
    """The product of two matrices, summed over dimension i of a and j of b in float32."""
    # a TPU would round float32 factors to bfloat16
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    if is_simulated() or 1 in (a.shape[1 - i], b.shape[1 - j]):
        # neither a CPU nor Mosaic's product with a vector adds up bfloat16 in float32
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    dimensions = (((i,), (j,)), ((), ()))
    return jax.lax.dot_general(
        a, b, dimensions, precision=exact, preferred_element_type=jnp.float32
    )


def is_simulated() -> bool:
    """Whether the program is for a CPU, and so interpreted."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device.platform if device else jax.default_backend()) == "cpu"
