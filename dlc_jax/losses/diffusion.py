"""The loss of a denoiser on the linear path."""

import jax.numpy as jnp
from jaxtyping import ScalarLike

from dlc_jax.diffusion import schedules
from dlc_jax.errors import UserError
from dlc_jax.typing import Array, Float


def flow_loss(
    prediction: Float[Array, "b *shape"],
    x0: Float[Array, "b *shape"],
    noise: Float[Array, "b *shape"],
    t: Float[Array, "b"],
    *,
    kind: str,
    floor: ScalarLike = 0.1,
) -> Float[Array, "b"]:
    """Mean squared error on the velocity, per example.

    Args:
      prediction: of the network at x_t: the velocity noise - x0 (`kind` "v") or the data x0 ("x").
      floor: the data's error becomes the velocity's when divided by t^2; t is held above `floor`
        there, or the least noisy examples would be all that counts. Kind "v" has no such weight.

    Raises:
      UserError: another kind.

    Source: x-prediction with a loss on the velocity (arXiv 2511.13720).
    """
    prediction, x0, noise = (value.astype(jnp.float32) for value in (prediction, x0, noise))
    if kind == "v":
        return _mean_square(prediction - (noise - x0))
    if kind == "x":
        return schedules.data_weight(t, floor=floor) * _mean_square(prediction - x0)
    raise UserError(f"prediction={kind!r} is unknown; known: v, x")


def _mean_square(x):
    return jnp.square(x).mean(tuple(range(1, x.ndim)))
