"""The generator p(image | codes): a diffusion transformer on the linear path.

Codes condition it through a table. Source: DiT, flow matching, arXiv 2507.12318 section 3. With
`codes=""` the same model is trained without codes: the ablation.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dlc_jax import parallel, recipe
from dlc_jax import workdir as home
from dlc_jax.data import loader, sources
from dlc_jax.data.codes import CodeStore, WithCodes
from dlc_jax.data.sources import DataSet
from dlc_jax.diffusion import flow, schedules
from dlc_jax.diffusion.guidance import Guidance
from dlc_jax.diffusion.sample import Sampler
from dlc_jax.errors import UserError
from dlc_jax.evals import pictures
from dlc_jax.evaluation.training import Scores, TrainingScores
from dlc_jax.losses.diffusion import flow_loss
from dlc_jax.models.dit import DiT
from dlc_jax.networks import Networks
from dlc_jax.optim import AdamW
from dlc_jax.stage import Evaluator, Plan, Stage
from dlc_jax.step import example_keys, shared_key

TIME, NOISE, DROP, POSITIONS = 1, 2, 3, 4  # purposes of keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """The `objective` section.

    Attributes:
      prediction: "v" (noise minus data) or "x" (data).
      floor: smallest time in the x-prediction's weight 1 / t^2.
      time: (mean, standard deviation) of the logit-normal time. A mean above 0 leans to noise.
      drop: share of examples that see the null condition, for guidance.
      drop_positions: largest share of positions taken from an example that keeps its codes; 0 in
        the paper. The share is drawn evenly up to it.
      foreign: share of examples in which other images' values stand at those positions; 0 in the
        paper. The model learns to believe the majority, factor by factor, so that codes put
        together from several images give one clean image.
    """

    prediction: str = "v"
    floor: float = 0.1
    time: tuple[float, float] = (0.0, 1.0)
    drop: float = 0.1
    drop_positions: float = 0.0
    foreign: float = 0.0

    def __post_init__(self):
        if self.prediction not in flow.KINDS:
            known = ", ".join(flow.KINDS)
            raise UserError(
                f"generator.objective.prediction={self.prediction!r} is unknown; known: {known}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """The `grid` section: pictures drawn on the way, always of the same codes with the same noise.

    Attributes:
      every: steps between two; 0 is only at the end.
      count: images.
      sampler: how they are drawn.
    """

    every: int = 0
    count: int = 16
    sampler: Sampler = Sampler(steps=50, guidance=Guidance(scale=1.5))

    def __post_init__(self):
        if self.every < 0 or self.count < 1:
            raise UserError(
                f"generator.grid: every={self.every} must be at least 0, count={self.count} at "
                "least 1"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """The section of a generator.

    Attributes:
      codes: step whose code store conditions it; "" trains without codes.
      latents: draws latents of an autoencoder, kept in the store, instead of pixels.
      model: the network.
      objective: what it is trained for.
      ema_decay: of the average of the parameters; less in the first steps.
      grid: pictures drawn on the way.
      scores: what is measured of images drawn on the way.
      optimizer: of the parameters.
      train: how long and how.
    """

    codes: str = "codes"
    latents: bool = False
    model: DiT = DiT()
    objective: Objective = Objective()
    ema_decay: float = 0.9999
    grid: Grid = Grid()
    scores: Scores = Scores()
    optimizer: AdamW = AdamW(learning_rate=1e-4)
    train: Plan = Plan(
        steps=6_000_000,
        batch=256,
        dtype="bfloat16",
    )


def make(config, *, step: str, workdir) -> Stage:
    """The stage of a recipe's section `step`."""
    section = recipe.build(Section, config[step])
    model, plan = section.model, section.train
    if bool(section.codes) != bool(model.positions):
        raise UserError(
            f"{step}.codes={section.codes!r} does not go with {step}.model.positions="
            f"{model.positions}: without codes, positions is 0"
        )
    spec, data = batch_spec(section), DataSet(**config.data)

    def store(split):
        codes = CodeStore(recipe.place(config, workdir, section.codes) / split)
        return codes.checked(positions=model.positions, values=model.values, where=step)

    def batches(split, rows=None):
        source = data.source(split)
        if model.positions:
            source = WithCodes(source, store(split), identity=data.identity(split))
        fields = tuple(name for name in spec if name != "position")
        how = {"batch": plan.batch, "seed": config.seed, "rows": rows}
        return loader.batches(source, fields=fields, **how)

    def reads():
        if section.scores.weights:
            scores.check()
        codes = {"store": store("train").origin} if model.positions else {}
        return {"source": data.identity("train")} | codes

    @functools.cache
    def network(mesh, most):  # compiled once, not at every picture
        parts = parallel.shares(mesh)
        batch = -(-most // parts) * parts
        return Networks(config, workdir, mesh, batch=batch)[step]

    def draw(state, mesh):
        found = section.scores
        how = {"seed": config.seed, "count": found.count, "sampler": found.sampler}
        return draw_images(data, network(mesh, section.scores.batch), store, state, **how)[1]

    grid = functools.partial(draw_grid, section.grid, config.seed, data, network, store)
    scores = TrainingScores(section.scores, data.source, draw, seed=config.seed)
    evals = (Evaluator("grid", section.grid.every, grid),)
    if section.scores.weights:
        evals += (Evaluator("scores", section.scores.every, scores),)
    return Stage(
        init=functools.partial(init, model),
        prepare=functools.partial(prepare, section),
        loss=functools.partial(loss, section),
        ema_decay=lambda step: jnp.minimum(section.ema_decay, (1 + step) / (10 + step)),
        batch_spec=spec,
        batches=batches,
        optimizer=section.optimizer.make(plan.steps, model.layer),
        plan=plan,
        rules=model.rules,
        flops=3 * plan.batch * model.flops(),
        evals=() if section.latents else evals,  # latents are not pictures yet
        identity={
            "model": config[step].model.to_dict(),
            "codes": section.codes,
            "latents": section.latents,
            **home.lasting({"data": config.data.to_dict()}),
        },
        former=lambda saved: saved | {"model": recipe.complete(DiT, saved["model"])},
        reads=reads,
    )


def batch_spec(section: Section) -> dict[str, jax.ShapeDtypeStruct]:
    """The global batch: `position`, `image` or `latent`, and `codes`."""
    model, batch = section.model, section.train.batch
    shape = (batch, model.image, model.image, model.channels)
    spec = {"position": jax.ShapeDtypeStruct((batch,), jnp.int32)}
    if section.latents:
        spec["latent"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    else:
        spec["image"] = jax.ShapeDtypeStruct(shape, jnp.uint8)
    if model.positions:
        spec["codes"] = jax.ShapeDtypeStruct((batch, model.positions), jnp.int32)
    return spec


def init(model: DiT, key):
    x = jnp.zeros((1, model.image, model.image, model.channels))
    codes = jnp.zeros((1, model.positions), jnp.int32) if model.positions else None
    return model.init(key, x, jnp.zeros((1,)), codes)["params"], {}


def prepare(section: Section, params, ema, extra, batch, frozen, step, key):
    """Adds other images' codes, for `foreign`.

    Those of neighbors in the global batch, which a microbatch may not hold, and another one for
    each position, so that the foreign values agree on nothing. Those of one image would teach the
    model to take all factors from the image that has most positions.
    """
    length, size = section.model.positions, section.train.batch
    if not length or not section.objective.foreign:
        return batch
    rows, columns = jnp.arange(size)[:, None], jnp.arange(length)
    neighbors = (rows + 1 + columns % (size - 1)) % size
    return batch | {"other": batch["codes"][neighbors, columns]}


def hide(section: Section, codes, other, position, key):
    """Codes with the null id, or another image's values, at whole examples or single positions."""
    objective, null = section.objective, section.model.values

    def one(codes, other, drop, share):
        whole = jax.random.uniform(drop) < objective.drop
        level, each, kind = jax.random.split(share, 3)
        draw = jax.random.uniform(each, codes.shape)
        some = draw < jax.random.uniform(level) * objective.drop_positions
        instead = jnp.where(jax.random.uniform(kind) < objective.foreign, other, null)
        return jnp.where(whole, null, jnp.where(some, instead, codes))

    keys = [example_keys(key, position, purpose) for purpose in (DROP, POSITIONS)]
    return jax.vmap(one)(codes, other, *keys)


def loss(section: Section, params, extra, batch, frozen, step, key):
    """The flow-matching loss of images at logit-normal times."""
    model, objective, position = section.model, section.objective, batch["position"]
    x = batch["latent"] if section.latents else to_pixels(batch["image"])
    u = schedules.stratified(position, section.train.batch, shared_key(key, TIME))
    t = schedules.logit_normal(u, *objective.time)
    draw = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))
    noise = draw(example_keys(key, position, NOISE))
    codes = None
    if model.positions:
        other = batch["other" if objective.foreign else "codes"]  # without `foreign` unused
        codes = hide(section, batch["codes"], other, position, key)
    prediction = model.apply({"params": params}, flow.interpolate(x, noise, t), t, codes)
    kind = {"kind": objective.prediction, "floor": objective.floor}
    return flow_loss(prediction, x, noise, t, **kind).mean(), ({}, {})


def to_pixels(images) -> jax.Array:
    """uint8 images to [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def draw_images(data, network, store, state, *, seed: int, count: int, sampler: Sampler):
    """(rows of the validation split, images uint8 [count, y, x, 3] drawn from their codes).

    Always of the same codes with the same noise; without codes rows are None.
    """
    params = state.params if state.ema is None else state.ema
    how = {"params": params, "seed": seed, "sampler": sampler}
    if not network.model.positions:
        return None, network.decode(None, count=count, **how)
    rows = np.resize(sources.choose(data.source("validation"), count), count)
    return rows, network.decode(store("validation").codes(rows), **how)


def draw_grid(grid: Grid, seed: int, data, network, store, state, frozen, mesh, directory):
    """The evaluator's picture: validation images above what is drawn from their codes."""
    network, count = network(mesh, grid.count), grid.count
    if network.model.positions:
        count = min(count, len(data.source("validation")))
    how = {"seed": seed, "count": count, "sampler": grid.sampler}
    rows, drawn = draw_images(data, network, store, state, **how)
    if rows is None:
        picture, what = pictures.grid(drawn), "what the generator draws"
    else:
        source = data.source("validation")
        real = np.stack([source[int(row)]["image"] for row in rows])
        picture = pictures.labelled_rows({"real": real, "from its code": drawn})
        what = "unseen images above what the generator draws from their codes"
    if jax.process_index() == 0:
        folder = directory / "pictures"
        pictures.save_png(folder / f"step_{int(state.step)}.png", picture)
        steps = sorted(int(path.stem.removeprefix("step_")) for path in folder.glob("step_*.png"))
        sentences = {
            f"step_{at}.png": f"After {at} steps: {what}; always the same codes and noise."
            for at in steps
        }
        pictures.save_captions(folder, sentences)
    return {"samples": picture}
