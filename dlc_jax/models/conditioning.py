"""What a denoiser reads beside the vector of codes: classes, embeddings, tokens of codes."""

import flax.linen as nn
import jax.numpy as jnp

from dlc_jax.errors import UserError
from dlc_jax.models.layers import NORMAL, Dense
from dlc_jax.typing import Array, Bool, Float, Int


class LabelTable(nn.Module):
    """A vector for each class; the row `classes`, one more than there are, is the null label."""

    classes: int
    width: int

    @nn.compact
    def __call__(self, label: Int[Array, "*b"] | None) -> Float[Array, "n d"]:
        """None is the null label, [1, d]. A label outside 0..classes makes its example NaN.

        Raises:
          UserError: the labels are not one number an example.
        """
        table = self.param("table", NORMAL, (self.classes + 1, self.width))
        if label is None:
            return table[self.classes :]
        if label.ndim != 1:
            raise UserError(f"labels of shape {label.shape}; give one class number an example, [b]")
        return table.at[label].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


class EmbeddingInput(nn.Module):
    """A linear map, without bias, of any vector that describes the image; its null is learned."""

    inputs: int
    width: int

    @nn.compact
    def __call__(
        self, embedding: Float[Array, "b e"] | None, drop: Bool[Array, "b"] | None
    ) -> Float[Array, "b d"]:
        """None is the null vector's, [1, d]; examples where `drop` is True read that too.

        Raises:
          UserError: the embedding is of another width.
        """
        null = self.param("null", NORMAL, (self.inputs,))
        if embedding is None:
            embedding = null[None]
        if embedding.shape[1:] != (self.inputs,):
            found = embedding.shape[1:]
            raise UserError(f"embeddings of shape {found} do not fit a DiT with {self.inputs}")
        if drop is not None:
            embedding = jnp.where(drop[:, None], null.astype(embedding.dtype), embedding)
        return Dense(self.width, use_bias=False, name="dense")(embedding)


class CodeTokens(nn.Module):
    """Tokens of codes as blocks read them: a linear map, and a learned vector for their place.

    With `null` a learned token comes last, which attention can look at when no code matters.
    """

    null: bool = False

    @nn.compact
    def __call__(self, tokens: Float[Array, "b m d"]) -> Float[Array, "b mm d"]:
        b, m, width = tokens.shape
        position = self.param("position", NORMAL, (m, width))
        tokens = Dense(width, name="dense")(tokens)
        tokens = tokens + position.astype(tokens.dtype)
        if not self.null:
            return tokens
        null = self.param("null", NORMAL, (width,)).astype(tokens.dtype)
        return jnp.concatenate([tokens, jnp.broadcast_to(null, (b, 1, width))], axis=1)
