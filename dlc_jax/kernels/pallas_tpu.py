"""Attention as one Mosaic kernel for TPUs: it reads the packed projection, it writes [b, n, h k].

Nothing is transposed or padded in HBM: a program takes whole examples, all their heads, into VMEM
and cuts heads out there. All keys of a head are there at once, so that the softmax takes one pass.
Logits stand as [keys, queries]: the maximum and the sum of a query run down the rows, where a TPU
adds whole registers, and all that is ever transposed is as narrow as a head. The backward pass
computes the weights again from the projection, its only residual.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from dlc_jax.kernels.reference import QK_EPS, rms_normalize, rotate
from dlc_jax.typing import Array

ROWS = 512  # a program of short sequences takes examples until it has as many tokens
WHOLE, TILE = 512, 256  # up to so many queries at a time; of more, so many
MIB = 2**20
# What a program may take of VMEM, 64 MiB a core or more; device kinds with less by name.
VMEM, LESS_VMEM = 48 * MIB, {"TPU v4": 15 * MIB, "TPU v3": 15 * MIB, "TPU v2": 15 * MIB}
ALL = slice(0, None)
LOWEST = float(jnp.finfo(jnp.float32).min)


def attention(qkv, *, mask=None, rotary=None, qk_scale=None, causal=False):
    """See `dlc_jax.kernels.attention.attention`."""
    b, n, _, h, k = qkv.shape
    given = {}
    if mask is not None:
        given["mask"] = mask.astype(jnp.float32)[:, None]
    if rotary is not None:
        given["rotary"] = jnp.concatenate(rotary, axis=-1).astype(jnp.float32)
    scales = None if qk_scale is None else jnp.stack(qk_scale).astype(jnp.float32)
    out = _attention(qkv.reshape(b, n, 3 * h * k), scales, given, h, causal)
    return out.reshape(b, n, h, k)


def refusal(qkv, *, mask, rotary, qk_scale, causal, platform) -> str | None:
    """Why this cannot be computed on that platform; see `attention.IMPLEMENTATIONS`."""
    if platform not in ("tpu", "cpu"):
        return f"it is for TPUs, not {platform}"
    if qkv.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it takes bfloat16 or float32, not {qkv.dtype}"
    n, _, h, k = qkv.shape[1:]
    needed = _vmem(1, n, h, k, qkv.dtype, backward=True)
    if needed > _available():
        return (
            f"{n} tokens of {h} heads of {k} need {needed / MIB:.0f} MiB of VMEM, and a program "
            f"may take {_available() // MIB}"
        )
    return None


def _available() -> int:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return LESS_VMEM.get(device.device_kind if device else "", VMEM)


def _vmem(g, n, h, k, dtype, *, backward) -> int:
    """Bytes of VMEM of a program of g examples: its blocks twice, and what it computes with."""
    rows, tile = _padded(n, 16), _padded(n, 128) if n <= WHOLE else TILE
    wide, narrow = _padded(3 * h * k, 128), _padded(h * k, 128)
    blocks = 2 * wide + narrow if backward else wide + narrow
    moved = 2 * g * rows * blocks * dtype.itemsize
    moved += 2 * (rows * 128 + 8 * _padded(n, 128)) * 4 * g  # rotary tables, mask
    # the squares of logits, weights, their gradients, what is kept; a head's vectors
    return moved + 6 * rows * tile * 4 + 8 * rows * _padded(k, 128) * 4 + MIB


def _padded(size, unit):
    return -(-size // unit) * unit


def _examples(b, n, h, k, dtype, *, backward) -> int:
    """How many examples a program takes: a divisor of b."""
    fitting = (
        g
        for g in range(1, b + 1)
        if b % g == 0 and g * n <= ROWS and _vmem(g, n, h, k, dtype, backward=backward) <= VMEM // 2
    )
    return max(fitting, default=1)


# ---- the calls


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attention(qkv, scales, given, h, causal):
    """[b, n, 3 h k] -> [b, n, h k]; scales [2, k] or None, given {"mask", "rotary"}."""
    b, n, width = qkv.shape
    shape = jax.ShapeDtypeStruct((b, n, width // 3), qkv.dtype)
    return _call(_forward, {"qkv": qkv}, scales, given, {"out": shape}, h, causal)["out"]


def _attention_forward(qkv, scales, given, h, causal):
    return _attention(qkv, scales, given, h, causal), (qkv, scales, given)


def _attention_backward(h, causal, kept, dout):
    qkv, scales, given = kept
    shapes = {"dqkv": jax.ShapeDtypeStruct(qkv.shape, qkv.dtype)}
    if scales is not None:  # a sum for each program
        g = _examples(*qkv.shape[:2], h, scales.shape[1], qkv.dtype, backward=True)
        shapes["dscales"] = jax.ShapeDtypeStruct((len(qkv) // g, *scales.shape), jnp.float32)
    found = _call(_backward, {"qkv": qkv, "dout": dout}, scales, given, shapes, h, causal)
    dscales = None if scales is None else found["dscales"].sum(0)
    return found["dqkv"], dscales, None


_attention.defvjp(_attention_forward, _attention_backward)


def _call(body, arrays, scales, given, shapes, h, causal):
    """{name: array} of `shapes`, by a grid of programs of several examples."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    qkv = arrays["qkv"]
    b, n, width = qkv.shape
    k, backward = width // (3 * h), body is _backward
    g = _examples(b, n, h, k, qkv.dtype, backward=backward)
    arrays = arrays | given | ({} if scales is None else {"scales": scales})

    def spec(name, array):
        if name == "dscales":
            return pl.BlockSpec((None, *array.shape[1:]), lambda i: (i, 0, 0))
        if array.ndim == 2:  # the same for all examples
            return pl.BlockSpec(array.shape, lambda i: (0, 0))
        return pl.BlockSpec((g, *array.shape[1:]), lambda i: (i, 0, 0))

    def kernel(*refs):
        refs = dict(zip((*arrays, *shapes, *scratch), refs))
        body(refs, h, causal)

    scratch = {"dkey": (n, k), "dvalue": (n, k)} if backward else {}
    moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in (*arrays.values(), *shapes.values()))
    out = pl.pallas_call(
        kernel,
        grid=(b // g,),
        in_specs=[spec(*item) for item in arrays.items()],
        out_specs=[spec(*item) for item in shapes.items()],
        out_shape=list(shapes.values()),
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=max(_vmem(g, n, h, k, qkv.dtype, backward=backward), 16 * MIB),
        ),
        cost_estimate=pl.CostEstimate(
            flops=(10 if backward else 4) * b * n * n * h * k,
            transcendentals=b * h * n * n,
            bytes_accessed=moved,
        ),
        interpret=_is_simulated(),
        name=f"attention{body.__name__}",
    )(*arrays.values())
    return dict(zip(shapes, out))


def _is_simulated() -> bool:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device.platform if device else jax.default_backend()) == "cpu"


# ---- the programs


def _forward(refs, h, causal):
    def head(example):
        key, value = example.prepared(1), example.read("qkv", 2)

        def tile(rows):
            query = example.prepared(0, rows)
            weights, total = _weights(key, query, example.counts, rows if causal else None)
            out = _dot(value, weights.astype(value.dtype), 0, 0) * (1 / total)  # [k, queries]
            example.write("out", 0, rows, out.T)

        _tiles(tile, len(key))

    _every_head(head, refs, h)


def _backward(refs, h, causal):
    if "dscales" in refs:
        refs["dscales"][...] = jnp.zeros_like(refs["dscales"])

    def head(example):
        key, value = example.prepared(1), example.read("qkv", 2)
        dkey, dvalue = refs["dkey"], refs["dvalue"]
        dkey[...] = dvalue[...] = jnp.zeros(key.shape, jnp.float32)

        def tile(rows):
            query, dout = example.prepared(0, rows), example.read("dout", 0, rows)
            weights, total = _weights(key, query, example.counts, rows if causal else None)
            weights = weights * (1 / total)
            dvalue[...] += _dot(weights.astype(dout.dtype), dout, 1, 0)
            change = weights * _dot(value, dout, 1, 1)
            change = change - weights * jnp.sum(change, axis=0, keepdims=True)
            change = change.astype(query.dtype)  # of the logits
            dkey[...] += _dot(change, query, 1, 0)
            example.write_back(0, _dot(key, change, 0, 0).T, rows)

        _tiles(tile, len(key))
        example.write_back(1, dkey[...])
        example.write("dqkv", 2, ALL, dvalue[...])

    _every_head(head, refs, h)


def _every_head(compute, refs, h):
    """compute(_Head) for all heads of all examples of a program."""

    def example(index, _):
        counts = None
        if "mask" in refs:  # a column, one row for each key
            row = refs["mask"][index]
            counts = jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1] > 0
        for head in range(h):
            compute(_Head(refs, index, head, h, counts))
        return 0

    jax.lax.fori_loop(0, len(refs["qkv"]), example, 0)


def _tiles(compute, n):
    """compute(rows) for all queries."""
    from jax.experimental import pallas as pl

    if n <= WHOLE:
        return compute(ALL)
    jax.lax.fori_loop(
        0, n // TILE, lambda i, _: compute(pl.ds(pl.multiple_of(i * TILE, TILE), TILE)), None
    )
    if n % TILE:
        compute(slice(n // TILE * TILE, n))


@dataclasses.dataclass
class _Head:
    """One head of one example: its parts of the blocks, queries and keys as they are multiplied.

    `part` is 0 for queries, 1 for keys, 2 for values.
    """

    refs: dict
    index: Array
    head: int
    h: int
    counts: Array | None

    def _columns(self, part):
        k = self.refs["qkv"].shape[-1] // (3 * self.h)
        start = (part * self.h + self.head) * k
        return slice(start, start + k)

    def read(self, name, part, rows=ALL):
        return self.refs[name][self.index, rows, self._columns(part)]

    def write(self, name, part, rows, x):
        ref = self.refs[name]
        ref[self.index, rows, self._columns(part)] = x.astype(ref.dtype)

    def _angles(self, rows):
        table = self.refs["rotary"]
        table = table[rows] if len(table.shape) == 2 else table[self.index, rows]
        return jnp.split(table, 2, axis=-1)

    def prepared(self, part, rows=ALL):
        """Queries or keys, normalized and rotated."""
        x = found = self.read("qkv", part, rows)
        if "scales" in self.refs:
            found = rms_normalize(found, self.refs["scales"][part])
        if "rotary" in self.refs:
            found = rotate(found, *self._angles(rows))
        return found.astype(x.dtype)

    def write_back(self, part, gradient, rows=ALL):
        """The gradient of the packed projection, from that of prepared queries or keys."""
        x = self.read("qkv", part, rows).astype(jnp.float32)
        gradient = gradient * x.shape[-1] ** -0.5
        if "rotary" in self.refs:
            cos, sin = self._angles(rows)
            gradient = rotate(gradient, cos, -sin)
        if "scales" in self.refs:
            over = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + QK_EPS)
            x = x * over
            dscales = self.refs["dscales"]
            dscales[part] += jnp.sum(gradient * x, axis=0)
            gradient = gradient * self.refs["scales"][part]
            gradient = over * (gradient - x * jnp.mean(x * gradient, axis=-1, keepdims=True))
        self.write("dqkv", part, rows, gradient)


def _weights(key, query, counts, rows):
    """(softmax before it is divided, [keys, queries]; what divides it, [1, queries]).

    Causal where `rows` says which queries these are.
    """
    logits = _dot(key, query, 1, 1)
    if counts is not None:
        logits = jnp.where(counts, logits, LOWEST)
    if rows is not None:
        keys, queries = (jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis) for axis in (0, 1))
        logits = jnp.where(keys <= queries + rows.start, logits, LOWEST)
    logits = logits - jnp.max(logits, axis=0, keepdims=True)
    weights = jnp.exp2(logits * (key.shape[-1] ** -0.5 * math.log2(math.e)))
    return weights, jnp.sum(weights, axis=0, keepdims=True)


def _dot(a, b, i, j):
    """The product of two matrices, summed over dimension i of a and j of b in float32."""
    # a TPU would round float32 factors to bfloat16
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((i,), (j,)), ((), ()))
    return jax.lax.dot_general(
        a, b, dimensions, precision=exact, preferred_element_type=jnp.float32
    )
