"""The prior over codes: a transformer that learns one of the processes of codes.

Sources: MDLM and RADD (the optimal masked denoiser does not depend on time), SEDD for the score
entropy; arXiv 2507.12318, section 3.
"""

import dataclasses
import functools
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from dlc_jax import recipe
from dlc_jax.data import loader
from dlc_jax.data.codes import CodeStore, WithCodes
from dlc_jax.data.sources import DataSet
from dlc_jax.diffusion import schedules
from dlc_jax.diffusion.code_processes import CODE_PROCESSES
from dlc_jax.diffusion.masked import Masked
from dlc_jax.errors import UserError
from dlc_jax.models.masked_transformer import MaskedTransformer
from dlc_jax.networks.prior import apply, example
from dlc_jax.optim import OPTIMIZERS, AdamW
from dlc_jax.stage import Plan, Stage
from dlc_jax.step import example_keys, shared_key

TIME, MASK, DROP, UNITS = 1, 2, 3, 4  # purposes of keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """The section of a prior.

    Attributes:
      codes: step whose code store it learns from.
      process: how codes become noise, and what is learned of it.
      model: the network.
      drop_label: share of the examples whose class is hidden from a model with classes, in [0, 1].
      ema_decay: of the average of the parameters; less in the first steps.
      optimizer: of the parameters.
      train: how long and how.
    """

    codes: str = "codes"
    process: Annotated[Any, CODE_PROCESSES] = Masked()
    model: MaskedTransformer = MaskedTransformer()
    drop_label: float = 0.1
    ema_decay: float = 0.9999
    optimizer: Annotated[Any, OPTIMIZERS] = AdamW(learning_rate=3e-4, warmup=2500)
    train: Plan = Plan(
        steps=500_456,
        batch=512,
        clip=1.0,
        dtype="bfloat16",
    )

    def __post_init__(self):
        if not 0 <= self.drop_label <= 1:
            raise UserError(f"drop_label={self.drop_label} must be in [0, 1]")


def make(config, *, step: str, workdir) -> Stage:
    """The stage of a recipe's section `step`; it reads the store of the step `codes`.

    Raises:
      UserError: a process that depends on the time, of a model that is not told it.
    """
    section = recipe.build(Section, config[step])
    if not isinstance(section.process, Masked) and not section.model.sigma_conditioning:
        name = config[step].process.name
        raise UserError(
            f"{step}.process.name={name} needs {step}.model.sigma_conditioning=True: what is "
            "learned depends on the time"
        )
    return stage(section, config, step=step, workdir=workdir)


def stage(section, config, *, step: str, workdir) -> Stage:
    """What a prior and its students share: network, codes, average, and the loss of a prior."""
    model, plan = section.model, section.train
    made = {name: config[step][name].to_dict() for name in ("model", "process")}

    def store(split):
        codes = CodeStore(recipe.place(config, workdir, section.codes) / split)
        return codes.checked(positions=model.positions, values=model.values, where=step)

    def batches(split, rows=None):
        how = {"batch": plan.batch, "seed": config.seed, "rows": rows}
        source = store(split)
        if model.classes:
            data = DataSet(**config.data)
            source = WithCodes(data.source(split), source, identity=data.identity(split))
        fields = tuple(name for name in batch_spec(section) if name != "position")
        return loader.batches(source, fields=fields, **how)

    def reads():
        if model.classes:
            DataSet(**config.data).check_classes(model.classes, step)
        return {"store": store("train").origin}

    return Stage(
        init=functools.partial(init, model),
        loss=functools.partial(loss, section),
        validation_loss=functools.partial(loss, section, training=False),
        ema_decay=lambda step: jnp.minimum(section.ema_decay, (1 + step) / (10 + step)),
        batch_spec=batch_spec(section),
        batches=batches,
        optimizer=section.optimizer.make(plan.steps, model.layer),
        plan=plan,
        rules=model.rules,
        tables=model.tables,
        flops=3 * plan.batch * model.flops(),
        identity={**made, "codes": section.codes},
        former=former,
        reads=reads,
    )


def former(saved):
    """A checkpoint's identity in the fields of this version; there was one process before."""
    found = dict(saved.get("process", {}))
    name = found.pop("name", "masked")
    process = {"name": name, **recipe.complete(CODE_PROCESSES[name], found)}
    model = recipe.complete(MaskedTransformer, saved["model"])
    return saved | {"model": model, "process": process}


def batch_spec(section: Section) -> dict[str, jax.ShapeDtypeStruct]:
    """The global batch: `position`, `codes`, and `label` of a model with classes."""
    batch, model = section.train.batch, section.model
    spec = {
        "position": jax.ShapeDtypeStruct((batch,), jnp.int32),
        "codes": jax.ShapeDtypeStruct((batch, model.positions), jnp.int32),
    }
    if model.classes:
        spec["label"] = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return spec


def init(model: MaskedTransformer, key):
    return model.init(key, *example(model))["params"], {}


def loss(section: Section, params, extra, batch, frozen, step, key, *, training: bool = True):
    """The process's loss in nats per position, beside the bound of the likelihood in the same.

    Args:
      training: with dropout, and classes hidden from some examples.
    """
    model, process, position = section.model, section.process, batch["position"]
    t = schedules.stratified(position, section.train.batch, shared_key(key, TIME))
    keys = functools.partial(example_keys, key, position)
    noisy = process.corrupt(batch["codes"], t, keys(MASK), values=model.values)
    label = None
    if model.classes:
        label = batch["label"]
    if model.classes and training:
        dropped = jax.vmap(jax.random.uniform)(keys(DROP)) < section.drop_label
        label = jnp.where(dropped, model.classes, label)
    how = {"dropout_keys": keys(UNITS)} if model.dropout and training else {}
    outputs = apply(model, params, noisy, process.noise.sigma(t), label, **how)
    of = outputs, batch["codes"], noisy, t
    value = process.loss(*of, values=model.values).mean() / model.positions
    bound = process.bound(*of, values=model.values).mean() / model.positions
    return value, ({"nats_per_token": bound}, {})
