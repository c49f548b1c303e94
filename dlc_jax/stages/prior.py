"""The prior over codes: a time-agnostic masked transformer under the continuous-time bound.

Source: MDLM and RADD (the optimal masked denoiser does not depend on time); arXiv 2507.12318,
section 3.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from dlc_jax import recipe
from dlc_jax.data import loader
from dlc_jax.data.codes import CodeStore
from dlc_jax.diffusion import masked, schedules
from dlc_jax.models.masked_transformer import MaskedTransformer
from dlc_jax.optim import AdamW
from dlc_jax.stage import Plan, Stage
from dlc_jax.step import example_keys, shared_key

TIME, MASK = 1, 2  # purposes of keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """The section of a prior.

    Attributes:
      codes: step whose code store it learns from.
      model: the network.
      ema_decay: of the average of the parameters; less in the first steps.
      optimizer: of the parameters.
      train: how long and how.
    """

    codes: str = "codes"
    model: MaskedTransformer = MaskedTransformer()
    ema_decay: float = 0.9999
    optimizer: AdamW = AdamW(learning_rate=3e-4, warmup=2500)
    train: Plan = Plan(
        steps=500_456,
        batch=512,
        clip=1.0,
        dtype="bfloat16",
    )


def make(config, *, step: str, workdir) -> Stage:
    """The stage of a recipe's section `step`; it reads the store of the step `codes`."""
    section = recipe.build(Section, config[step])
    model, plan = section.model, section.train

    def store(split):
        codes = CodeStore(recipe.place(config, workdir, section.codes) / split)
        return codes.checked(positions=model.positions, values=model.values, where=step)

    def batches(split, rows=None):
        how = {"batch": plan.batch, "seed": config.seed, "rows": rows}
        return loader.batches(store(split), fields=("codes",), **how)

    return Stage(
        init=functools.partial(init, model),
        loss=functools.partial(loss, model, plan.batch),
        ema_decay=lambda step: jnp.minimum(section.ema_decay, (1 + step) / (10 + step)),
        batch_spec={
            "position": jax.ShapeDtypeStruct((plan.batch,), jnp.int32),
            "codes": jax.ShapeDtypeStruct((plan.batch, model.positions), jnp.int32),
        },
        batches=batches,
        optimizer=section.optimizer.make(plan.steps, model.layer),
        plan=plan,
        rules=model.rules,
        tables=model.tables,
        flops=3 * plan.batch * model.flops(),
        identity={"model": config[step].model.to_dict(), "codes": section.codes},
        former=lambda saved: saved | {"model": recipe.complete(MaskedTransformer, saved["model"])},
        reads=lambda: {"store": store("train").origin},
    )


def init(model: MaskedTransformer, key):
    return model.init(key, jnp.zeros((1, model.positions), jnp.int32))["params"], {}


def loss(model: MaskedTransformer, batch_size, params, extra, batch, frozen, step, key):
    """The bound in nats per position, of codes of which some positions are hidden."""
    t = schedules.stratified(batch["position"], batch_size, shared_key(key, TIME))
    keys = example_keys(key, batch["position"], MASK)
    noisy, hidden = masked.mask_codes(batch["codes"], t, keys, values=model.values)
    logits = model.apply({"params": params}, noisy)
    bound = masked.bound(logits, batch["codes"], hidden, t).mean() / model.positions
    return bound, ({"nats_per_token": bound}, {})
