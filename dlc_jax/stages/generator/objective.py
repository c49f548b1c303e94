"""What a generator is trained for: the `objective` section, and one batch's loss.

images or latents ──noise at drawn times──► network ──► the process's loss
                                              ▲
                codes, labels and embeddings, some of them hidden
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dlc_jax.diffusion import schedules
from dlc_jax.errors import UserError
from dlc_jax.models.dit import DiT
from dlc_jax.step import example_keys, shared_key
from dlc_jax.typing import Given

TIME, NOISE, DROP, POSITIONS, ROUTE, LABEL = 1, 2, 3, 4, 5, 6  # purposes of keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """The `objective` section.

    Attributes:
      drop: share of examples that see the null condition, for guidance. A label beside codes or an
        embedding is dropped by itself as often again, so that they alone are a condition too.
      drop_positions: largest share of positions taken from an example that keeps its codes; 0 in
        the paper. The share is drawn evenly up to it.
      foreign: share of examples in which other images' values stand at those positions; 0 in the
        paper. The model learns to believe the majority, factor by factor, so that codes put
        together from several images give one clean image.
      early: weight of the loss of the early head, which `model.early` makes, for internal guidance
        (arXiv 2605.18324).
      align: weight of the alignment of the patches of block `model.align` with those of the encoder
        that made the codes; 0 is none (REPA, arXiv 2410.06940; iREPA, arXiv 2512.10794).
      align_until: step after which they are no longer aligned; 0 is never.
      route: share of the patches that the middle blocks do not see in training, with `model.route`
        (SPRINT, arXiv 2510.21986).
      route_until: step after which they see all of them; 0 is never.
    """

    drop: float = 0.1
    drop_positions: float = 0.0
    foreign: float = 0.0
    early: float = 1.0
    align: float = 0.0
    align_until: int = 0
    route: float = 0.0
    route_until: int = 0

    def __post_init__(self):
        for name in ("drop", "drop_positions", "foreign"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"objective.{name}={getattr(self, name)} is a share: 0 to 1")
        if not 0 <= self.route < 1:
            raise UserError(f"objective.route={self.route} is a share of patches: from 0, below 1")
        for name in ("early", "align", "align_until", "route_until"):
            if getattr(self, name) < 0:
                raise UserError(f"objective.{name}={getattr(self, name)} must be at least 0")


@dataclasses.dataclass(frozen=True)
class Task:
    """What `loss` and `prepare` work on.

    Attributes:
      model: the network.
      process: how data become noise, one of `diffusion.processes.PROCESSES`.
      objective: see `Objective`.
      batch: examples of a global step.
      teacher: (frozen, images uint8 [b, y, x, 3]) -> patches [b, m, d] of the encoder, or None.
    """

    model: DiT
    process: Any
    objective: Objective
    batch: int
    teacher: Any = None


def prepare(task: Task, params, ema, extra, batch, frozen, step, key):
    """Adds other images' codes, for `foreign`, and the encoder's patches, for `align`.

    Codes are those of neighbors in the global batch, which a microbatch may not hold, and another
    one for each position, so that the foreign values agree on nothing. Those of one image would
    teach the model to take all factors from the image that has most positions.
    """
    length, size = task.model.positions, task.batch
    if length and task.objective.foreign:
        rows, columns = jnp.arange(size)[:, None], jnp.arange(length)
        neighbors = (rows + 1 + columns % (size - 1)) % size
        batch = batch | {"other": batch["codes"][neighbors, columns]}
    if task.teacher is not None:
        until, images = task.objective.align_until, batch["image"]

        def patches():
            return spatial(task.teacher(frozen, images))

        shape = jax.eval_shape(patches)
        found = (
            jax.lax.cond(step < until, patches, lambda: jnp.zeros(shape.shape, shape.dtype))
            if until
            else patches()
        )
        batch = batch | {"patches": found}
    return batch


def spatial(patches):
    """Patches [b, m, d] normalized over an image's patches, each channel by itself, float32.

    It takes away what all patches share, the image as a whole, and leaves what differs from place
    to place. Source: iREPA (arXiv 2512.10794).
    """
    patches = patches.astype(jnp.float32)
    centered = patches - patches.mean(1, keepdims=True)
    return centered / (patches.std(1, keepdims=True) + 1e-6)


def hide(model: DiT, objective: Objective, batch, key) -> Given:
    """The condition, null at whole examples, and null or foreign at single positions of codes."""
    position = batch["position"]

    def dropped(purpose):
        keys = example_keys(key, position, purpose)
        return jax.vmap(lambda key: jax.random.uniform(key) < objective.drop)(keys)

    whole = dropped(DROP)

    def one(codes, other, whole, share):
        level, each, kind = jax.random.split(share, 3)
        draw = jax.random.uniform(each, codes.shape)
        some = draw < jax.random.uniform(level) * objective.drop_positions
        instead = jnp.where(jax.random.uniform(kind) < objective.foreign, other, model.values)
        return jnp.where(whole, model.values, jnp.where(some, instead, codes))

    codes = label = None
    if model.positions:
        other = batch["other" if objective.foreign else "codes"]  # without `foreign` unused
        keys = example_keys(key, position, POSITIONS)
        codes = jax.vmap(one)(batch["codes"], other, whole, keys)
    if model.classes:
        null = whole | dropped(LABEL) if model.positions or model.embedding else whole
        label = jnp.where(null, model.classes, batch["label"])
    if model.embedding:
        return Given(codes=codes, label=label, embedding=batch["embedding"], drop=whole)
    return Given(codes=codes, label=label)


def loss(task: Task, params, extra, batch, frozen, step, key):
    """The process's loss at times drawn evenly over the global batch, and what goes with it."""
    model, process, objective = task.model, task.process, task.objective
    position = batch["position"]
    x = batch["latent"] if "latent" in batch else to_pixels(batch["image"])
    u = schedules.stratified(position, task.batch, shared_key(key, TIME))
    t = process.times(u, x[0].size)
    draw = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))
    noise = draw(example_keys(key, position, NOISE))
    x_t = process.noised(x, noise, t)
    given = hide(model, objective, batch, key)

    def at(keep, params):
        inputs = process.inputs(x_t, t)
        outputs = model.apply({"params": params}, *inputs, given, keep=keep, method="all")
        total = process.loss(outputs.output, x, noise, t).mean()
        metrics = {}
        if outputs.early is not None:
            metrics["early"] = process.loss(outputs.early, x, noise, t).mean()
            total = total + objective.early * metrics["early"]
        if task.teacher is not None:
            metrics["align"] = align(outputs.aligned, batch["patches"])
            on = step < objective.align_until if objective.align_until else True
            total = total + jnp.where(on, objective.align, 0.0) * metrics["align"]
        return total, metrics

    if not objective.route:
        total, metrics = at(None, params)
        return total, (metrics, {})
    keep = kept(model, objective.route, position, key)
    if not objective.route_until:
        total, metrics = at(keep, params)
        return total, (metrics, {})
    routed, whole = functools.partial(at, keep), functools.partial(at, None)
    total, metrics = either(step < objective.route_until, routed, whole, params)
    return total, (metrics, {})


def either(first, one: Callable, other: Callable, params):
    """one(params) if `first`, else other(params): (loss, metrics), of which the loss has gradients.

    They are computed within the branch that is taken. Where `jax.grad` looks through a `cond`, both
    branches' residuals are kept, those of the longer one whichever is taken.
    """

    @jax.custom_vjp
    def chosen(params):
        return jax.lax.cond(first, one, other, params)

    def forward(params):
        graded = (jax.value_and_grad(branch, has_aux=True) for branch in (one, other))
        return jax.lax.cond(first, *graded, params)

    def backward(grads, cotangent):
        return (jax.tree.map(lambda grad: (cotangent[0] * grad).astype(grad.dtype), grads),)

    chosen.defvjp(forward, backward)
    return chosen(params)


def kept(model: DiT, share: float, position, key):
    """Rows of the patches that the middle blocks see, int32 [b, k], ascending."""
    patches = (model.image // model.patch) ** 2

    def one(key):
        return jnp.sort(jax.random.permutation(key, patches)[: count_kept(model, share)])

    return jax.vmap(one)(example_keys(key, position, ROUTE))


def flops(task: Task, steps: int, teacher: float) -> float:
    """Model FLOPs of one example of a step, on the average of a run of `steps`.

    Args:
      teacher: of the encoder's forward pass.
    """
    model, objective = task.model, task.objective

    def share(until):
        return min(until / steps, 1.0) if until else 1.0

    total = 3 * model.flops(training=True)
    if objective.route:
        less = 3 * model.flops(training=True, kept=count_kept(model, objective.route))
        total += share(objective.route_until) * (less - total)
    return total + share(objective.align_until) * teacher


def count_kept(model: DiT, share: float) -> int:
    """How many patches are left when a share of them is dropped."""
    return max(1, round((1 - share) * (model.image // model.patch) ** 2))


def align(projected, patches):
    """1 - cosine of projected patches [b, n, a] and the encoder's [b, m, a], the mean of all.

    The encoder's are resized to the grid of the model's.
    """
    side, theirs = (round(x.shape[1] ** 0.5) for x in (projected, patches))
    if side != theirs:
        grid = patches.reshape(len(patches), theirs, theirs, -1)
        shape = (len(patches), side, side, grid.shape[-1])
        patches = jax.image.resize(grid, shape, "linear").reshape(len(patches), side**2, -1)
    a, b = (x.astype(jnp.float32) for x in (projected, patches))
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return 1 - ((a * b).sum(-1) / jnp.maximum(norms, 1e-6)).mean()


def to_pixels(images) -> jax.Array:
    """uint8 images to [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0
