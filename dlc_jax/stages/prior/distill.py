"""A prior in few calls: a student learns in one step what its teacher reaches in several.

From a noisy code the teacher makes `teacher_calls / calls` of its steps, and the student must say
of the noisy code at once what takes it as far: of a masked process what the teacher said of a
position when it was revealed, or in the last step (SDTT, self-distillation through time, arXiv
2410.21035); of a flow the mean of what it said, each step by the gain that it rose (progressive
distillation, arXiv 2202.00512, on the simplex as FMLM's flow map, arXiv 2602.16813). The student
starts as a copy of the teacher; to go on, name a student as the next one's teacher.
"""

import dataclasses
import functools
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from dlc_jax import checkpoint, parallel, recipe
from dlc_jax.diffusion import chain, schedules
from dlc_jax.diffusion.code_processes import CODE_PROCESSES
from dlc_jax.diffusion.flow import Flow
from dlc_jax.diffusion.masked import Masked, hide
from dlc_jax.diffusion.uniform import Uniform
from dlc_jax.errors import UserError
from dlc_jax.models.masked_transformer import MaskedTransformer
from dlc_jax.networks.prior import apply
from dlc_jax.optim import OPTIMIZERS, AdamW
from dlc_jax.stage import Plan, Stage
from dlc_jax.stages import prior
from dlc_jax.step import example_keys, shared_key

TIME, MASK, REVEAL, VALUE = 1, 2, 3, 4  # purposes of keys
DIVERGENCES = ("reverse", "forward")
FREE = ("remat", "unroll", "implementation", "dropout")  # how a network is computed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """The section of a distilled prior.

    Attributes:
      codes: step whose code store it learns from.
      teacher: step of the prior, or of a student before.
      process: the teacher's.
      model: the network; the teacher's. Its dropout is not applied.
      calls: of the student for one code.
      teacher_calls: of the teacher for one code, a multiple of `calls`.
      divergence: "reverse", KL(student, teacher), which leaves out what is unlikely; or "forward".
      ema_decay: of the average of the parameters; less in the first steps.
      optimizer: of the parameters.
      train: how long and how.

    Raises:
      UserError: an unknown divergence, calls that do not go together, or a process that is uniform
        or has a mass of scores.
    """

    codes: str = "codes"
    teacher: str = "prior"
    process: Annotated[Any, CODE_PROCESSES] = Masked()
    model: MaskedTransformer = MaskedTransformer()
    calls: int = 8
    teacher_calls: int = 32
    divergence: str = "reverse"
    ema_decay: float = 0.9999
    optimizer: Annotated[Any, OPTIMIZERS] = AdamW(learning_rate=6e-5, warmup=500)
    train: Plan = Plan(steps=10_000, batch=128, clip=1.0, dtype="bfloat16")

    def __post_init__(self):
        if self.divergence not in DIVERGENCES:
            known = ", ".join(DIVERGENCES)
            raise UserError(f"divergence={self.divergence!r} is unknown; known: {known}")
        if self.calls < 1 or self.teacher_calls % self.calls or self.teacher_calls <= self.calls:
            raise UserError(
                f"teacher_calls={self.teacher_calls} must be a multiple of calls={self.calls}, and "
                "more"
            )
        if isinstance(self.process, Uniform):
            raise UserError("process.name must be masked or flow: uniform says ratios, no chances")
        if isinstance(self.process, Masked) and self.process.objective == "score":
            raise UserError(
                "process.objective=score: a student is taught chances, and no mass of scores; "
                "distill a prior that learned elbo or simple"
            )


def make(config, *, step: str, workdir) -> Stage:
    """The stage of a recipe's section `step`; it reads the step `teacher`, and its codes."""
    section = recipe.build(Section, config[step])
    if section.teacher == step or section.teacher not in (
        *recipe.of_stage(config, "prior"),
        *recipe.of_stage(config, "distill"),
    ):
        raise UserError(f"{step}.teacher={section.teacher!r} is not another step that is a prior")
    model, teacher = section.model, config[section.teacher]
    for name in ("model", "process"):
        own, other = config[step][name].to_dict(), teacher[name].to_dict()
        checked = [field for field in own if field in other and field not in FREE]
        if differing := [field for field in checked if own[field] != other[field]]:
            raise UserError(
                f"{step}.{name}.{differing[0]}={own[differing[0]]!r}, but that of its teacher "
                f"{section.teacher} is {other[differing[0]]!r}; set both alike"
            )
    if model.classes:
        raise UserError(f"{step}.model.classes={model.classes}: a student of classes is not made")
    place = recipe.trained(config, workdir, section.teacher)
    plan = section.train
    if not plan.init_from:
        plan = dataclasses.replace(plan, init_from=str(place))
    section = dataclasses.replace(section, train=plan)
    base = prior.stage(section, config, step=step, workdir=workdir)

    shapes = {"teacher": jax.eval_shape(base.init, jax.random.key(0))[0]}

    def load_frozen(mesh):
        shardings = parallel.shardings(shapes, mesh, rules=model.rules, strict=False)
        abstract = parallel.abstract(shapes, shardings)["teacher"]
        return {"teacher": checkpoint.load_params(place / "checkpoints", abstract)}

    own = {name: config[step][name] for name in ("teacher", "calls", "teacher_calls", "divergence")}
    forwards = section.teacher_calls // section.calls
    return dataclasses.replace(
        base,
        loss=functools.partial(loss, section),
        validation_loss=None,
        frozen_spec=shapes,
        load_frozen=load_frozen,
        flops=base.flops + forwards * plan.batch * model.flops(),
        identity={**base.identity, **own},
        reads=lambda: {**base.reads(), "teacher": checkpoint.identity_of(place / "checkpoints")},
    )


def loss(section: Section, params, extra, batch, frozen, step, key):
    """The divergence of the student from the teacher in nats per position; the bound beside it."""
    model, process, position = section.model, section.process, batch["position"]
    values, codes = model.values, batch["codes"]
    t = schedules.stratified(position, section.train.batch, shared_key(key, TIME))
    keys = functools.partial(example_keys, key, position)

    def said(params, noisy, t):
        outputs = apply(model, params, noisy, process.noise.sigma(t), None)
        return outputs, process.belief(outputs, values=values).log_p

    teacher = functools.partial(said, frozen["teacher"])
    if isinstance(process, Flow):
        y = process.noisy(codes, t, keys(MASK), values=values)
        noisy = process.seen(y, process.gain(t, values=values))
        counted, target = 1.0, carried(section, teacher, y, t)
    else:
        noisy = hide(codes, process.noise.hidden(t), keys(MASK), values=values)
        counted = (noisy == values) / process.noise.mean
        target = taught(section, teacher, noisy, t, keys)
    outputs, own = said(params, noisy, t)
    p, q = (own, target) if section.divergence == "reverse" else (target, own)
    value = (counted * (jnp.exp(p) * (p - q)).sum(-1)).sum(-1).mean() / model.positions
    bound = process.bound(outputs, codes, noisy, t, values=values).mean() / model.positions
    return value, ({"nats_per_token": bound}, {})


def taught(section: Section, said, noisy, t, keys):
    """What the teacher says of every position, log chances [b, l, v], on its way from t.

    Args:
      said: (noisy, t) -> (outputs, log chances) of the teacher.
      keys: (purpose) -> keys of the examples.
    """
    noise, values = section.process.noise, section.model.values
    steps = section.teacher_calls // section.calls

    def walk(carry, index):
        codes, target = carry
        now, after = _times(section, t, index)
        _, log_p = said(codes, now)
        hidden = codes == values
        target = jnp.where(hidden[..., None], log_p, target)  # the last word before it is revealed
        before = noise.hidden(now)
        chance = jnp.where(before > 0, 1 - noise.hidden(after) / before, 0)
        draw = jax.vmap(lambda key: jax.random.uniform(key, codes.shape[1:]))
        reveal = hidden & (draw(chain.folded(keys(REVEAL), index)) < chance[:, None])
        drawn = chain.drawn(log_p, chain.folded(keys(VALUE), index))
        return (jnp.where(reveal, drawn, codes), target), None

    start = jnp.zeros((*noisy.shape, values))
    (_, target), _ = jax.lax.scan(walk, (noisy, start), jnp.arange(steps))
    return jax.lax.stop_gradient(target)


def carried(section: Section, said, y, t):
    """Log chances [b, l, v] whose one step takes the flow as far as several of the teacher's.

    Args:
      said: as of `taught`.
      y: noisy codes at t, see `Flow`.
    """
    process, steps = section.process, section.teacher_calls // section.calls
    gain = functools.partial(process.gain, values=section.model.values)

    def walk(y, index):
        now, after = _times(section, t, index)
        _, log_p = said(process.seen(y, gain(now)), now)
        more = gain(after) - gain(now)
        return y + more[:, None, None] * jnp.exp(log_p), (more, log_p)

    _, (more, log_p) = jax.lax.scan(walk, y, jnp.arange(steps))
    weight = jnp.log(more / jnp.maximum(more.sum(0), 1e-30))[:, :, None, None]
    return jax.lax.stop_gradient(jax.nn.logsumexp(log_p + weight, 0))


def _times(section, t, index):
    """Beginning and end of a step of the teacher, from t on."""
    return tuple(jnp.maximum(t - (index + n) / section.teacher_calls, 0) for n in (0, 1))
