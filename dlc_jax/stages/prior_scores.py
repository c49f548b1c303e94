"""The prior_scores job: how likely real codes are to a prior, and how real the codes it draws are.

    codes of every split -> bits per code
    drawn codes beside those of the validation split -> frequencies, pairs, a classifier's area
    training codes beside the same -> the same, which is the floor

The names of results begin with that of the step. Entropies stand beside, since a sampler that draws
likely codes only may look good in all else.
"""

import dataclasses
import functools

import numpy as np

from dlc_jax import recipe
from dlc_jax.data import sources
from dlc_jax.data.codes import CodeStore
from dlc_jax.diffusion.code_processes import CODE_PROCESSES
from dlc_jax.diffusion.code_sampler import CodeSampler
from dlc_jax.errors import UserError
from dlc_jax.evals import code_likeness, two_samples
from dlc_jax.models.masked_transformer import MaskedTransformer
from dlc_jax.networks import Networks, program
from dlc_jax.stage import Job

COPIED = 50_000  # training codes, at most, among which copies are sought


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """The section of a prior_scores job.

    Attributes:
      prior: step that draws codes.
      codes: step whose store has real ones.
      count: codes drawn, and of each split at most.
      draws: noise levels at which each real code is judged.
      batch: codes per call, over all devices.
      code_sampler: how codes are drawn.
    """

    prior: str = "prior"
    codes: str = "codes"
    count: int = 2000
    draws: int = 16
    batch: int = 128
    code_sampler: CodeSampler = CodeSampler()

    def __post_init__(self):
        if self.count < 4 or self.draws < 2:
            raise UserError(
                f"prior_scores: count={self.count} must be at least 4, draws={self.draws} at "
                "least 2"
            )


def make(config, *, step: str, workdir) -> Job:
    """The job of a recipe's section `step`; a prior with classes is scored under the null class.

    The job refuses codes of which there is no validation split.
    """
    section = recipe.build(Section, config[step])
    for name, kinds in (("prior", ("prior", "distill")), ("codes", ("codes",))):
        given = getattr(section, name)
        if not any(given in recipe.of_stage(config, kind) for kind in kinds):
            raise UserError(f"{step}.{name}={given!r} is not a step of that kind")
    splits = config[section.codes].splits
    if missing := {"train", "validation"} - set(splits):
        raise UserError(
            f"{step} compares with codes of train and validation; {section.codes}.splits has no "
            f"{sorted(missing)[0]}"
        )

    def networks(mesh):
        return Networks(config, workdir, mesh, batch=section.batch)

    def run(mesh, directory):
        place = recipe.place(config, workdir, section.codes)
        with networks(mesh) as opened:
            network = opened[section.prior]
            shape = {"positions": network.model.positions, "values": network.model.values}
            stores = {
                split: CodeStore(place / split).checked(**shape, where=section.prior)
                for split in splits
            }
            found = measure(network, stores, section, config.seed)
        return {f"{step}/{name}": value for name, value in found.items()}

    prior = config[section.prior]
    model = recipe.build(MaskedTransformer, prior.model)
    calls = section.code_sampler.steps(recipe.build(CODE_PROCESSES, prior.process), model.positions)
    how = {"flops": calls * model.flops(), "batch": section.batch, "sampler": section.code_sampler}
    return Job(
        run=run,
        programs={"sample_codes": program(networks, section.prior, **how)},
        settings=("count", "draws", "code_sampler"),
    )


def measure(network, stores, section: Section, seed: int) -> dict[str, float]:
    """The results of the job, of a prior's network and {split: store of real codes}."""
    results: dict[str, float] = {}
    codes = {split: chosen(store, section.count) for split, store in stores.items()}
    for split, real in codes.items():
        bits, _ = network.likelihood(real, seed=seed, draws=section.draws)
        results[f"bits_per_code/{split}"] = float(bits.mean())
        # of the codes, and of the noise that each was judged at
        results[f"bits_per_code/{split}_error"] = float(bits.std(ddof=1) / np.sqrt(len(bits)))
    count, values = len(codes["train"]), network.model.values
    drawn, calls = network.sample_counted(count, seed=seed, sampler=section.code_sampler)
    results |= {"calls": float(calls.mean()), "count": count}
    real, compare = codes["validation"], functools.partial(likeness, values=values, seed=seed)
    results |= compare(drawn, real)
    floor = compare(codes["train"], real)
    results |= {f"floor/{name}": value for name, value in floor.items() if name != "entropy_real"}
    return results | code_likeness.copies(drawn, chosen(stores["train"], COPIED))


def chosen(store: CodeStore, count: int) -> np.ndarray:
    """Codes int32 [n, l] of at most `count` records that stand for all."""
    return store.codes(sources.choose(store, count)).astype(np.int32)


def likeness(some: np.ndarray, real: np.ndarray, *, values: int, seed: int) -> dict[str, float]:
    """Statistics of some codes beside real ones, and whether a classifier tells them apart."""
    found = code_likeness.likeness(some, real, values=values, seed=seed)
    area, error = two_samples.auc(some, real, values=values, seed=seed)
    return {**found, "auc": area, "auc_error": error}
