"""The generator p(image | codes): a diffusion transformer on the linear path, conditioned on codes through a table.

Source: DiT, flow matching, arXiv 2507.12318 section 3. With `codes=""` the same model is trained without codes: the ablation.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax import optim, parallel, recipe
from dlc_jax import workdir as home
from dlc_jax.data import loader, sources
from dlc_jax.data.codes import CodeStore, WithCodes
from dlc_jax.diffusion import flow, schedules
from dlc_jax.errors import UserError
from dlc_jax.evals import pictures
from dlc_jax.losses.diffusion import flow_loss
from dlc_jax.models.dit import RULES, DiT
from dlc_jax.pipeline import Pipeline
from dlc_jax.stage import Evaluator, Plan, Stage
from dlc_jax.step import example_keys, shared_key

TIME, NOISE, DROP, POSITIONS = 1, 2, 3, 4  # purposes of keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """The `objective` section.

    Attributes:
      prediction: "v" (noise minus data) or "x" (data).
      floor: smallest time in the x-prediction's weight 1 / t^2.
      time: (mean, standard deviation) of the logit-normal time; a mean above 0 leans to noise.
      drop: share of examples that see the null condition, for guidance.
      drop_positions: largest share of positions taken from an example that keeps its codes; the share is drawn evenly up to it. 0 in
        the paper.
      foreign: share of examples in which other images' values stand at those positions, instead of none. The model learns to
        believe the majority, factor by factor, so that codes put together from several images give one clean image. 0 in the paper.
    """

    prediction: str = "v"
    floor: float = 0.1
    time: tuple[float, float] = (0.0, 1.0)
    drop: float = 0.1
    drop_positions: float = 0.0
    foreign: float = 0.0

    def __post_init__(self):
        if self.prediction not in ("v", "x"):
            raise UserError(f"generator.objective.prediction={self.prediction!r} is unknown; known: v, x")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """The `grid` section: pictures drawn on the way, always of the same codes with the same noise.

    Attributes:
      every: steps between two; 0 is only at the end.
      count: images.
      sampling_steps, guidance, method: as in the samples job.
    """

    every: int = 0
    count: int = 16
    sampling_steps: int = 12
    guidance: float = 1.5
    method: str = "heun"

    def __post_init__(self):
        if self.every < 0 or self.count < 1 or self.sampling_steps < 1:
            raise UserError(f"generator.grid: every must be at least 0, count and sampling_steps at least 1; got {self}")


def to_pixels(images) -> jax.Array:
    """uint8 images to [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def make(config, *, step: str, workdir) -> Stage:
    """The stage of a recipe's section `step`; codes come from the store of the job named in `codes`, latents too if `latents`."""
    section = config[step]
    plan = Plan(**section.train)
    objective, shown = Objective(**section.objective), Grid(**section.grid)
    model = DiT(**section.model)
    image, channels, length, values = section.model.image, section.model.channels, model.positions, model.values
    field = "latent" if section.latents else "image"
    if bool(section.codes) != bool(length):
        raise UserError(
            f"{step}.codes={section.codes!r} does not go with {step}.model.positions={length}: without codes, positions is 0"
        )

    batch_spec = {"position": jax.ShapeDtypeStruct((plan.batch,), jnp.int32)}
    batch_spec[field] = jax.ShapeDtypeStruct((plan.batch, image, image, channels), jnp.float32 if section.latents else jnp.uint8)
    if length:
        batch_spec["codes"] = jax.ShapeDtypeStruct((plan.batch, length), jnp.int32)

    def init(key):
        x = jnp.zeros((1, image, image, channels))
        codes = jnp.zeros((1, length), jnp.int32) if length else None
        return model.init(key, x, jnp.zeros((1,)), codes)["params"], {}

    def prepare(params, ema, extra, batch, frozen, step, key):
        if not length or not objective.foreign:
            return batch
        # Neighbors in the global batch, which a microbatch may not hold; another one for each position, so that the foreign values
        # agree on nothing: those of one image would teach the model to take all factors from the image that has most positions.
        rows, columns = jnp.arange(plan.batch)[:, None], jnp.arange(length)
        return batch | {"other": batch["codes"][(rows + 1 + columns % (plan.batch - 1)) % plan.batch, columns]}

    def hide(codes, other, position, key):
        """Codes with the null id, or another image's values, where a whole example or single positions are dropped."""

        def one(codes, other, drop, share):
            whole = jax.random.uniform(drop) < objective.drop
            level, each, kind = jax.random.split(share, 3)
            some = jax.random.uniform(each, codes.shape) < jax.random.uniform(level) * objective.drop_positions
            instead = jnp.where(jax.random.uniform(kind) < objective.foreign, other, values)
            return jnp.where(whole, values, jnp.where(some, instead, codes))

        return jax.vmap(one)(codes, other, example_keys(key, position, DROP), example_keys(key, position, POSITIONS))

    def loss(params, extra, batch, frozen, step, key):
        x = batch["latent"] if section.latents else to_pixels(batch["image"])
        mean, deviation = objective.time
        u = schedules.stratified(batch["position"], plan.batch, shared_key(key, TIME))
        t = schedules.logit_normal(u, mean, deviation)
        noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(example_keys(key, batch["position"], NOISE))
        other = batch["other" if objective.foreign else "codes"] if length else None  # without foreign values none is chosen
        codes = hide(batch["codes"], other, batch["position"], key) if length else None
        prediction = model.apply({"params": params}, flow.interpolate(x, noise, t), t, codes)
        value = flow_loss(prediction, x, noise, t, kind=objective.prediction, floor=objective.floor).mean()
        return value, ({}, {})

    def store(split):
        found = CodeStore(recipe.place(config, workdir, section.codes) / split)
        return found.checked(positions=length, values=values, where=step)

    def batches(split):
        source = sources.source(split=split, **config.data)
        if length:
            identity = sources.identity(split=split, **config.data)
            source = WithCodes(source, store(split), identity=identity)
        return loader.batches(
            source, batch=plan.batch, seed=config.seed, fields=tuple(name for name in batch_spec if name != "position")
        )

    def reads():
        found = {"source": sources.identity(split="train", **config.data)}
        return found | ({"store": store("train").origin} if length else {})

    @functools.cache
    def networks(mesh):
        batch = -(-shown.count // parallel.shares(mesh)) * parallel.shares(mesh)
        how = {"steps": shown.sampling_steps, "guidance": shown.guidance, "method": shown.method}
        return Pipeline(config, workdir, mesh=mesh, batch=batch, generator=step, **how)

    def draw(state, frozen, mesh, directory):
        params, seed = state.params if state.ema is None else state.ema, config.seed
        if length:
            source = sources.source(split="validation", **config.data)
            rows = sources.choose(source, shown.count)
            drawn = networks(mesh).decode(store("validation").codes(rows), params=params, seed=seed)
            real = np.stack([source[int(row)]["image"] for row in rows])
            picture = pictures.labelled_rows({"real": real, "from its code": drawn})
            what = "unseen images above what the generator draws from their codes"
        else:
            picture = pictures.grid(networks(mesh).decode(None, count=shown.count, params=params, seed=seed))
            what = "what the generator draws"
        if jax.process_index() == 0:
            pictures.save_png(directory / "pictures" / f"step_{int(state.step)}.png", picture)
            steps = sorted(int(path.stem.removeprefix("step_")) for path in (directory / "pictures").glob("step_*.png"))
            sentences = {f"step_{at}.png": f"After {at} steps: {what}; always the same codes and noise." for at in steps}
            pictures.save_captions(directory / "pictures", sentences)
        return {"samples": picture}

    return Stage(
        init=init,
        prepare=prepare,
        loss=loss,
        after_update=lambda extra, params, aux, step: extra,
        ema_decay=lambda step: jnp.minimum(section.ema_decay, (1 + step) / (10 + step)),
        batch_spec=batch_spec,
        frozen_spec={},
        load_frozen=lambda mesh: {},
        batches=batches,
        optimizer=optim.make(steps=plan.steps, **section.optimizer),
        plan=plan,
        rules=RULES if length else RULES[:-1],
        flops=3 * plan.batch * model.flops(),
        evals=() if section.latents else (Evaluator("grid", shown.every, draw),),  # latents are no pictures yet
        identity={
            "model": section.model.to_dict(),
            "codes": section.codes,
            "latents": section.latents,
            **home.lasting({"data": config.data.to_dict()}),
        },
        reads=reads,
    )
