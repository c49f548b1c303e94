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

__all__ = ["Array", "Bool", "Condition", "Float", "Given", "Int", "Key", "Tree", "UInt8"]

Tree = Any  # a pytree of arrays


class Given(NamedTuple):
    """What a condition is made of. Without a part the denoiser reads that part's null row.

    Attributes:
      codes: [b, l], integers in 0..V of which V is null, or [b, l, v], weights over the V values,
        after which that of null may come.
      label: [b], classes; the number of classes is the null label.
      embedding: [b, e], any vector that describes the image.
      drop: [b], True where the embedding counts as not given; codes and labels have null ids.
    """

    codes: jax.Array | None = None
    label: jax.Array | None = None
    embedding: jax.Array | None = None
    drop: jax.Array | None = None


class Condition(NamedTuple):
    """What a denoiser reads of what it was given; every part may be absent.

    Attributes:
      vector: [b, d], added to the time embedding (DLC).
      tokens: [b, m, d], read by cross-attention (DisCo-Diff).
      mask: [b, m], True where a token counts.
      context: [b, m, d], tokens that stand before the patches.
    """

    vector: jax.Array | None = None
    tokens: jax.Array | None = None
    mask: jax.Array | None = None
    context: jax.Array | None = None
