"""From noise to data along a velocity field: a `Sampler` integrates dx/dt = v(x, t) from t=1 to 0.

A method takes one step, (velocity_fn, x [b, ...], t, s, keys [b]) -> x at time s, where
`velocity_fn` is (x [b, ...], t [b]) -> [b, ...]. Deterministic methods leave their keys alone.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dlc_jax.diffusion import schedules
from dlc_jax.diffusion.guidance import Guidance
from dlc_jax.errors import UserError
from dlc_jax.typing import Array, Float, Key

STEPS = 2**31 - 1  # what an example's key is folded with to draw in the steps, apart from its start


class Method(NamedTuple):
    """One way to take a step.

    Attributes:
      step: (velocity_fn, x, t, s, keys) -> x at time s.
      calls: steps -> evaluations of the velocity in one draw.
    """

    step: Callable
    calls: Callable


def euler(velocity_fn, x, t, s, keys):
    """One call a step, error of order 1."""
    return x + (s - t) * velocity_fn(x, _times(t, x))


def heun(velocity_fn, x, t, s, keys):
    """The mean of the velocities at both ends: two calls a step, error of order 2.

    A step that ends at t=0 is an Euler step, since a model of the data has no velocity there; this
    does not lower the order. Source: EDM (arXiv 2206.00364), algorithm 1.
    """
    first = velocity_fn(x, _times(t, x))
    guess = (x + (s - t) * first).astype(x.dtype)

    def correct():
        return (x + (s - t) / 2 * (first + velocity_fn(guess, _times(s, x)))).astype(x.dtype)

    return jax.lax.cond(s > 0, correct, lambda: guess)


METHODS = {
    "euler": Method(euler, calls=lambda steps: steps),
    "heun": Method(heun, calls=lambda steps: 2 * steps - 1),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """How images are drawn from noise.

    Attributes:
      method: of integration, "euler" or "heun".
      steps: of the integrator, from noise to data.
      times: spacing of the steps, "uniform" or "cosine" (denser near noise).
      churn: noise added before each step, in steps. The time is raised from t by churn * (t - s),
        where s is the step's end, and noise is added to match. 0 is deterministic.
      guidance: of the velocity. `draw` takes a velocity that is guided already, see `guided`.

    Raises:
      UserError: an unknown method or spacing, fewer than one step, or negative churn.
    """

    method: str = "heun"
    steps: int = 50
    times: str = "uniform"
    churn: float = 0.0
    guidance: Guidance = Guidance()

    def __post_init__(self):
        for field, known in (("method", METHODS), ("times", schedules.TIMES)):
            if (value := getattr(self, field)) not in known:
                raise UserError(f"sampler.{field}={value!r} is unknown; known: {', '.join(known)}")
        if self.steps < 1:
            raise UserError(f"sampler.steps={self.steps} must be at least 1")
        if not 0 <= self.churn < float("inf"):
            raise UserError(f"sampler.churn={self.churn} must be a number from 0 up")

    @property
    def calls(self) -> int:
        """Evaluations of the velocity in one draw."""
        return METHODS[self.method].calls(self.steps)

    def draw(
        self, velocity_fn: Callable, keys: Key[Array, "b"], shape: tuple[int, ...]
    ) -> Float[Array, "b ..."]:
        """Samples [b, *shape], float32, from normal noise carried along `velocity_fn`.

        All noise of an example comes from its own key, so a sample does not depend on its batch.
        """
        step = METHODS[self.method].step
        streams = _fold(keys, STEPS)

        def body(x, now):
            t, s, number = now
            fresh = _fold(streams, number)
            if self.churn:
                x, t = _churn(x, t, jnp.minimum(1, t + self.churn * (t - s)), _fold(fresh, 0))
            return step(velocity_fn, x, t, s, _fold(fresh, 1)).astype(x.dtype), None

        grid = schedules.grid(self.times, self.steps)
        x, _ = jax.lax.scan(
            body, _normal(keys, shape), (grid[:-1], grid[1:], jnp.arange(self.steps))
        )
        return x


def _churn(x, t, raised, keys):
    """x at time t of the linear path, carried back to the time `raised` by more noise."""
    # Data keep the factor 1 - raised, and the variances of the noises add up to raised^2. At t=1
    # there is nothing but noise, and `raised` is 1 too.
    kept = jnp.where(t < 1, (1 - raised) / jnp.where(t < 1, 1 - t, 1), 1)
    old = kept * t
    added = jnp.sqrt(jnp.maximum((raised - old) * (raised + old), 0))
    return kept * x + added * _normal(keys, x.shape[1:]).astype(x.dtype), raised


def _normal(keys, shape):
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def _fold(keys, number):
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def _times(t, x):
    return jnp.full(x.shape[:1], t)
