"""What a recipe asks for in a workdir: which steps are complete, and which cannot be resumed.

A job is done again when a step whose results it reads was trained longer since, when one of its own
settings changed, or when what it left is gone. A trained step cannot be done again: what it learned
is of the old results. So that is refused, before anything is trained.
"""

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Any

import jax

from dlc_jax import checkpoint, metrics, parallel, recipe, remote
from dlc_jax import workdir as home
from dlc_jax.data.sources import SOURCES
from dlc_jax.errors import UserError
from dlc_jax.models.autoencoder import Autoencoder
from dlc_jax.models.autoencoders import AUTOENCODERS
from dlc_jax.networks.autoencoder import AutoencoderNetwork
from dlc_jax.networks.start import check_start
from dlc_jax.stage import Job, Stage
from dlc_jax.stages import STAGES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """The section of an autoencoder, which is imported and not trained here.

    Attributes:
      path: folder that `dlc import vae FILE --out DIR` made.
      model: the network, "kl" or "tiny"; the defaults are sd-vae-ft-ema and TAEF2.
    """

    path: str = ""
    model: Annotated[Any, AUTOENCODERS] = Autoencoder()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a recipe has beside the sections of its steps.

    Attributes:
      seed: of every draw: data order, crops, initial parameters, noise, samples.
      steps: to run, in this order.
      mesh: how devices share the work.
      log: where curves go beside metrics.jsonl.
      data: the images.
      autoencoder: weights that make latents of images; only where a step names it.
    """

    seed: int = 0
    steps: tuple[str, ...] = ("encoder", "codes", "probe", "prior", "generator", "samples")
    mesh: parallel.make_mesh
    log: metrics.Log
    data: Annotated[object, SOURCES]
    autoencoder: Weights | None = None


@dataclasses.dataclass(frozen=True)
class Entry:
    """A step and how it stands.

    Attributes:
      name: of its section.
      step: what the section makes.
      need: steps of training; 0 for a job.
      skip: why there is nothing to do; "" if there is.
      facts: what is written down when it is complete, to be compared later.
    """

    name: str
    step: Stage | Job
    need: int
    skip: str
    facts: dict[str, Any]


def make(config, workdir: Path, mesh) -> dict[str, Stage | Job]:
    """Every step of the recipe, checked as far as it can be before anything is written.

    Raises:
      UserError: a step that refuses its section or the mesh, one whose model cannot be built or
        cannot start from its `init_from`, or one that reads other codes than the encoder gives; an
        autoencoder whose weights are not those of its model.
    """
    steps = {
        name: STAGES[config[name].stage](config, step=name, workdir=workdir)
        for name in config.steps
    }
    _check_autoencoders(config, mesh)
    for name, step in steps.items():
        if isinstance(step, Stage):
            plan = step.plan
            where = {"group": step.group, "where": f"{name}.train"}
            parallel.check_batch(plan.batch, mesh, accumulate=plan.accumulate, **where)
            _check_best(step, name)
            if name not in recipe.unneeded(config):
                _check_model(step, name, config[name].stage, workdir)
            _check_codes(config, name)
        else:  # now, and not when days of training are over
            for program in step.programs.values():
                parallel.check_batch(program.batch, mesh, accumulate=1, where=name)
    return steps


def _check_autoencoders(config, mesh) -> None:
    """Reads the autoencoders that steps need, so that wrong weights are refused now."""
    for name in recipe.autoencoders(config):
        AutoencoderNetwork(config, name, mesh).params  # noqa: B018, they are read to be refused


def _check_model(step: Stage, name: str, kind: str, workdir: Path) -> None:
    """Refuses a model that cannot be built, or cannot start from `init_from`.

    Before the workdir takes this recipe for its own: it would refuse the corrected one.
    """
    try:
        params, _ = jax.eval_shape(step.init, jax.random.key(0))
    except UserError as error:
        raise UserError(f"{name}.model: {error}") from error
    start = step.plan.init_from
    has_checkpoint = any((workdir / name / "checkpoints").glob("*"))  # it is resumed from that
    is_made_here = (
        workdir.resolve() in remote.local(start).resolve().parents
    )  # so it is not there yet
    if start and not has_checkpoint and not is_made_here:
        try:
            check_start(start, params, kind=kind, new=step.plan.init_new)
        except UserError as error:
            raise UserError(f"{name}.{error}") from error


def _check_best(step: Stage, name: str) -> None:
    """Refuses a `keep_best` that nothing measures; its evaluator's own names come with its run."""
    best = step.plan.keep_best.removeprefix("-")
    sources = ["validation", *(evaluator.name for evaluator in step.evals)]
    if best and not any(best.startswith(f"{source}/") for source in sources):
        raise UserError(
            f"{name}.train.keep_best={step.plan.keep_best!r} is not measured here; name a metric "
            f"such as validation/loss, of {' or '.join(sources)}"
        )


def _check_codes(config, name: str) -> None:
    """Refuses a reader of other codes than the encoder gives, before the encoder is trained."""
    section = config[name]
    if "model" not in section or "codes" not in section or not section.codes:
        return
    if not section.model.positions:
        return  # it reads the store's latents or embeddings alone
    encoder = config[section.codes].encoder
    for field in ("positions", "values"):
        reads, gives = section.model[field], config[encoder].model.simplicial[field]
        if reads != gives:
            raise UserError(
                f"{name}.model.{field}={reads}, but {section.codes} gives what "
                f"{encoder}.model.simplicial.{field}={gives} says; set both alike"
            )


def operational(steps: dict[str, Stage | Job]) -> tuple[str, ...]:
    """Regular expressions of fields that may change here: every workdir's, and jobs' settings."""
    own = [
        rf"{re.escape(name)}\.{field}(\..*)?"
        for name, step in steps.items()
        for field in _settings(step)
    ]
    return (*home.OPERATIONAL, *own)


def read(config, workdir: Path, steps: dict[str, Stage | Job]) -> list[Entry]:
    """The steps in their order. The caller holds the workdir: what a kill left half deleted goes.

    Raises:
      UserError: a trained step is of results that are to change; a job's results are there, and
        others' than this workdir's.
    """
    done = {name: home.done(workdir / name) for name in config}
    trained = {name: done[name]["steps"] for name in done if done[name] is not None}
    for name, step in steps.items():
        trained[name] = max(trained.get(name, 0), step.plan.steps if isinstance(step, Stage) else 0)
        if isinstance(step, Stage):
            # now: one that is complete saves no more
            checkpoint.clear(workdir / name / "checkpoints")
    absent, entries, outdated = recipe.unneeded(config), [], {}
    for name, step in steps.items():
        need = step.plan.steps if isinstance(step, Stage) else 0
        after = {
            above: trained[above] for above in recipe.upstream(config, name) if trained.get(above)
        }
        facts = {
            "steps": need,
            "after": after,
            "settings": {field: config[name].to_dict()[field] for field in _settings(step)},
        }
        skip = ""
        if name in absent:
            skip = f"not needed, {absent[name]}"
        elif done[name] is not None:
            changed = [
                above
                for above, trained_for in after.items()
                if done[name].get("after", {}).get(above, trained_for) != trained_for
            ]
            if changed and isinstance(step, Stage):
                outdated[name] = changed[0]
            again = changed or _ran_otherwise(config, name, done[name], facts["settings"])
            again = again or (isinstance(step, Job) and not step.is_intact(workdir / name))
            skip = "complete" if done[name]["steps"] >= need and not again else ""
        entries.append(Entry(name, step, need, skip, facts))
    if outdated:
        name, above = next(iter(outdated.items()))
        raise UserError(
            _outdated(workdir, list(outdated), above, done[name]["after"][above], trained[above])
        )
    return entries


def _settings(step: Stage | Job) -> tuple[str, ...]:
    return step.settings if isinstance(step, Job) else ()


def _ran_otherwise(config, name: str, done: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether a complete job was run, perhaps by an earlier version, with other settings."""
    if not settings or "settings" not in done:
        return False
    saved = {"stage": config[name].stage, **done["settings"]}
    ran = home.plain(recipe.present({name: saved})[name])
    return any(ran.get(key) != value for key, value in home.plain(settings).items())


def _outdated(workdir: Path, names: list[str], above: str, before: int, after: int) -> str:
    return (
        f"{', '.join(names)} learned from what {above} gave after {before} steps, and {above} is "
        f"to have {after}: set {above}.train.steps={before}, give another --workdir, or move "
        f"{', '.join(names)} of {workdir} away to train them anew"
    )
