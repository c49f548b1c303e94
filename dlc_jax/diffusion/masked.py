"""Masked (absorbing) diffusion of codes: positions are hidden one by one, and learned back.

    codes ──hide each position with chance hidden(t)──► noisy ──network──► outputs ──► loss

A code has `length` positions of values 0..V-1; the mask is V. The best guess of a hidden position
depends on the visible ones alone (RADD, arXiv 2406.03736), so the network needs no time. Sources:
SEDD (arXiv 2310.16834), MDLM (arXiv 2406.07524) and MD4 (arXiv 2406.04329).
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dlc_jax.diffusion.noise import Noise
from dlc_jax.errors import UserError
from dlc_jax.typing import Array, Bool, Float, Int, Key

OBJECTIVES = ("elbo", "simple", "score")


class Belief(NamedTuple):
    """What a network says of the hidden positions.

    Attributes:
      log_p: log chance of each value, [b, l, v], float32.
      log_mass: log of (the sum of the scores) / (what a distribution's would be), [b, l], learned
        by the score entropy; None is 0 everywhere.
    """

    log_p: Float[Array, "b l v"]
    log_mass: Float[Array, "b l"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Masked:
    """The process, and what a network learns of it.

    Attributes:
      objective: "elbo", the bound of the likelihood; "simple", the same with all times weighted
        alike, which leans to noisy codes; or "score", SEDD's score entropy, whose outputs need not
        sum to 1.
      noise: how many positions are hidden at a time.

    Raises:
      UserError: an unknown objective.
    """

    objective: str = "elbo"
    noise: Noise = Noise()

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            known = ", ".join(OBJECTIVES)
            raise UserError(f"process.objective={self.objective!r} is unknown; known: {known}")

    def corrupt(
        self, codes: Int[Array, "b l"], t: Float[Array, "b"], keys: Key[Array, "b"], *, values: int
    ) -> Int[Array, "b l"]:
        """Noisy codes: each position becomes the mask, `values`, with chance hidden(t)."""
        return hide(codes, self.noise.hidden(t), keys, values=values)

    def belief(self, outputs: Float[Array, "b l _"], *, values: int) -> Belief:
        """Of a network's outputs; those beyond `values` are not read.

        SEDD's scores are exp(output) / (V (e^sigma - 1)), with which the mass is the mean of
        exp(output), at any time.
        """
        logits = outputs[..., :values].astype(jnp.float32)
        size = jax.nn.logsumexp(logits, -1)
        mass = size - jnp.log(values) if self.objective == "score" else None
        return Belief(logits - size[..., None], mass)

    def loss(
        self,
        outputs: Float[Array, "b l _"],
        codes: Int[Array, "b l"],
        noisy: Int[Array, "b l"],
        t: Float[Array, "b"],
        *,
        values: int,
    ) -> Float[Array, "b"]:
        """What is learned: nats per example, whose mean is over t ~ U(0, 1)."""
        if self.objective != "simple":
            return self.bound(outputs, codes, noisy, t, values=values)
        belief = self.belief(outputs, values=values)
        return nats(belief, codes, noisy == values) / self.noise.mean

    def bound(
        self,
        outputs: Float[Array, "b l _"],
        codes: Int[Array, "b l"],
        noisy: Int[Array, "b l"],
        t: Float[Array, "b"],
        *,
        values: int,
    ) -> Float[Array, "b"]:
        """Nats per example whose mean over t ~ U(0, 1) and masks is at least -log p(codes).

        Of a normalized belief it is -log p averaged over all orders of revealing, and where the
        network's conditionals are those of one joint distribution, -log p itself. Any schedule
        from nothing hidden to all has this mean. Sources: MDLM; SEDD, equation 9.
        """
        belief = self.belief(outputs, values=values)
        return self.noise.weight(t) * nats(belief, codes, noisy == values)


def hide(
    codes: Int[Array, "b l"], share: Float[Array, "b"], keys: Key[Array, "b"], *, values: int
) -> Int[Array, "b l"]:
    """Codes of which each position is the mask, `values`, with chance `share`, by itself."""
    draw = jax.vmap(lambda key: jax.random.uniform(key, codes.shape[1:]))(keys)
    return jnp.where(draw < share[:, None], values, codes)


def nats(belief: Belief, codes: Int[Array, "b l"], hidden: Bool[Array, "b l"]) -> Float[Array, "b"]:
    """Cross-entropy of the hidden positions, summed: nats per example.

    With a mass m it is the score entropy of SEDD in units of its weight, m - 1 - log m - log p:
    0 at the optimum of certain values, and at least the cross-entropy, which it is at m = 1.
    """
    found = -jnp.take_along_axis(belief.log_p, codes[..., None], -1)[..., 0]
    if belief.log_mass is not None:
        found += jnp.expm1(belief.log_mass) - belief.log_mass
    return jnp.where(hidden, found, 0).sum(-1)
