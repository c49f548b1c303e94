"""Which samplers a generator can draw with."""

import jax.numpy as jnp

from dlc_jax import recipe, remote
from dlc_jax.diffusion.processes import PROCESSES
from dlc_jax.diffusion.sample import Sampler
from dlc_jax.errors import UserError


def check_sampler(sampler: Sampler, section, where: str) -> None:
    """Refuses a sampler that a generator cannot draw with.

    Args:
      section: of the generator, built or of a config.
      where: the sampler is set.

    Raises:
      UserError: steps or churn that the process has not, or the null condition as base of a
        generator that was not trained on it.
    """
    process, how = section.process, sampler.guidance
    if hasattr(process, "name"):  # of a config
        process = recipe.build(PROCESSES, process)
    process.grid(sampler.times, sampler.steps, 1)
    if sampler.churn:
        process.raised(jnp.ones(()), jnp.ones(()))
    if how.scale == 1:
        return
    if how.base == "internal" and not section.model.early:
        raise UserError(
            f"{where}.guidance.base=internal needs an early head; train with model.early=BLOCK, or "
            "give another base"
        )
    model = section.model
    is_conditional = model.positions or model.classes or model.embedding
    if not how.base and is_conditional and not section.objective.drop:
        raise UserError(
            f"{where}.guidance.base='' is the null condition, which objective.drop=0 does not "
            "train; give another base, or scale 1"
        )


def check_base(sampler: Sampler, where: str) -> None:
    """Refuses a sampler whose base is another generator that is not there; a plan needs no files.

    Raises:
      UserError: it is named.
    """
    base = sampler.guidance.base
    if base in ("", "internal") or sampler.guidance.scale == 1:
        return
    places = {remote.local(base), remote.local(base.rpartition("@")[0] or base)}
    if not any(place.exists() for place in places):
        raise UserError(f"{where}.guidance.base={base}: there is no such run or step")
