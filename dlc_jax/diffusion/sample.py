"""From noise to data with a network's predictions: a `Sampler` follows a process from t=1 to 0.

A method takes one step, (process, predict_fn, x [b, ...], t, s, keys [b]) -> x at time s, where
`predict_fn` is (x [b, ...], t [b]) -> `Prediction`. Deterministic methods leave their keys alone.
The network is never asked at t=0.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dlc_jax.diffusion import schedules
from dlc_jax.diffusion.guidance import Guidance
from dlc_jax.diffusion.process import Prediction, posterior
from dlc_jax.errors import UserError
from dlc_jax.typing import Array, Float, Key

STEPS = 2**31 - 1  # what an example's key is folded with to draw in the steps, apart from its start


class Method(NamedTuple):
    """One way to take a step.

    Attributes:
      step: (process, predict_fn, x, t, s, keys, **fields) -> x at time s.
      calls: steps -> evaluations of the network in one draw.
      fields: of the sampler that the step reads too.
    """

    step: Callable
    calls: Callable
    fields: tuple[str, ...] = ()


def euler(process, predict_fn, x, t, s, keys):
    """One call a step, error of order 1: DDIM without noise, on any process."""
    return _along(process, x, t, s, predict_fn(x, _times(t, x)))


def heun(process, predict_fn, x, t, s, keys):
    """The mean of the predictions at both ends: two calls a step, error of order 2.

    A step that ends at t=0 is an Euler step, since a model of the data has no noise there; this
    does not lower the order. Source: EDM (arXiv 2206.00364), algorithm 1.
    """
    first = predict_fn(x, _times(t, x))
    guess = _along(process, x, t, s, first)

    def correct():
        second = predict_fn(guess, _times(s, x))
        data, noise = (first.data + second.data) / 2, (first.noise + second.noise) / 2
        return _along(process, x, t, s, Prediction(data, noise))

    return jax.lax.cond(s > 0, correct, lambda: guess)


def ddim(process, predict_fn, x, t, s, keys, *, eta):
    """Part of the noise is drawn anew: none at eta 0 (`euler`), as `ancestral` does at eta 1.

    Source: DDIM (arXiv 2010.02502) equation 12.
    """
    found = predict_fn(x, _times(t, x))
    fresh = eta**2 * posterior(process, found._replace(mix=None), t, s)[1]
    alpha, sigma = process.path(s)
    left = jnp.sqrt(jnp.maximum(jnp.square(sigma) - fresh, 0))
    return alpha * found.data + left * found.noise + jnp.sqrt(fresh) * _normal(keys, x.shape[1:])


def ancestral(process, predict_fn, x, t, s, keys):
    """A draw of the reverse step: its variance is the learned one, or else the posterior's.

    Source: DDPM (arXiv 2006.11239) algorithm 2.
    """
    mean, variance = posterior(process, predict_fn(x, _times(t, x)), t, s)
    return mean + jnp.sqrt(variance) * _normal(keys, x.shape[1:])


def sde(process, predict_fn, x, t, s, keys):
    """Euler-Maruyama: noise is taken away twice as fast as by `euler`, and half of it drawn anew.

    The diffusion is 2 sigma |dsigma/dt|, on the linear path 2 t. The last step is `euler`'s.
    Source: SiT (arXiv 2401.08740).
    """
    found = predict_fn(x, _times(t, x))
    (_, sigma), (_, sigma_s) = process.path(t), process.path(s)
    less = jnp.where(s > 0, sigma - sigma_s, 0)
    fresh = jnp.sqrt(2 * sigma * less) * _normal(keys, x.shape[1:])
    return _along(process, x, t, s, found) - less * found.noise + fresh


METHODS = {
    "euler": Method(euler, calls=lambda steps: steps),
    "heun": Method(heun, calls=lambda steps: 2 * steps - 1),
    "ddim": Method(ddim, calls=lambda steps: steps, fields=("eta",)),
    "ancestral": Method(ancestral, calls=lambda steps: steps),
    "sde": Method(sde, calls=lambda steps: steps),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """How images are drawn from noise.

    Attributes:
      method: of taking a step, "euler", "heun", "ddim", "ancestral" or "sde".
      steps: from noise to data.
      times: spacing of the steps, "uniform" or "cosine" (denser near noise).
      churn: EDM's S_churn. Before each step sigma / alpha is raised by the share churn / steps, at
        most sqrt(2) - 1, and noise is added to match. 0 adds none.
      churn_interval: closed range of times in which to churn. 1 is noise, 0 is data.
      churn_noise: EDM's S_noise, a factor on the added noise.
      eta: of "ddim", how much noise is drawn anew. 0 is deterministic.
      guidance: of the prediction. `draw` takes one that is guided already, see `guided`.

    Raises:
      UserError: an unknown method or spacing, fewer than one step, churn, its noise or eta that are
        negative, a churn_interval outside [0, 1], or eta with another method or above 1.
    """

    method: str = "heun"
    steps: int = 50
    times: str = "uniform"
    churn: float = 0.0
    churn_interval: tuple[float, float] = (0.0, 1.0)
    churn_noise: float = 1.0
    eta: float = 0.0
    guidance: Guidance = Guidance()

    def __post_init__(self):
        for field, known in (("method", METHODS), ("times", schedules.TIMES)):
            if (value := getattr(self, field)) not in known:
                raise UserError(f"sampler.{field}={value!r} is unknown; known: {', '.join(known)}")
        if self.steps < 1:
            raise UserError(f"sampler.steps={self.steps} must be at least 1")
        for field in ("churn", "churn_noise"):
            if not 0 <= (value := getattr(self, field)) < math.inf:
                raise UserError(f"sampler.{field}={value} must be a number from 0 up")
        low, high = self.churn_interval
        if not 0 <= low <= high <= 1:
            raise UserError(
                f"sampler.churn_interval={self.churn_interval} must rise and lie within [0, 1]"
            )
        if not 0 <= self.eta <= 1:
            raise UserError(f"sampler.eta={self.eta} must lie within [0, 1]")
        if self.eta and "eta" not in METHODS[self.method].fields:
            raise UserError(
                f"sampler.eta={self.eta} has no meaning for method={self.method!r}; take 'ddim'"
            )

    @property
    def calls(self) -> int:
        """Evaluations of the network in one draw."""
        return METHODS[self.method].calls(self.steps)

    def draw(
        self, process, predict_fn: Callable, keys: Key[Array, "b"], shape: tuple[int, ...]
    ) -> Float[Array, "b ..."]:
        """Samples [b, *shape], float32, from normal noise carried back along `process`.

        All noise of an example comes from its own key, so a sample does not depend on its batch.

        Args:
          predict_fn: (x [b, *shape], t [b]) -> Prediction.

        Raises:
          UserError: more steps than a process of discrete times has, or churn with one.
        """
        method = METHODS[self.method]
        fields = {name: getattr(self, name) for name in method.fields}
        step = functools.partial(method.step, process, predict_fn, **fields)
        streams = _fold(keys, STEPS)

        def body(x, now):
            t, s, number = now
            fresh = _fold(streams, number)
            if self.churn:
                x, t = self._churned(process, x, t, _fold(fresh, 0))
            return step(x, t, s, _fold(fresh, 1)).astype(x.dtype), None

        grid = process.grid(self.times, self.steps, math.prod(shape))
        start = process.path(grid[0])[1] * _normal(keys, shape)
        x, _ = jax.lax.scan(body, start, (grid[:-1], grid[1:], jnp.arange(self.steps)))
        return x

    def _churned(self, process, x, t, keys):
        """x carried from t back to a time of more noise, and that time."""
        low, high = self.churn_interval
        factor = 1 + min(self.churn / self.steps, math.sqrt(2) - 1)
        raised = jnp.where((t >= low) & (t <= high), process.raised(t, factor), t)
        (alpha, sigma), (alpha_r, sigma_r) = process.path(t), process.path(raised)
        # At t=1 of the linear path there is nothing but noise, and `raised` is 1 too.
        kept = jnp.where(alpha > 0, alpha_r / jnp.where(alpha > 0, alpha, 1), 1)
        old = kept * sigma
        added = jnp.sqrt(jnp.maximum((sigma_r - old) * (sigma_r + old), 0))
        return kept * x + self.churn_noise * added * _normal(keys, x.shape[1:]), raised


def _along(process, x, t, s, found):
    """x at time s, where data and noise stay as predicted."""
    (alpha, sigma), (alpha_s, sigma_s) = process.path(t), process.path(s)
    return x + (alpha_s - alpha) * found.data + (sigma_s - sigma) * found.noise


def _normal(keys, shape):
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def _fold(keys, number):
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


def _times(t, x):
    return jnp.full(x.shape[:1], t)
