"""Attention on NVIDIA GPUs by Pallas; the packed projection is read where it lies.

It takes Pallas' Triton path. Mosaic GPU, which upstream prefers, copies no tile of 72 columns or of
54 rows out of a packed array (jax 0.10.2: sides must be multiples of the tile), and its Hopper
products have no exact float32.

A program computes one block of rows of one head. Keys and values pass by in blocks, with a running
softmax; only the logarithm of its sum is kept. One program of the gradient computes that of its
rows as queries, keys and values, and writes all three into one packed array.
"""

import functools

import jax
import jax.numpy as jnp

from dlc_jax.typing import Array, Bool, Float

LARGEST = 128  # columns of a head that fit on chip
DTYPES = ("bfloat16", "float16", "float32")
OLDEST = 8.0  # compute capability: Ampere


def refusal(qkv, *, platform: str, rotary=None, **inputs) -> str | None:
    """Why these cannot be computed on that platform, in a clause, or None."""
    k = qkv.shape[-1]
    if platform not in ("gpu", "cpu"):
        return f"it runs on NVIDIA GPUs, and slowly on CPUs, not on {platform!r}"
    if str(qkv.dtype) not in DTYPES:
        return f"it computes in {', '.join(DTYPES)}, not {qkv.dtype}"
    if k > LARGEST:
        return f"heads of {k} are wider than the {LARGEST} that fit on chip"
    if rotary is not None and k % 2:
        return f"heads of {k} cannot be rotated in pairs"
    if platform == "gpu" and jax.default_backend() == "gpu":
        device = jax.local_devices()[0]
        capability = getattr(device, "compute_capability", "")
        if not capability.replace(".", "").isdigit():
            return f"it is for NVIDIA GPUs, and this is a {device.device_kind}"
        if float(capability) < OLDEST:
            return f"it needs compute capability {OLDEST}, and this GPU has {capability}"
    return None


def attention(
    qkv: Float[Array, "b n 3 h k"],
    *,
    mask: Bool[Array, "b n"] | None = None,
    rotary: tuple[Float[Array, "*b n half"], Float[Array, "*b n half"]] | None = None,
    qk_scale: tuple[Float[Array, "k"], Float[Array, "k"]] | None = None,
    causal: bool = False,
) -> Float[Array, "b n h k"]:
    """See `dlc_jax.kernels.attention.attention`; on CPUs interpreted, which is slow."""
    if qkv.shape[1] == 1:  # a token alone reads itself
        return qkv[:, :, 2]
    return _attention(qkv, mask, rotary, qk_scale, causal)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(qkv, mask, rotary, qk_scale, causal):
    return _forward(qkv, mask, rotary, qk_scale, causal)[0]


def _forward(qkv, mask, rotary, qk_scale, causal):
    """The output, and base-2 logarithms of the sums of the softmax, [b, h, n and more]."""
    from dlc_jax.kernels import triton_attention as program

    b, n, _, h, k = qkv.shape
    rows, keys = _blocks(n, qkv.dtype)
    padded = _up(n, rows)
    head = (None, rows, None, program.covered(k, rotary is not None))
    return _call(
        program.forward,
        (qkv, mask, rotary, qk_scale, ()),
        out_shape=(
            jax.ShapeDtypeStruct((b, n, h, k), qkv.dtype),
            jax.ShapeDtypeStruct((b, h, padded), jnp.float32),
        ),
        out_specs=(
            (head, lambda h, i, b: (b, i, h, 0)),
            ((None, None, rows), lambda h, i, b: (b, h, i)),
        ),
        causal=causal,
        rows=rows,
        keys=keys,
        warps=max(1, rows // 16),
    )


def _saved(qkv, mask, rotary, qk_scale, causal):
    out, lse = _forward(qkv, mask, rotary, qk_scale, causal)
    return out, (qkv, mask, rotary, qk_scale, out, lse)


def _backward(causal, saved, out_grad):
    from dlc_jax.kernels import triton_attention as program

    qkv, mask, rotary, qk_scale, out, lse = saved
    b, n, _, h, k = qkv.shape
    rows = _blocks(n, qkv.dtype)[1]
    padded, width = _up(n, rows), program.covered(k, rotary is not None)
    out_shape = [jax.ShapeDtypeStruct(qkv.shape, qkv.dtype)]
    out_specs = [((None, rows, 3, None, width), lambda h, i, b: (b, i, 0, h, 0))]
    if qk_scale is not None:
        shares = (b, h, padded // rows, 2, k)
        out_shape.append(jax.ShapeDtypeStruct(shares, jnp.float32))
        out_specs.append(((None, None, None, 2, width), lambda h, i, b: (b, h, i, 0, 0)))
    grad, *shares = _call(
        program.backward,
        (qkv, mask, rotary, qk_scale, (out, out_grad, lse)),
        out_shape=out_shape,
        out_specs=out_specs,
        causal=causal,
        rows=rows,
        # by the registers that ptxas counts: below these it spills
        warps=max(1, rows // (16 if rotary is qk_scale is None else 8)),
    )
    if qk_scale is not None:
        both = jnp.sum(shares[0], axis=(0, 1, 2))
        qk_scale = tuple(x.astype(scale.dtype) for x, scale in zip(both, qk_scale))
    return grad, None, None, qk_scale


_attention.defvjp(_saved, _backward)


def _call(body, arrays, *, out_shape, out_specs, causal, rows, warps, **blocks):
    """Runs a body of `triton_attention`, one program for each head, block of rows and example."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    from dlc_jax.kernels.triton_attention import covered

    qkv, mask, rotary, qk_scale, more = arrays
    b, n, _, h, k = qkv.shape
    padded, width = _up(n, rows), covered(k, rotary is not None)

    def of_example(table):
        if table.ndim == 2:
            return pl.BlockSpec((padded, width), lambda h, i, b: (0, 0))
        return pl.BlockSpec((None, padded, width), lambda h, i, b: (b, 0, 0))

    inputs = {
        "qkv": (qkv,) * 3,
        "mask": None if mask is None else mask.astype(jnp.int8),
        "rotary": rotary,
        "qk_scale": qk_scale and tuple(scale[None].astype(jnp.float32) for scale in qk_scale),
    }
    head = pl.BlockSpec((None, padded, None, width), lambda h, i, b: (b, 0, h, 0))
    part = (None, padded, None, None, width)
    specs = {
        "qkv": tuple(pl.BlockSpec(part, lambda h, i, b, p=p: (b, 0, p, h, 0)) for p in range(3)),
        "mask": mask if mask is None else pl.BlockSpec((None, padded), lambda h, i, b: (b, 0)),
        "rotary": rotary and tuple(of_example(table) for table in rotary),
        "qk_scale": qk_scale and (pl.BlockSpec((1, width), lambda h, i, b: (0, 0)),) * 2,
    }
    sums = pl.BlockSpec((None, None, padded), lambda h, i, b: (b, h, 0))

    def run(*arrays, interpret):
        return pl.pallas_call(
            functools.partial(body, n=n, k=k, causal=causal, rows=rows, **blocks),
            out_shape=out_shape,
            in_specs=(specs, *(head, head, sums)[: len(more)]),
            out_specs=[pl.BlockSpec(*spec) for spec in out_specs],
            grid=(h, padded // rows, b),
            compiler_params=triton.CompilerParams(num_warps=warps, num_stages=2),
            interpret=interpret,
            name=f"attention_{body.__name__}",
        )(*arrays)

    # where it runs is known when it is compiled
    return jax.lax.platform_dependent(
        inputs,
        *more,
        cpu=functools.partial(run, interpret=True),
        cuda=functools.partial(run, interpret=False),
    )


def _blocks(n: int, dtype) -> tuple[int, int]:
    """Rows of a program, and keys that it takes at a time: powers of two, 16 at least."""
    most = 32 if dtype == jnp.float32 else 64
    keys = 16
    while keys < min(n, most):
        keys *= 2
    wide = dtype != jnp.float32 and n % 128 == 0
    return (128 if wide else keys), keys


def _up(n: int, block: int) -> int:
    return -(-n // block) * block
