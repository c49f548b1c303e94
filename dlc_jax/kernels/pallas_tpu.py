"""Attention as one Mosaic kernel for TPUs: it reads the packed projection, it writes [b, n, h k].

Nothing is transposed or padded in HBM: a program takes whole examples, all their heads, into VMEM.
All keys of a head are there at once, so that the softmax takes one pass. The backward pass computes
the weights again from the projection, its only residual. What a program computes: `tpu_program`.
"""

import functools
import math

import jax
import jax.numpy as jnp

from dlc_jax.kernels import tpu_program

ROWS = 512  # a program of short sequences takes examples until it has as many tokens
MIB = 2**20
WIDE = ("TPU v6 lite", "TPU7x")  # with a matrix unit of 256 by 256
# What a program may take of VMEM, 64 MiB a core or more; device kinds with less by name.
VMEM, LESS_VMEM = 48 * MIB, {"TPU v4": 15 * MIB, "TPU v3": 15 * MIB, "TPU v2": 15 * MIB}


def attention(qkv, *, bias=None, mask=None, rotary=None, qk_scale=None, causal=False):
    """See `dlc_jax.kernels.attention.attention`; `qkv` has the bias already, but not its gradient.

    The backward pass sums that on the way: XLA would read the projection's gradient once more.
    """
    b, n, _, h, k = qkv.shape
    given = {}
    if mask is not None:
        given["mask"] = mask.astype(jnp.float32)[:, None]
    if rotary is not None:
        given["rotary"] = jnp.concatenate(rotary, axis=-1).astype(jnp.float32).mT
    scales = None if qk_scale is None else jnp.stack(qk_scale, axis=-1).astype(jnp.float32)
    bias = None if bias is None else bias.reshape(1, 3 * h * k)
    out = _attention(qkv.reshape(b, n, 3 * h * k), bias, scales, given, h, causal)
    return out.reshape(b, n, h, k)


def refusal(qkv, *, mask, rotary, qk_scale, causal, platform) -> str | None:
    """Why this cannot be computed on that platform; see `attention.IMPLEMENTATIONS`."""
    if platform not in ("tpu", "cpu"):
        return f"it is for TPUs, not {platform}"
    if qkv.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it takes bfloat16 or float32, not {qkv.dtype}"
    n, _, h, k = qkv.shape[1:]
    if k % 8:
        return f"heads of {k} are not a multiple of 8"
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


def _lanes() -> int:
    """Width of the matrix unit."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return 256 if device and device.device_kind in WIDE else 128


def _vmem(g, n, h, k, dtype, *, backward, buffers) -> int:
    """Bytes of VMEM of a program of g examples: its blocks, and what it computes with."""
    rows, columns = _padded(n, 16), _padded(n, 128)
    width = _padded(3 * h * k, 128) * (2 if backward else 1) + _padded(h * k, 128)
    blocks = buffers * g * rows * width * dtype.itemsize
    turned = 4 * columns * (4 * h * k + 16 * k)  # a tenth of it for vectors of one head
    # logits, weights, their gradients, what is kept
    squares = 6 * 4 * rows * (columns if n <= tpu_program.WHOLE else tpu_program.TILE)
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(qkv, bias, scales, given, h, causal):
    """[b, n, 3 h k] -> [b, n, h k]; scales [k, 2] or None, given {"mask", "rotary"}.

    The bias, [1, 3 h k] or None, is here for its gradient alone.
    """
    b, n, width = qkv.shape
    shape = jax.ShapeDtypeStruct((b, n, width // 3), qkv.dtype)
    return _call(tpu_program.forward, {"qkv": qkv}, scales, given, {"out": shape}, h, causal)["out"]


def _attention_forward(qkv, bias, scales, given, h, causal):
    return _attention(qkv, bias, scales, given, h, causal), (qkv, bias, scales, given)


def _attention_backward(h, causal, kept, dout):
    qkv, bias, scales, given = kept
    k = qkv.shape[2] // (3 * h)
    shapes = {"dqkv": jax.ShapeDtypeStruct(qkv.shape, qkv.dtype)}
    programs = len(qkv) // _examples(*qkv.shape[:2], h, k, qkv.dtype, backward=True)
    sums = {"dbias": bias, "dscales": scales}  # one of each program
    for name, array in sums.items():
        if array is not None:
            shapes[name] = jax.ShapeDtypeStruct((programs, *array.shape), jnp.float32)
    found = _call(
        tpu_program.backward, {"qkv": qkv, "dout": dout}, scales, given, shapes, h, causal
    )
    summed = (
        None if array is None else found[name].sum(0).astype(array.dtype)
        for name, array in sums.items()
    )
    return found["dqkv"], *summed, None


_attention.defvjp(_attention_forward, _attention_backward)


def _call(body, arrays, scales, given, shapes, h, causal):
    """{name: array} of `shapes`, by a grid of programs of several examples."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    qkv = arrays["qkv"]
    b, n, width = qkv.shape
    k, backward = width // (3 * h), body is tpu_program.backward
    g = _examples(b, n, h, k, qkv.dtype, backward=backward)
    arrays = arrays | given | ({} if scales is None else {"scales": scales})

    needs = functools.partial(_vmem, g, n, h, k, qkv.dtype, backward=backward)
    buffers = 2 if needs(buffers=2) < _available() else 1

    def spec(name, array):
        if array.ndim == 2:  # the same for all examples
            return pl.BlockSpec(array.shape, lambda i: (0, 0))
        block = (None if name in ("dbias", "dscales") else g, *array.shape[1:])
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
            flops=(10 if backward else 4) * b * n * n * h * _padded(k, _lanes()),
            transcendentals=b * h * n * n,
            bytes_accessed=moved,
        ),
        interpret=tpu_program.is_simulated(),
        name=f"attention_{body.__name__}",
    )(*arrays.values())
    return dict(zip(shapes, out))
