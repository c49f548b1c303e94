"""Three small steps of kinds that are not built yet: if one did not fit, the contracts were wrong.

* `coupled`: an objective with a teacher and Sinkhorn over the global batch; the teacher is the
  state's average.
* `joint`: an encoder and a denoiser trained together through straight-through codes, as DisCo-Diff
  does; it can be warm-started.
* `job`: no training at all.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax.losses import ssl
from dlc_jax.optim import AdamW
from dlc_jax.stage import Job, Plan, Program, Stage
from dlc_jax.step import example_keys

WIDTH, VALUES, POSITIONS = 8, 5, 3


class Numbers:
    """Batches by index, with a state to save: record i is a function of i."""

    def __init__(self, batch, *, rows=None, start=0, seed=0):
        self.batch, self.next, self.seed = batch, start, seed
        self.rows = np.arange(batch, dtype=np.int32) if rows is None else rows

    def __iter__(self):
        return self

    def __next__(self):
        rows = self.next + self.rows
        self.next += self.batch
        x = np.stack([np.random.default_rng((self.seed, row)).normal(size=WIDTH) for row in rows])
        return {"x": x.astype(np.float32), "position": self.rows.astype(np.int32)}

    def get_state(self):
        return {"global_next_index": self.next}

    def set_state(self, state):
        self.next = state["global_next_index"]


def _spec(batch):
    return {
        "x": jax.ShapeDtypeStruct((batch, WIDTH), jnp.float32),
        "position": jax.ShapeDtypeStruct((batch,), jnp.int32),
    }


def _plan(steps, batch, **options):
    defaults = dict(log_every=2, save_every=2, validate_every=4, validate_batches=1)
    return Plan(steps=steps, batch=batch, **(defaults | options))


def coupled(*, steps=6, batch=8, seed=0, **options) -> Stage:
    """Sinkhorn self-distillation of a linear map.

    `extra` counts the updates, and holds a center that follows the teacher.
    """
    plan = _plan(steps, batch, **options)

    def init(key):
        kernel = 0.1 * jax.random.normal(key, (WIDTH, VALUES))
        extra = {"center": jnp.zeros((VALUES,)), "updates": jnp.zeros((), jnp.int32)}
        return {"kernel": kernel}, extra

    def prepare(params, ema, extra, batch, frozen, step, key):
        logits = batch["x"] @ ema["kernel"] + frozen["offset"]
        return batch | {"target": ssl.sinkhorn(logits, temperature=0.5), "logits": logits}

    def loss(params, extra, batch, frozen, step, key):
        keys = example_keys(key, batch["position"], 1)
        x = batch["x"] + 0.1 * jax.vmap(lambda key: jax.random.normal(key, (WIDTH,)))(keys)
        log = jax.nn.log_softmax(x.astype(params["kernel"].dtype) @ params["kernel"])
        value = -(batch["target"] * log.astype(jnp.float32)).sum(-1).mean()
        return value, ({"noise": x.mean()}, {"center": batch["logits"].mean(0)})

    def after_update(extra, params, aux, step):
        center = 0.9 * extra["center"] + 0.1 * aux["center"]
        return {"center": center, "updates": extra["updates"] + 1}

    return Stage(
        init=init,
        prepare=prepare,
        loss=loss,
        after_update=after_update,
        ema_decay=lambda step: jnp.minimum(0.9, (1 + step) / (10 + step)),
        batch_spec=_spec(batch),
        frozen_spec={"offset": jax.ShapeDtypeStruct((VALUES,), jnp.float32)},
        load_frozen=lambda mesh: {"offset": jnp.arange(VALUES, dtype=jnp.float32) / VALUES},
        batches=lambda split, rows=None: Numbers(batch, rows=rows, seed=seed + (split != "train")),
        optimizer=AdamW(learning_rate=0.1).make(steps),
        plan=plan,
        identity={"width": WIDTH, "values": VALUES},
    )


def joint(*, steps=6, batch=8, wide=False, **options) -> Stage:
    """x -> straight-through Gumbel codes -> table -> reconstruction of x from a noisy x.

    `wide` adds a parameter that a warm start lacks.
    """
    plan = _plan(steps, batch, **options)

    def init(key):
        encode, table, out = jax.random.split(key, 3)
        params = {
            "encoder": {"kernel": 0.3 * jax.random.normal(encode, (WIDTH, POSITIONS * VALUES))},
            "table": 0.3 * jax.random.normal(table, (POSITIONS, VALUES, WIDTH)),
            "denoiser": {"kernel": 0.3 * jax.random.normal(out, (2 * WIDTH, WIDTH))},
        }
        return params | ({"head": {"bias": jnp.zeros((WIDTH,))}} if wide else {}), {}

    def loss(params, extra, batch, frozen, step, key):
        first, second = (example_keys(key, batch["position"], purpose) for purpose in (1, 2))
        gumbel = jax.vmap(lambda key: jax.random.gumbel(key, (POSITIONS, VALUES)))(first)
        noise = jax.vmap(lambda key: jax.random.normal(key, (WIDTH,)))(second)
        x = batch["x"].astype(params["table"].dtype)
        logits = (x @ params["encoder"]["kernel"]).reshape(-1, POSITIONS, VALUES)
        soft = jax.nn.softmax(logits + gumbel)
        hard = jax.nn.one_hot(soft.argmax(-1), VALUES) + soft - jax.lax.stop_gradient(soft)
        code = jnp.einsum("blv,lvd->bd", hard, params["table"])
        guess = jnp.concatenate([x + noise, code], -1) @ params["denoiser"]["kernel"]
        if wide:
            guess = guess + params["head"]["bias"]
        used = hard.max(1).mean().astype(jnp.float32)
        return jnp.square(guess - x).astype(jnp.float32).mean(), ({"used": used}, {})

    return Stage(
        init=init,
        loss=loss,
        batch_spec=_spec(batch),
        batches=lambda split, rows=None: Numbers(batch, rows=rows, seed=10 + (split != "train")),
        optimizer=AdamW(learning_rate=0.02).make(steps),
        plan=plan,
        identity={"wide": wide},
    )


def job() -> Job:
    """Writes one file, and says so."""

    def run(mesh, directory):
        (directory / "done.txt").write_text("done")
        return {"job/devices": mesh.size}

    shape = jax.ShapeDtypeStruct((4,), jnp.float32)

    def lower(mesh):
        return jax.jit(lambda x: x * 2).lower(shape)

    twice = Program(lower=lower, state=lambda mesh: {}, flops=4.0, batch=4)
    return Job(run=run, programs={"twice": twice})
