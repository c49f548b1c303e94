"""How codes are drawn with a network that learned a process of codes: the `CodeSampler`."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dlc_jax.diffusion import remask, reveal, transport
from dlc_jax.diffusion.chain import Chain, Drawn
from dlc_jax.diffusion.flow import Flow
from dlc_jax.diffusion.masked import Masked
from dlc_jax.diffusion.replace import replace
from dlc_jax.diffusion.schedules import TIMES
from dlc_jax.diffusion.uniform import Uniform
from dlc_jax.errors import UserError
from dlc_jax.typing import Array, Bool, Int, Key

METHODS = {
    Masked: {
        "first_hitting": reveal.first_hitting,
        "ancestral": reveal.ancestral,
        "euler": reveal.euler,
        "maskgit": reveal.maskgit,
        "low_confidence": reveal.low_confidence,
        "entropy": reveal.entropy,
        "remdm_cap": remask.remdm_cap,
        "remdm_loop": remask.remdm_loop,
        "remask": remask.remask,
    },
    Uniform: {
        "ancestral": functools.partial(replace, analytic=True),
        "euler": functools.partial(replace, analytic=False),
    },
    Flow: {"ancestral": transport.ancestral, "euler": transport.euler},
}
KNOWN = tuple(METHODS[Masked])


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeSampler:
    """How codes are drawn.

    Attributes:
      method: "first_hitting", exact with one call a position and random order with fewer;
        "ancestral", which is SEDD's analytic sampler; "euler"; "maskgit"; "low_confidence";
        "entropy"; "remdm_cap"; "remdm_loop"; "remask", the paper's; or "auto", which is what
        docs/results_history.md shows to be best with so many calls.
      calls: of the network for one code at most, or steps of those that go by steps. 0 is one for
        each position.
      temperature: divides the logits. 0 takes the likeliest value.
      nucleus: draws are from the likeliest values that have this chance together, in (0, 1].
      times: where the steps of "ancestral", "euler", "remdm_cap" and "remask" are, "uniform" or
        "cosine", which are denser near the noise.
      choice: of "maskgit", how random the order is at first.
      entropy_bound: of "entropy", nats.
      eta: chance to be hidden again in a step, of those that do so. 0 is the method's own: 0.008,
        0.02 and 0.01.
      window: of t, in which "remdm_loop" and "remask" hide again. () is the method's own: (0.05,
        0.55) and (0.3, 0.55).
      kept: of "remdm_loop", share of the positions that are visible in its window.

    Raises:
      UserError: an unknown method, or a number out of range.
    """

    method: str = "first_hitting"
    calls: int = 0
    temperature: float = 1.0
    nucleus: float = 1.0
    times: str = "uniform"
    choice: float = 4.5
    entropy_bound: float = 0.1
    eta: float = 0.0
    window: tuple[float, ...] = ()
    kept: float = 0.9

    def __post_init__(self):
        object.__setattr__(self, "window", tuple(self.window))
        for name, known in (("method", (*KNOWN, "auto")), ("times", tuple(TIMES))):
            if getattr(self, name) not in known:
                value = getattr(self, name)
                raise UserError(
                    f"code_sampler.{name}={value!r} is unknown; known: {', '.join(known)}"
                )
        if self.calls < 0:
            raise UserError(f"code_sampler.calls={self.calls} must be at least 0")
        for name in ("temperature", "choice", "entropy_bound"):
            if not 0 <= getattr(self, name) < math.inf:
                value = getattr(self, name)
                raise UserError(f"code_sampler.{name}={value} must be a number from 0 up")
        if not 0 < self.nucleus <= 1:
            raise UserError(f"code_sampler.nucleus={self.nucleus} must be above 0 and at most 1")
        if not 0 <= self.eta < 1:
            raise UserError(f"code_sampler.eta={self.eta} must be from 0 to below 1")
        if not 0 < self.kept < 1:
            raise UserError(f"code_sampler.kept={self.kept} must be between 0 and 1")
        window = self.window
        if window and not (len(window) == 2 and 0 <= window[0] < window[1] <= 1):
            raise UserError(f"code_sampler.window={window} must be two rising times in [0, 1]")

    def resolved(self, process, length: int) -> "CodeSampler":
        """The same with "auto" replaced by what it stands for, at codes of `length` positions.

        Raises:
          UserError: the process has no such method, or no temperature.
        """
        method = self.method
        if method == "auto":
            method = automatic(process, self.calls, length)
        known = METHODS[type(process)]
        if method not in known:
            name = type(process).__name__.lower()
            raise UserError(
                f"code_sampler.method={method!r} cannot follow process.name={name!r}; those that "
                f"can: {', '.join(known)}"
            )
        for name, plain in (("temperature", 1.0), ("nucleus", 1.0)):
            if isinstance(process, Uniform) and getattr(self, name) != plain:
                raise UserError(
                    f"code_sampler.{name}={getattr(self, name)} is not of uniform processes; "
                    f"here it is {plain}"
                )
        return dataclasses.replace(self, method=method)

    def steps(self, process, length: int) -> int:
        """Calls of the network for one code of `length` positions, at most."""
        calls, method = self.calls or length, self.resolved(process, length).method
        by_steps = not isinstance(process, Masked) or method in remask.ETAS
        if by_steps or (process.objective == "score" and method in ("ancestral", "euler")):
            return calls
        return min(calls, length)

    def draw(
        self,
        process,
        predict: Callable,
        keys: Key[Array, "b"],
        length: int,
        values: int,
        *,
        prompt: Int[Array, "b l"] | None = None,
        known: Bool[Array, "b l"] | None = None,
    ) -> Drawn:
        """Codes [b, length], and how often the network was needed for each.

        Args:
          process: of `CODE_PROCESSES`.
          predict: (noisy [b, l], or [b, l, v] of `Flow`, share of noise [b]) -> outputs
            [b, l, v or v + 1].
          keys: one an example: a draw depends on it alone, not on the batch.
          prompt, known: infilling: positions where `known` keep `prompt`'s values.

        Raises:
          UserError: the process has no such method.
          ValueError: one of `prompt` and `known` without the other.
        """
        if (prompt is None) != (known is None):
            raise ValueError("prompt and known go together")
        if known is None:
            known = jnp.zeros((keys.shape[0], length), bool)
            prompt = jnp.zeros((keys.shape[0], length), jnp.int32)
        start = jnp.where(known, prompt, values).astype(jnp.int32)
        split = jax.vmap(jax.random.split)(keys)
        sampler = self.resolved(process, length)
        chain = Chain(process, predict, sampler, values, start, split[:, 0], split[:, 1])
        return METHODS[type(process)][sampler.method](chain)


def automatic(process, calls: int, length: int) -> str:
    """The method that does best with so many calls, see docs/results_history.md, "The prior"."""
    if not isinstance(process, Masked):
        return "ancestral"
    if calls >= 4 * length:
        return "remdm_cap"
    return "maskgit" if 0 < calls < length else "first_hitting"
