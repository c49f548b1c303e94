"""The generator p(image | codes): a diffusion transformer and one of the processes.

Codes condition it through a table; with `model.embedding` the continuous embedding of an image
does, which the codes step stored. Source: DiT (arXiv 2212.09748), arXiv 2507.12318 section 3. With
`codes=""` the same model is trained without codes: the ablation. With `latents` it draws latents of
an autoencoder, whose moments the codes step stored: each epoch draws them anew, of the image or of
its mirror image, with the code of the same view.
"""

import dataclasses
import functools
from typing import Annotated, Any

import jax
import jax.numpy as jnp

from dlc_jax import parallel, recipe
from dlc_jax import workdir as home
from dlc_jax.data import loader
from dlc_jax.diffusion.linear import Linear
from dlc_jax.diffusion.processes import PROCESSES
from dlc_jax.evaluation.training import Scores, TrainingScores
from dlc_jax.models.dit import DiT
from dlc_jax.networks import Networks
from dlc_jax.networks.generator import example, sized
from dlc_jax.optim import OPTIMIZERS, AdamW
from dlc_jax.stage import Evaluator, Plan, Stage
from dlc_jax.stages.generator import fitting
from dlc_jax.stages.generator import objective as training
from dlc_jax.stages.generator.objective import Objective, Task
from dlc_jax.stages.generator.pictures import Grid, draw_grid, draw_images
from dlc_jax.stages.generator.upstream import Upstream


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """The section of a generator.

    Attributes:
      codes: step whose code store conditions it; "" trains without codes. With `model.positions=0`
        none are read, but what else the store has: embeddings (`model.embedding`) or latents.
      latents: draws latents of an autoencoder, kept in that store, instead of pixels.
      normalize: takes latents to mean 0 and the process's deviation, channel by channel, as the
        codes step measured them.
      process: how images become noise, and what is learned of it.
      model: the network.
      objective: what it is trained for beside the process's loss.
      threads: that read records ahead; more where files are read.
      ema_decay: of the average of the parameters; less in the first steps.
      grid: pictures drawn on the way.
      scores: what is measured of images drawn on the way.
      optimizer: of the parameters.
      train: how long and how.
    """

    codes: str = "codes"
    latents: bool = False
    normalize: bool = False
    process: Annotated[Any, PROCESSES] = Linear()
    model: DiT = DiT()
    objective: Objective = Objective()
    threads: int = 8
    ema_decay: float = 0.9999
    grid: Grid = Grid()
    scores: Scores = Scores()
    optimizer: Annotated[Any, OPTIMIZERS] = AdamW(learning_rate=1e-4)
    train: Plan = Plan(
        steps=6_000_000,
        batch=256,
        dtype="bfloat16",
    )


def make(config, *, step: str, workdir) -> Stage:
    """The stage of a recipe's section `step`."""
    section = recipe.build(Section, config[step])
    model, plan = sized(section.model, section.process), section.train
    fitting.check(section, config.data.image, step)
    fitting.check_embedding(config, section, step)
    files = Upstream(config, workdir, step, section)
    data, spec = files.data, batch_spec(section, config.data.image)
    task = Task(model, section.process, section.objective, plan.batch, files.teacher)

    def batches(split, rows=None):
        fields = tuple(name for name in spec if name != "position")
        how = {"batch": plan.batch, "seed": config.seed, "rows": rows}
        how["threads"] = section.threads
        source, transform = files.source(split, fields), files.transform()
        return loader.batches(source, fields=fields, transform=transform, **how)

    def reads():
        if section.scores.weights:
            scores.check()
        data.check_classes(model.classes, step)
        fitting.check_bases(section, step)
        codes = {"store": files.store("train").origin} if section.codes else {}
        return {"source": data.identity("train")} | codes

    @functools.cache
    def network(mesh, most):  # compiled once, not at every picture
        parts = parallel.shares(mesh)
        batch = -(-most // parts) * parts
        return Networks(config, workdir, mesh, batch=batch)[step]

    def draw(state, mesh):
        found = section.scores
        how = {"seed": config.seed, "count": found.count, "sampler": found.sampler}
        return draw_images(data, network(mesh, section.scores.batch), files.store, state, **how)[1]

    grid = functools.partial(draw_grid, section.grid, config.seed, data, network, files.store)
    scores = TrainingScores(section.scores, data.source, draw, seed=config.seed)
    evals = (Evaluator("grid", section.grid.every, grid),)
    if section.scores.weights:
        evals += (Evaluator("scores", section.scores.every, scores),)
    made = {name: config[step][name].to_dict() for name in ("model", "process")}
    return Stage(
        init=functools.partial(init, model),
        prepare=functools.partial(training.prepare, task),
        loss=functools.partial(training.loss, task),
        ema_decay=lambda step: jnp.minimum(section.ema_decay, (1 + step) / (10 + step)),
        frozen_spec=files.frozen_spec,
        load_frozen=files.load_frozen,
        batch_spec=spec,
        batches=batches,
        optimizer=section.optimizer.make(plan.steps, model.layer),
        plan=plan,
        rules=model.rules,
        tables=model.tables,
        flops=plan.batch * training.flops(task, plan.steps, files.teacher_flops),
        evals=evals,
        identity={
            **made,
            "codes": section.codes,
            "latents": section.latents,
            "normalize": section.normalize,
            **home.lasting({"data": config.data.to_dict()}),
        },
        former=functools.partial(former, made["process"]),
        reads=reads,
    )


def former(process, saved):
    """A checkpoint's identity in the fields of this version.

    Before it had a process there was one, and what the network gave was told by config.json alone.
    """
    found = dict(saved.get("process", process if process["name"] == "linear" else {}))
    name = found.pop("name", "linear")
    complete = {"name": name, **recipe.complete(PROCESSES[name], found)}
    model = recipe.complete(DiT, saved["model"])
    return {"normalize": False} | saved | {"model": model, "process": complete}


def batch_spec(section: Section, image: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The global batch: `position`, `image` or `latent`, and what it reads as its condition.

    That is `codes`, `label` and `embedding`, float32 [b, e].
    Where patches are aligned there is the `image` beside its latent.
    """
    model, batch = section.model, section.train.batch
    spec = {"position": jax.ShapeDtypeStruct((batch,), jnp.int32)}
    if section.latents:
        shape = (batch, model.image, model.image, model.channels)
        spec["latent"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    if not section.latents or section.objective.align:
        channels = 3 if section.latents else model.channels
        spec["image"] = jax.ShapeDtypeStruct((batch, image, image, channels), jnp.uint8)
    if model.positions:
        spec["codes"] = jax.ShapeDtypeStruct((batch, model.positions), jnp.int32)
    if model.classes:
        spec["label"] = jax.ShapeDtypeStruct((batch,), jnp.int32)
    if model.embedding:
        spec["embedding"] = jax.ShapeDtypeStruct((batch, model.embedding), jnp.float32)
    return spec


def init(model: DiT, key):
    x = jnp.zeros((1, model.image, model.image, model.channels))
    return model.init(key, x, jnp.zeros((1,)), example(model))["params"], {}
