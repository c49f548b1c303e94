"""Codes as vectors: a table for each position, arXiv 2507.12318 section 3."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from dlc_jax.errors import UserError
from dlc_jax.typing import Array, Float, Int


class CodeTable(nn.Module):
    """Codes to one vector: the mean over positions i of E[i, c_i].

    E is [L, V + 1, D], a table for each position. Its row V is the null value, what a denoiser
    reads without a condition.
    """

    positions: int
    values: int
    width: int

    def setup(self):
        self.table = self.param("table", _table_init, (self.positions, self.values + 1, self.width))

    def __call__(self, codes: Int[Array, "b l"] | Float[Array, "b l v"]) -> Float[Array, "b d"]:
        """Of hard codes, integers in 0..V (V is null), or of soft ones, weights over the V values.

        Soft codes may have a weight of the null value too, after the others.
        A code outside has no row: its example becomes NaN, since a compiled step cannot raise.

        Raises:
          UserError: the codes are of another shape.
        """
        self._check(codes)
        if codes.ndim == 2:
            return jnp.mean(self._rows(codes), 1, dtype=jnp.float32).astype(self.table.dtype)
        weights = codes.reshape(len(codes), -1).astype(self.table.dtype)
        return weights @ self.table[:, : codes.shape[-1]].reshape(-1, self.width) / self.positions

    def null(self) -> Float[Array, "1 d"]:
        """The vector of codes that are null everywhere."""
        vector = jnp.mean(self.table[:, self.values], axis=0, keepdims=True, dtype=jnp.float32)
        return vector.astype(self.table.dtype)

    def tokens(
        self, codes: Int[Array, "b l"] | Float[Array, "b l v"] | None, groups: int
    ) -> Float[Array, "b m d"]:
        """Vectors of `groups` runs of neighboring positions, each of variance 1 at the start.

        A token is the mean of its positions' rows times sqrt(D L / groups). None is [1, m, d], of
        null codes.

        Raises:
          UserError: the codes are of another shape.
        """
        if codes is not None:
            self._check(codes)
        if codes is None:
            rows = self.table[None, :, self.values]
        elif codes.ndim == 2:
            rows = self._rows(codes)
        else:
            weights = codes.astype(self.table.dtype)
            rows = jnp.einsum("blv,lvd->bld", weights, self.table[:, : codes.shape[-1]])
        rows = rows.reshape(len(rows), groups, -1, self.width)
        size = (self.width * self.positions / groups) ** 0.5
        return (jnp.mean(rows, 2, dtype=jnp.float32) * size).astype(self.table.dtype)

    def _rows(self, codes):
        at = self.table.at[jnp.arange(self.positions), codes]
        return at.get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)

    def _check(self, codes):
        soft = [(self.positions, count) for count in (self.values, self.values + 1)]
        if codes.shape[1:] not in ((self.positions,), *soft):
            expected = f"{self.positions} positions x {self.values} values"
            raise UserError(f"codes of shape {codes.shape[1:]} do not fit a table of {expected}")


def _table_init(key, shape):
    """N(0, 1 / D); the null row starts the same at all positions."""
    positions, rows, width = shape
    key_values, key_null = jax.random.split(key)
    values = jax.random.normal(key_values, (positions, rows - 1, width))
    null = jnp.broadcast_to(jax.random.normal(key_null, (width,)), (positions, 1, width))
    return jnp.concatenate([values, null], axis=1) * width**-0.5
