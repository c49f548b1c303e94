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

from dlc_jax.kernels.reference import QK_EPS
from dlc_jax.typing import Array

ROWS = 512  # a program of short sequences takes examples until it has as many tokens
WHOLE, TILE = 512, 256  # up to so many queries at a time; of more, so many
UNROLL = 4  # heads in a turn of the loop over them: one's softmax beside another's products
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
        given["rotary"] = jnp.concatenate(rotary, axis=-1).astype(jnp.float32).mT
    scales = None if qk_scale is None else jnp.stack(qk_scale, axis=-1).astype(jnp.float32)
    out = _attention(qkv.reshape(b, n, 3 * h * k), scales, given, h, causal)
    return out.reshape(b, n, h, k)


def refusal(qkv, *, mask, rotary, qk_scale, causal, platform) -> str | None:
    """Why this cannot be computed on that platform; see `attention.IMPLEMENTATIONS`."""
    if platform not in ("tpu", "cpu"):
        return f"it is for TPUs, not {platform}"
    if qkv.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it takes bfloat16 or float32, not {qkv.dtype}"
    n, _, h, k = qkv.shape[1:]
    needed = _vmem(1, n, h, k, qkv.dtype, backward=True, buffers=1)
    if needed > _available():
        return (
            f"{n} tokens of {h} heads of {k} need {needed / MIB:.0f} MiB of VMEM, and a program "
            f"may take {_available() // MIB}"
        )
    return None


def _available() -> int:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return LESS_VMEM.get(device.device_kind if device else "", VMEM)


def _vmem(g, n, h, k, dtype, *, backward, buffers) -> int:
    """Bytes of VMEM of a program of g examples: its blocks, and what it computes with."""
    rows, columns = _padded(n, 16), _padded(n, 128)
    width = _padded(3 * h * k, 128) * (2 if backward else 1) + _padded(h * k, 128)
    blocks = buffers * g * rows * width * dtype.itemsize
    turned = 4 * columns * (4 * h * k + 16 * k)  # a tenth of it for vectors of one head
    # logits, weights, their gradients, what is kept
    squares = 6 * 4 * rows * (columns if n <= WHOLE else TILE)
    return blocks + turned + squares + MIB


def _padded(size, unit):
    return -(-size // unit) * unit


def _examples(b, n, h, k, dtype, *, backward) -> int:
    """How many examples a program takes: a divisor of b."""
    for g in range(min(b, max(1, ROWS // n)), 1, -1):
        if b % g == 0 and _vmem(g, n, h, k, dtype, backward=backward, buffers=2) < _available():
            return g
    return 1


# ---- the calls


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attention(qkv, scales, given, h, causal):
    """[b, n, 3 h k] -> [b, n, h k]; scales [k, 2] or None, given {"mask", "rotary"}."""
    b, n, width = qkv.shape
    shape = jax.ShapeDtypeStruct((b, n, width // 3), qkv.dtype)
    return _call(_forward, {"qkv": qkv}, scales, given, {"out": shape}, h, causal)["out"]


def _attention_forward(qkv, scales, given, h, causal):
    return _attention(qkv, scales, given, h, causal), (qkv, scales, given)


def _attention_backward(h, causal, kept, dout):
    qkv, scales, given = kept
    shapes = {"dqkv": jax.ShapeDtypeStruct(qkv.shape, qkv.dtype)}
    if scales is not None:  # a sum for each program
        g = _examples(*qkv.shape[:2], h, len(scales), qkv.dtype, backward=True)
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

    needs = functools.partial(_vmem, g, n, h, k, qkv.dtype, backward=backward)
    buffers = 2 if needs(buffers=2) < _available() else 1

    def spec(name, array):
        if array.ndim == 2:  # the same for all examples
            return pl.BlockSpec(array.shape, lambda i: (0, 0))
        block = (None if name == "dscales" else g, *array.shape[1:])
        return pl.BlockSpec(block, lambda i: (i, 0, 0), pipeline_mode=pl.Buffered(buffers))

    def kernel(*refs):
        refs = dict(zip((*arrays, *shapes, *scratch), refs))
        body(refs, h, causal)

    scratch = {"qkv_turned": (width, n), ("dout" if backward else "out") + "_turned": (h * k, n)}
    if backward:
        scratch |= {"dkey": (k, n), "dvalue": (k, n)}
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
            vmem_limit_bytes=max(needs(buffers=buffers), 16 * MIB),
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


def _backward(refs, h, causal):
    if "dscales" in refs:
        refs["dscales"][...] = jnp.zeros_like(refs["dscales"])

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
    step = next(size for size in (UNROLL, 2, 1) if h % size == 0)

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
        refs[target][index] = refs[f"{result}_turned"][...].astype(refs[target].dtype).T
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
    if _is_simulated():  # a CPU knows no products of bfloat16 in float32; these are the same
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    dimensions = (((i,), (j,)), ((), ()))
    return jax.lax.dot_general(
        a, b, dimensions, precision=exact, preferred_element_type=jnp.float32
    )
