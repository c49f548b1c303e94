"""Names of array dimensions and the few types that cross rooms.

Dimension letters, the same everywhere:

    b  examples in a batch        d  width of a token           y, x  image rows, columns
    n  tokens in a sequence       h  attention heads            c     image channels
    l  positions in a code (L)    k  width of one head          t     time: 1 is noise, 0 is data
    v  values of a position (V)   p  prototypes of a DINO head  g     crops of one image

Annotations such as `Float[Array, "b n d"]` are checked at run time in the tests only.
"""

from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

__all__ = ["Array", "Bool", "Condition", "Float", "Int", "Key", "Tree", "UInt8"]

Tree = Any  # a pytree of arrays


class Condition(NamedTuple):
    """What a denoiser reads of the codes; every part may be absent.

    Attributes:
      vector: [b, d], added to the time embedding (DLC).
      tokens: [b, l, d], read by cross-attention (DisCo-Diff).
      mask: [b, l], True where a token counts.
    """

    vector: jax.Array | None = None
    tokens: jax.Array | None = None
    mask: jax.Array | None = None
