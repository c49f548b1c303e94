"""From noise to data along a velocity field: integrators of dx/dt = v(x, t) down a grid of times, as one `lax.scan`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dlc_jax.errors import UserError
from dlc_jax.typing import Array, Float, Key


def euler(velocity_fn: Callable, x: Float[Array, "b *shape"], grid: Float[Array, "times"]) -> Float[Array, "b *shape"]:
    """x carried from grid[0] to grid[-1], one call of `velocity_fn`, (x [b, ...], t [b]) -> [b, ...], a step; order 1."""

    def step(x, t, s):
        return x + (s - t) * velocity_fn(x, _times(t, x))

    return _integrate(step, x, grid)


def heun(velocity_fn: Callable, x: Float[Array, "b *shape"], grid: Float[Array, "times"]) -> Float[Array, "b *shape"]:
    """As `euler` with the mean of the velocities at both ends: two calls a step, error of order 2.

    A step that ends at t=0 is an Euler step, since a model of the data has no velocity there; this does not lower the order.
    Source: EDM (arXiv 2206.00364), algorithm 1.
    """

    def step(x, t, s):
        first = velocity_fn(x, _times(t, x))
        guess = (x + (s - t) * first).astype(x.dtype)

        def correct():
            return (x + (s - t) / 2 * (first + velocity_fn(guess, _times(s, x)))).astype(x.dtype)

        return jax.lax.cond(s > 0, correct, lambda: guess)

    return _integrate(step, x, grid)


METHODS = {"euler": euler, "heun": heun}


def flow_sample(
    velocity_fn: Callable, keys: Key[Array, "b"], shape: tuple[int, ...], grid: Float[Array, "times"], *, method: str = "euler"
) -> Float[Array, "b ..."]:
    """Samples [b, *shape]: float32 normal noise, one key an example, carried down `grid` (which starts at 1) by `method`.

    The start depends on an example's own key, so not on the batch it is in. Raises: UserError for an unknown method.
    """
    if method not in METHODS:
        raise UserError(f"sampler method={method!r} is unknown; known: {', '.join(METHODS)}")
    noise = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)
    return METHODS[method](velocity_fn, noise, grid)


def _integrate(step, x, grid):
    out, _ = jax.lax.scan(lambda x, ends: (step(x, *ends).astype(x.dtype), None), x, (grid[:-1], grid[1:]))
    return out


def _times(t, x):
    return jnp.full(x.shape[:1], t)
