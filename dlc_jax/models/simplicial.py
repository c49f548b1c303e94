"""The heads of an encoder: simplicial embedding (arXiv 2204.00616) and DINO (arXiv 2104.14294)."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp

from dlc_jax.errors import UserError
from dlc_jax.models.layers import FAN_IN, NORMAL, ONES, Dense, LayerNorm
from dlc_jax.parallel import matmul
from dlc_jax.typing import Array, Float, Key

RELAXATIONS = ("softmax", "gumbel", "straight_through")
READOUTS = ("plain", "shared", "pos-shared")
LARGEST = 2**16  # values that the widest code store tells apart


def relax(
    logits: Float[Array, "b l v"],
    relaxation: str,
    *,
    keys: Key[Array, "b"] | None = None,
    temperature: float | Array = 1.0,
) -> Float[Array, "b l v"]:
    """Points of the simplex from logits, one for each position; float32.

    "softmax" takes softmax(logits / temperature). "gumbel" adds Gumbel noise to the logits first
    (arXiv 1611.01144). "straight_through" has the one-hot of the perturbed logits' maximum as
    value, and the gradient of "gumbel".

    Args:
      keys: one for each example, so that its noise does not depend on the batch. None draws no
        noise, and "softmax" needs none.
      temperature: above 0.
    """
    if relaxation not in RELAXATIONS:
        raise UserError(f"relaxation={relaxation!r} is not one of {', '.join(RELAXATIONS)}")
    logits = logits.astype(jnp.float32)
    if relaxation != "softmax" and keys is not None:
        # mode="high": the common 23-bit uniform lacks the far tail, which biases draws over
        # thousands of values
        draw = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], mode="high"))
        logits = logits + draw(keys)
    soft = jax.nn.softmax(logits / temperature, axis=-1)
    if relaxation != "straight_through":
        return soft
    hard = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
    return hard + (soft - jax.lax.stop_gradient(soft))  # the bracket is exactly 0


class Simplicial(nn.Module):
    """Summary tokens to L points on simplices of V corners, and back to one vector.

    The norm is taken over all L * V numbers together, so it couples the positions.

    Attributes:
      positions: L, the length of a code.
      values: V, the number of values of each position.
      relaxation: "softmax", "gumbel" or "straight_through"; see `relax`.
      readout: how the vector is made, "plain", "shared" or "pos-shared". "plain" is a linear map of
        all L * V numbers, "shared" the mean over positions of one map of V numbers, "pos-shared"
        adds a learned vector for each position to that.

    Raises:
      UserError: an unknown readout, or more values than a code store's uint16 can tell apart.
    """

    positions: int = 512
    values: int = 256
    relaxation: str = "softmax"
    readout: str = "plain"

    def setup(self):
        if self.readout not in READOUTS:
            raise UserError(f"readout={self.readout!r} is not one of {', '.join(READOUTS)}")
        if self.values > LARGEST:
            raise UserError(
                f"values={self.values} is more than {LARGEST}: codes are uint16 at most; "
                "choose fewer"
            )
        self.embed = Dense(self.positions * self.values, use_bias=False, kernel_init=FAN_IN)
        self.norm = LayerNorm()

    def logits(self, tokens: Float[Array, "b m"]) -> Float[Array, "b l v"]:
        """float32, so that narrow dtypes add no ties after the norm."""
        joint = self.embed(tokens, dtype=tokens.dtype)
        return self.norm(joint.astype(jnp.float32)).reshape(-1, self.positions, self.values)

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "b m"],
        *,
        width: int,
        keys: Key[Array, "b"] | None = None,
        temperature: float | Array = 1.0,
        read: tuple[int, int] | None = None,
    ) -> dict[str, Array]:
        """logits [b l v], simplices [b l v] (see `relax`) and vector [b d], not normalized.

        Args:
          tokens: the summary tokens of each image, side by side.
          width: d, of the vector.
          keys, temperature: see `relax`.
          read: range of positions that make the vector, (from, below); None is all. A mean over
            positions is one over those that are read.
        """
        logits = self.logits(tokens)
        simplices = relax(logits, self.relaxation, keys=keys, temperature=temperature)
        low, high = read or (0, self.positions)
        out = Dense(width, use_bias=False, kernel_init=FAN_IN, name="out")
        if self.readout == "plain":
            place = jnp.arange(self.positions)[:, None]
            inside = (place >= low) & (place < high)
            shown = simplices if read is None else jnp.where(inside, simplices, 0.0)
            vector = out(shown.reshape(len(tokens), -1))
        else:  # a linear map of the mean is the mean of the maps, at a fraction of the work
            vector = out(simplices[:, low:high].mean(1))
        if self.readout == "pos-shared":
            bias = self.param("bias", NORMAL, (self.positions, width))
            vector = vector + bias[low:high].mean(0).astype(vector.dtype)
        return {"logits": logits, "simplices": simplices, "vector": vector}

    @nn.nowrap
    def flops(self, summary: int, width: int, *, logits: bool = False) -> float:
        """FLOPs of a forward pass of `summary` tokens of `width`; with `logits`, up to those."""
        joint = self.positions * self.values
        read = joint if self.readout == "plain" else self.values
        return 2.0 * width * (summary * joint + (0 if logits else read))


class DinoHead(nn.Module):
    """Scores against prototypes (DINO, arXiv 2104.14294).

    Three dense layers, L2 norm, and a linear map whose weights are normalized.

    Attributes:
      prototypes: number of scores.
      hidden: width of the hidden layers.
      bottleneck: width of what is normalized and compared.
    """

    prototypes: int = 65_536
    hidden: int = 2048
    bottleneck: int = 256

    @nn.compact
    def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n p"]:
        x = jax.nn.gelu(Dense(self.hidden, kernel_init=NORMAL, name="fc1")(x), approximate=False)
        x = jax.nn.gelu(Dense(self.hidden, kernel_init=NORMAL, name="fc2")(x), approximate=False)
        x = Dense(self.bottleneck, kernel_init=NORMAL, name="fc3")(x)
        direction = self.param("direction", FAN_IN, (self.bottleneck, self.prototypes))
        gain = self.param("gain", ONES, (self.prototypes,))
        kernel = _unit(direction, axis=0) * gain.astype(jnp.float32)
        name = "/".join((*self.path, "direction"))
        y = matmul(
            _unit(x, axis=-1).astype(x.dtype).reshape(-1, self.bottleneck),
            kernel.astype(x.dtype),
            name,
        )
        return y.reshape(*x.shape[:-1], self.prototypes)

    @nn.nowrap
    def flops(self, width: int) -> float:
        """FLOPs of a forward pass of one token of `width`."""
        widths = (width, self.hidden, self.hidden, self.bottleneck, self.prototypes)
        return sum(2.0 * inputs * outputs for inputs, outputs in itertools.pairwise(widths))


def _unit(x, axis):
    x = x.astype(jnp.float32)
    squared = jnp.sum(x * x, axis=axis, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squared, 1e-24))  # not below a length of 1e-12
