"""Attention by cuDNN, NVIDIA's library, through `jax.nn.dot_product_attention`."""

import functools

import jax
import jax.numpy as jnp

from dlc_jax.kernels import reference
from dlc_jax.typing import Array, Bool, Float

LARGEST = 128  # columns of a head, forward and back, on every generation that has it
DTYPES = ("bfloat16", "float16")


def refusal(qkv, *, platform: str, mask=None, **inputs) -> str | None:
    """Why these cannot be computed on that platform, in a clause, or None."""
    n, k = qkv.shape[1], qkv.shape[-1]
    if platform != "gpu":
        return f"cuDNN runs on NVIDIA GPUs only, not on {platform!r}"
    if str(qkv.dtype) not in DTYPES:
        return f"cuDNN's attention computes in {' or '.join(DTYPES)}, not {qkv.dtype}"
    if k % 8 or k > LARGEST:
        return f"cuDNN takes heads of a multiple of 8 up to {LARGEST}, not of {k}"
    if mask is not None and n % 2:
        return f"cuDNN takes a mask with an even number of tokens, not {n}"
    if jax.default_backend() != "gpu":
        return "cuDNN must be there when it is compiled, and this machine has no GPU"
    return _trial()


@functools.cache
def _trial() -> str | None:
    """Why a small one does not compile here, or None."""
    tokens = jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.bfloat16)
    try:
        jax.jit(_product).lower(tokens, tokens, tokens).compile()
    except (RuntimeError, NotImplementedError, ValueError) as error:  # as its versions differ
        return f"cuDNN's attention does not compile here ({' '.join(str(error).split())[:200]})"
    return None


_product = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")


def attention(
    qkv: Float[Array, "b n 3 h k"],
    *,
    mask: Bool[Array, "b n"] | None = None,
    rotary: tuple[Float[Array, "*b n half"], Float[Array, "*b n half"]] | None = None,
    qk_scale: tuple[Float[Array, "k"], Float[Array, "k"]] | None = None,
    causal: bool = False,
) -> Float[Array, "b n h k"]:
    """See `dlc_jax.kernels.attention.attention`."""
    return by_library(_product, qkv, mask, rotary, qk_scale, causal)


def by_library(product, qkv, mask, rotary, qk_scale, causal) -> Float[Array, "b n h k"]:
    """`product`, a function like `jax.nn.dot_product_attention`, of queries and keys made ready."""
    q, k, v = (qkv[:, :, part] for part in range(3))
    if qk_scale is not None:
        q, k = (reference.rms_normalize(x, scale) for x, scale in zip((q, k), qk_scale))
    if rotary is not None:
        cos, sin = (table[..., None, :] for table in rotary)
        q, k = reference.rotate(q, cos, sin), reference.rotate(k, cos, sin)
    if mask is not None:
        b, n = mask.shape
        mask = jnp.broadcast_to(mask[:, None, None, :], (b, 1, n, n))
    return product(q.astype(v.dtype), k.astype(v.dtype), v, mask=mask, is_causal=causal)
