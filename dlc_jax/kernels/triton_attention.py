"""The programs of `pallas_gpu`: what one program of the GPU reads, computes and writes.

Tensor cores take tiles whose sides are powers of two. So a head is read in pieces of columns, and a
sequence in blocks of rows; a mask hides what lies beyond the head or the sequence. A head of 72
columns is read as 64 and 16, of which 8 count, and so costs 80 columns of arithmetic, not 128.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dlc_jax.kernels.reference import QK_EPS

LOWEST = float(jnp.finfo(jnp.float32).min)  # the logit of a key that does not count
QUERY, KEY, VALUE = range(3)  # places in the packed projection


def pieces(start: int, size: int) -> list[tuple[int, int, int]]:
    """Columns start..start+size as (first, width, of them used); widths are powers of two."""
    width = max(16, pl.next_power_of_2(size))
    if width > 16 and 4 * size <= 3 * width:  # two narrower pieces cost less
        width //= 2
    used = min(width, size)
    rest = pieces(start + used, size - used) if size > used else []
    return [(start, width, used), *rest]


def columns(k: int, rotated: bool) -> list[tuple[int, int, int]]:
    """Pieces of a query or key; where it is rotated, those of its first half, then its second."""
    return pieces(0, k // 2) + pieces(k // 2, k // 2) if rotated else pieces(0, k)


def covered(k: int, rotated: bool) -> int:
    """Columns that the pieces of a head reach over, k at least."""
    both = pieces(0, k) + columns(k, rotated)
    return max(first + width for first, width, _ in both)


def _dot(x, y, over):
    """Product of two tiles, summed over axis over[0] of x and over[1] of y, in float32."""
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    dims = (((over[0],), (over[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dims, exact, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class Head:
    """One head of one example, in the GPU's memory.

    Attributes:
      qkv: references to three [n, k].
      mask: reference to [n], not 0 for the keys that count, or None.
      rotary: references to two [n, k/2], or None.
      qk_scale: references to two [1, k], or None.
      n, k: sizes without what the references have beyond them.
      causal: as in `attention`.
    """

    qkv: tuple
    mask: object
    rotary: tuple | None
    qk_scale: tuple | None
    n: int
    k: int
    causal: bool

    def inside(self, start, count: int, used: int, width: int):
        """Where a tile of `count` rows and `width` columns lies within the sequence and head."""
        rows = (start + jnp.arange(count))[:, None] < self.n
        return rows & (jnp.arange(width) < used)[None, :]

    def read(self, ref, start, count: int, parts):
        """Tiles [count, width] of the rows from `start`, a list; zero where nothing is."""
        return [
            triton.load(
                ref.at[pl.ds(start, count), pl.ds(first, width)],
                mask=self.inside(start, count, used, width),
                other=0.0,
            )
            for first, width, used in parts
        ]

    def values(self, start, count: int):
        return self.read(self.qkv[VALUE], start, count, pieces(0, self.k))

    def _vector(self, part: int):
        parts = columns(self.k, self.rotary is not None)
        return [
            triton.load(
                self.qk_scale[part].at[:, pl.ds(first, width)],
                mask=(jnp.arange(width) < used)[None, :],
                other=0.0,
            )
            for first, width, used in parts
        ]

    def _raw(self, part: int, start, count: int):
        parts = columns(self.k, self.rotary is not None)
        return self.read(self.qkv[part], start, count, parts)

    def _angles(self, start, count: int):
        parts = pieces(0, self.k // 2)
        return (self.read(table, start, count, parts) for table in self.rotary)

    def _over_rms(self, tiles):
        """Tiles divided by their root mean square over k, and one over it, [count, 1]."""
        tiles = [tile.astype(jnp.float32) for tile in tiles]
        square = sum(jnp.sum(tile * tile, axis=1) for tile in tiles)
        rate = jax.lax.rsqrt(square / self.k + QK_EPS)[:, None]
        return [tile * rate for tile in tiles], rate

    def turned(self, part: int, start, count: int):
        """Queries or keys, normalized and rotated, in the dtype of the values."""
        tiles = self._raw(part, start, count)
        if self.qk_scale is not None:
            tiles, _ = self._over_rms(tiles)
            tiles = [tile * scale for tile, scale in zip(tiles, self._vector(part))]
        if self.rotary is not None:
            cos, sin = self._angles(start, count)
            tiles = _rotated([tile.astype(jnp.float32) for tile in tiles], cos, sin)
        return [tile.astype(self.qkv[VALUE].dtype) for tile in tiles]

    def turned_back(self, part: int, grads, start, count: int):
        """Gradients of `turned` -> of its input, and of the scale summed over rows, or None."""
        if self.rotary is not None:
            cos, sin = self._angles(start, count)
            grads = _rotated(grads, cos, [-tile for tile in sin])
        if self.qk_scale is None:
            return grads, None
        tiles, rate = self._over_rms(self._raw(part, start, count))
        scale_grads = [jnp.sum(grad * tile, axis=0) for grad, tile in zip(grads, tiles)]
        grads = [grad * scale for grad, scale in zip(grads, self._vector(part))]
        along = sum(jnp.sum(grad * tile, axis=1) for grad, tile in zip(grads, tiles))
        along = (along / self.k)[:, None]
        return [rate * (grad - tile * along) for grad, tile in zip(grads, tiles)], scale_grads

    def logits(self, q, k, q_start, k_start):
        """[queries, keys] in units of log 2, and where a gradient goes through, or None."""
        logits = sum(_dot(x, y, over=(1, 1)) for x, y in zip(q, k))
        logits = logits * (math.log2(math.e) * self.k**-0.5)
        rows, keys = logits.shape
        places = k_start + jnp.arange(keys)
        counts = None
        if self.mask is not None:
            counts = triton.load(self.mask.at[pl.ds(k_start, keys)], mask=places < self.n, other=0)
            counts = jnp.broadcast_to((counts != 0)[None, :], logits.shape)
        if self.causal:
            before = places[None, :] <= (q_start + jnp.arange(rows))[:, None]
            counts = before if counts is None else counts & before
        if counts is not None:
            logits = jnp.where(counts, logits, LOWEST)
        if self.n % keys:  # no key at all
            logits = jnp.where(places[None, :] < self.n, logits, -jnp.inf)
        return logits, counts


def _rotated(tiles, cos, sin):
    """Turns each pair of columns; `tiles` are those of the first half, then of the second."""
    half = len(tiles) // 2
    first, second = tiles[:half], tiles[half:]
    turned = [x * c - y * s for x, y, c, s in zip(first, second, cos, sin)]
    return turned + [y * c + x * s for x, y, c, s in zip(first, second, cos, sin)]


def _zeros(rows: int, parts):
    return [jnp.zeros((rows, width), jnp.float32) for _, width, _ in parts]


def forward(inputs, out, lse, *, rows: int, keys: int, **sizes) -> None:
    """One block of queries against all keys, with a running maximum (arXiv 2205.14135).

    Args:
      inputs: references by name, see Head.
      out: reference to the block's [rows, k].
      lse: reference to the block's [rows]: base-2 logarithm of the sum of the softmax.
    """
    head = Head(**inputs, **sizes)
    start = pl.program_id(1) * rows
    q = head.turned(QUERY, start, rows)

    def block(index, carry):
        outs, most, total = carry
        k = head.turned(KEY, index * keys, keys)
        logits, _ = head.logits(q, k, start, index * keys)
        new = jnp.maximum(most, jnp.max(logits, axis=1))
        weights = jnp.exp2(logits - new[:, None])
        rate = jnp.exp2(most - new)
        total = total * rate + jnp.sum(weights, axis=1)
        values = head.values(index * keys, keys)
        narrow = weights.astype(head.qkv[VALUE].dtype)
        outs = [x * rate[:, None] + _dot(narrow, v, over=(1, 0)) for x, v in zip(outs, values)]
        return outs, new, total

    parts = pieces(0, head.k)
    begin = (_zeros(rows, parts), jnp.full(rows, LOWEST), jnp.zeros(rows, jnp.float32))
    count = pl.cdiv(head.n, keys)
    if head.causal:
        count = jnp.minimum(count, pl.cdiv(start + rows, keys))
    outs, most, total = jax.lax.fori_loop(0, count, block, begin)
    for tile, (first, width, used) in zip(outs, parts):
        mask = head.inside(start, rows, used, width)
        tile = (tile / total[:, None]).astype(out.dtype)
        triton.store(out.at[:, pl.ds(first, width)], tile, mask=mask)
    lse[...] = most + jnp.log2(total)


def backward(inputs, out, out_grad, lse, grad, scale_grad=None, *, rows: int, **sizes) -> None:
    """Gradients of one block of rows: as keys and values against all queries, then as queries.

    Args:
      inputs: references by name, see Head.
      out, out_grad: references to [n, k], what `forward` wrote and its gradient.
      lse: reference to [n], from `forward`.
      grad: reference to the block's [rows, 3, k].
      scale_grad: reference to the block's [2, k], the share of these rows, or None.
    """
    head = Head(**inputs, **sizes)
    block = pl.program_id(1)
    start = block * rows
    parts = pieces(0, head.k)
    turned = columns(head.k, head.rotary is not None)

    def logit_grads(q, k, values, out_grads, delta, peak, q_start, k_start):
        logits, counts = head.logits(q, k, q_start, k_start)
        weights = jnp.exp2(logits - peak[:, None])
        grads = sum(_dot(g, v, over=(1, 1)) for g, v in zip(out_grads, values))
        grads = weights * (grads - delta[:, None])
        if counts is not None:
            grads = jnp.where(counts, grads, 0.0)
        return weights.astype(head.qkv[VALUE].dtype), grads.astype(head.qkv[VALUE].dtype)

    def of_queries(at):
        """out_grad's tiles, the row sums of out * out_grad, and lse."""
        grads = head.read(out_grad, at, rows, parts)
        outs = head.read(out, at, rows, parts)
        wide = [g.astype(jnp.float32) * o.astype(jnp.float32) for g, o in zip(grads, outs)]
        return grads, sum(jnp.sum(x, axis=1) for x in wide), lse[pl.ds(at, rows)]

    def write(part, tiles, parts):
        for tile, (first, width, used) in zip(tiles, parts):
            place = grad.at[:, pl.ds(part, 1), pl.ds(first, width)]
            mask = head.inside(start, rows, used, width)
            triton.store(place, tile.astype(grad.dtype)[:, None], mask=mask[:, None])

    def finish(part, grads):
        grads = [x * head.k**-0.5 for x in grads]
        grads, scale_grads = head.turned_back(part, grads, start, rows)
        write(part, grads, turned)
        for tile, (first, width, used) in zip(scale_grads or (), turned):
            place = scale_grad.at[pl.ds(part, 1), pl.ds(first, width)]
            triton.store(place, tile[None], mask=(jnp.arange(width) < used)[None])

    k, values = head.turned(KEY, start, rows), head.values(start, rows)

    def as_keys(index, carry):
        k_grads, v_grads = carry
        at = index * rows
        q = head.turned(QUERY, at, rows)
        out_grads, delta, peak = of_queries(at)
        weights, grads = logit_grads(q, k, values, out_grads, delta, peak, at, start)
        v_grads = [x + _dot(weights, g, over=(0, 0)) for x, g in zip(v_grads, out_grads)]
        return [x + _dot(grads, tile, over=(0, 0)) for x, tile in zip(k_grads, q)], v_grads

    first = block if head.causal else 0
    begin = (_zeros(rows, turned), _zeros(rows, parts))
    k_grads, v_grads = jax.lax.fori_loop(first, pl.cdiv(head.n, rows), as_keys, begin)
    write(VALUE, v_grads, parts)
    finish(KEY, k_grads)

    q = head.turned(QUERY, start, rows)
    own = of_queries(start)

    def as_queries(index, q_grads):
        k, values = head.turned(KEY, index * rows, rows), head.values(index * rows, rows)
        _, grads = logit_grads(q, k, values, *own, start, index * rows)
        return [x + _dot(grads, tile, over=(1, 0)) for x, tile in zip(q_grads, k)]

    last = block + 1 if head.causal else pl.cdiv(head.n, rows)
    q_grads = jax.lax.fori_loop(0, last, as_queries, _zeros(rows, turned))
    finish(QUERY, q_grads)
