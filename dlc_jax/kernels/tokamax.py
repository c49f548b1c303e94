"""Attention by tokamax, Google's library of kernels; it is optional and needs Python 3.12."""

import importlib.util

from dlc_jax.kernels.cudnn import by_library
from dlc_jax.typing import Array, Bool, Float


def refusal(qkv, *, platform: str, **inputs) -> str | None:
    """Why these cannot be computed on that platform, in a clause, or None."""
    if platform not in ("gpu", "tpu"):
        return f"tokamax has kernels for GPUs and TPUs, not for {platform!r}"
    if str(qkv.dtype) not in ("bfloat16", "float16"):
        return f"tokamax is taken in bfloat16 or float16, not {qkv.dtype}"
    if importlib.util.find_spec("tokamax") is None:
        return "the package is not installed; pip install tokamax (Python 3.12 or newer)"
    return None


def attention(
    qkv: Float[Array, "b n 3 h k"],
    *,
    mask: Bool[Array, "b n"] | None = None,
    rotary: tuple[Float[Array, "*b n half"], Float[Array, "*b n half"]] | None = None,
    qk_scale: tuple[Float[Array, "k"], Float[Array, "k"]] | None = None,
    causal: bool = False,
) -> Float[Array, "b n h k"]:
    """See `dlc_jax.kernels.attention.attention`."""
    import tokamax

    return by_library(tokamax.dot_product_attention, qkv, mask, rotary, qk_scale, causal)
