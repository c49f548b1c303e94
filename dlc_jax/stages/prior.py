"""The prior over codes: a time-agnostic masked transformer under the continuous-time bound.

Source: MDLM and RADD (the optimal masked denoiser does not depend on time); arXiv 2507.12318, section 3.
"""

import jax
import jax.numpy as jnp

from dlc_jax import optim, recipe
from dlc_jax.data import loader
from dlc_jax.data.codes import CodeStore
from dlc_jax.diffusion import masked, schedules
from dlc_jax.models.layers import RULES
from dlc_jax.models.masked_transformer import MaskedTransformer
from dlc_jax.stage import Plan, Stage
from dlc_jax.step import example_keys, shared_key

TIME, MASK = 1, 2  # purposes of keys


def make(config, *, step: str, workdir) -> Stage:
    """The stage of a recipe's section `step`; its codes come from the store of the job named in `codes`."""
    section = config[step]
    plan = Plan(**section.train)
    model = MaskedTransformer(**section.model)
    length, values = model.positions, model.values

    def init(key):
        return model.init(key, jnp.zeros((1, length), jnp.int32))["params"], {}

    def loss(params, extra, batch, frozen, step, key):
        t = schedules.stratified(batch["position"], plan.batch, shared_key(key, TIME))
        noisy, hidden = masked.mask_codes(batch["codes"], t, example_keys(key, batch["position"], MASK), values=values)
        logits = model.apply({"params": params}, noisy)
        bound = masked.bound(logits, batch["codes"], hidden, t).mean() / length
        return bound, ({"nats_per_token": bound}, {})

    def store(split):
        found = CodeStore(recipe.place(config, workdir, section.codes) / split)
        return found.checked(positions=length, values=values, where=step)

    def batches(split):
        return loader.batches(store(split), batch=plan.batch, seed=config.seed, fields=("codes",))

    return Stage(
        init=init,
        prepare=lambda params, ema, extra, batch, frozen, step, key: batch,
        loss=loss,
        after_update=lambda extra, params, aux, step: extra,
        ema_decay=lambda step: jnp.minimum(section.ema_decay, (1 + step) / (10 + step)),
        batch_spec={
            "position": jax.ShapeDtypeStruct((plan.batch,), jnp.int32),
            "codes": jax.ShapeDtypeStruct((plan.batch, length), jnp.int32),
        },
        frozen_spec={},
        load_frozen=lambda mesh: {},
        batches=batches,
        optimizer=optim.make(steps=plan.steps, **section.optimizer),
        plan=plan,
        rules=RULES,
        flops=3 * plan.batch * model.flops(),
        identity={"model": section.model.to_dict(), "codes": section.codes},
        reads=lambda: {"store": store("train").origin},
    )
