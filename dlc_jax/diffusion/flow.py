"""The linear path from data to noise, x_t = (1 - t) x0 + t eps, with velocity v = eps - x0.

A network may predict the velocity ("v") or the data ("x"). Either follows from the other and x_t,
so what comes after the network (guidance, integrators) works on velocities alone. Source: rectified
flow (arXiv 2209.03003), flow matching (arXiv 2210.02747).
"""

import jax.numpy as jnp
from jaxtyping import ScalarLike, Shaped

from dlc_jax.errors import UserError
from dlc_jax.typing import Array, Float

KINDS = ("v", "x")


def interpolate(
    x0: Float[Array, "b *shape"], noise: Float[Array, "b *shape"], t: Float[Array, "b"]
) -> Float[Array, "b *shape"]:
    """x_t, each example at its own time: x0 at t=0, noise at t=1."""
    t = per_example(t, x0)
    return (1 - t) * x0 + t * noise


def to_velocity(
    prediction: Float[Array, "b *shape"],
    x_t: Float[Array, "b *shape"],
    t: Float[Array, "b"],
    *,
    kind: str,
    floor: ScalarLike = 1e-3,
) -> Float[Array, "b *shape"]:
    """Velocity from a prediction of `kind` "v" or "x": the latter gives (x_t - x) / t.

    There t is held above `floor`, since data gives no velocity at t=0. A sampler's floor must be
    below its last step, or it stops short of the data.

    Raises:
      UserError: another kind.
    """
    if kind not in KINDS:
        raise UserError(f"prediction={kind!r} is unknown; known: {', '.join(KINDS)}")
    if kind == "v":
        return prediction
    return (x_t - prediction) / jnp.maximum(per_example(t, x_t), floor)


def per_example(t: Shaped[Array, "b"], x: Shaped[Array, "b *shape"]) -> Shaped[Array, "b ..."]:
    """[b] shaped to multiply [b, ...]."""
    return t.reshape(t.shape + (1,) * (x.ndim - 1))
