"""Attention over a packed projection: one entry, several implementations."""

from dlc_jax.kernels import reference
from dlc_jax.typing import Array, Bool, Float

# name -> function with the keywords of `attention`; "xla" takes every input
IMPLEMENTATIONS = {"xla": reference.attention}


def attention(
    qkv: Float[Array, "b n 3 h k"],
    *,
    mask: Bool[Array, "b n"] | None = None,
    rotary: tuple[Float[Array, "*b n half"], Float[Array, "*b n half"]] | None = None,
    qk_scale: tuple[Float[Array, "k"], Float[Array, "k"]] | None = None,
    implementation: str | None = None,
) -> Float[Array, "b n h k"]:
    """Self-attention, softmax(q k^T / sqrt(k)) v per head, of one packed projection.

    The softmax is computed in float32; the result has the dtype of `qkv`. Queries and keys are
    first normalized, then rotated.

    Args:
      qkv: queries, keys and values, in this order along the third dimension.
      mask: True for the keys that count. An example needs one at least; without any its output is
        finite but means nothing.
      rotary: cosines and sines of the angle of each token and pair, [n, k/2] each, or [b, n, k/2]
        where examples differ; pair i is (x[i], x[i + k/2]).
      qk_scale: two [k] vectors; divides queries and keys by their root mean square over k, then
        multiplies by these.
      implementation: forces one of IMPLEMENTATIONS; by default the best that takes these inputs.

    Raises:
      ValueError: there is no implementation of that name.
    """
    name = implementation or "xla"
    if name not in IMPLEMENTATIONS:
        known = ", ".join(sorted(IMPLEMENTATIONS))
        raise ValueError(f"attention implementation {name!r} is unknown; known: {known}")
    return IMPLEMENTATIONS[name](qkv, mask=mask, rotary=rotary, qk_scale=qk_scale)
