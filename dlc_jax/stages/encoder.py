"""The encoder: a ViT with a simplicial embedding, trained by self-distillation (DINO) with KoLeo. Source: arXiv 2507.12318, DINOv2.

    two global crops and some local ones ──► student ──► prototypes ─┐
    the global crops ──► teacher (the state's average) ──► centering or Sinkhorn ──► cross-entropy
"""

import dataclasses

import jax
import jax.numpy as jnp

from dlc_jax import optim
from dlc_jax.data import loader, sources, transforms
from dlc_jax.errors import UserError
from dlc_jax.losses import ssl
from dlc_jax.models.simplicial import Encoder
from dlc_jax.models.vit import standardize
from dlc_jax.stage import Plan, Stage
from dlc_jax.step import example_keys

SIMPLEX = 1  # purpose of a key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """The `objective` section.

    Attributes:
      teacher: "centering" or "sinkhorn".
      student_temperature: of the student's prototype softmax.
      teacher_temperature: (start, end, steps of the linear rise).
      simplex_temperature: of the simplicial embedding, student and teacher.
      center_momentum: of the running mean of teacher logits.
      momentum: (start, end) of the teacher's decay, a cosine over the run.
      koleo: weight of the KoLeo term; koleo_group: examples in which nearest neighbors are looked for.
    """

    teacher: str = "centering"
    student_temperature: float = 0.1
    teacher_temperature: tuple[float, float, int] = (0.04, 0.07, 37_500)
    simplex_temperature: float = 1.0
    center_momentum: float = 0.9
    momentum: tuple[float, float] = (0.992, 1.0)
    koleo: float = 0.1
    koleo_group: int = 64

    def __post_init__(self):
        if self.teacher not in ("centering", "sinkhorn"):
            raise UserError(f"encoder.objective.teacher={self.teacher!r} is unknown; known: centering, sinkhorn")


def make(config, *, step: str, workdir) -> Stage:
    """The stage of a recipe's section `step`."""
    section = config[step]
    plan = Plan(**section.train)
    objective = Objective(**section.objective)
    model = Encoder(**section.model)
    crops = transforms.MultiCrop(**section.crops)
    if objective.koleo and plan.batch % objective.koleo_group:
        raise UserError(f"{step}.train.batch={plan.batch} does not divide into groups of {step}.objective.koleo_group={objective.koleo_group}")
    batch_spec = {
        "position": jax.ShapeDtypeStruct((plan.batch,), jnp.int32),
        "global": jax.ShapeDtypeStruct((plan.batch, section.crops.global_crops, section.crops.global_size, section.crops.global_size, 3), jnp.uint8),
    }
    if section.crops.local_crops:
        size = section.crops.local_size
        batch_spec["local"] = jax.ShapeDtypeStruct((plan.batch, section.crops.local_crops, size, size, 3), jnp.uint8)

    def apply(params, crops, keys):
        """uint8 [b, g, y, x, c] -> the model's outputs, each [b, g, ...]."""
        b, g = crops.shape[:2]
        keys = None if keys is None else jax.vmap(lambda key: jax.random.split(key, g))(keys).reshape(b * g)
        out = model.apply(
            {"params": params}, standardize(crops.reshape(b * g, *crops.shape[2:])), keys=keys, temperature=objective.simplex_temperature
        )
        return {name: out[name].reshape(b, g, *out[name].shape[1:]) for name in ("prototypes", "vector", "simplices")}

    def temperature(step):
        start, end, rise = objective.teacher_temperature
        return start + (end - start) * jnp.clip(step / max(1, rise), 0.0, 1.0)

    def init(key):
        image = jnp.zeros((1, section.model.image, section.model.image, 3), jnp.float32)
        keys = jax.random.split(key, 1)
        params = model.init(key, image, keys=keys, temperature=1.0)["params"]
        return params, {"center": jnp.zeros((section.model.prototypes,), jnp.float32)}

    def prepare(params, ema, extra, batch, frozen, step, key):
        keys = example_keys(key, batch["position"], SIMPLEX + 1) if model.relaxation != "softmax" else None
        logits = apply(ema, batch["global"], keys)["prototypes"].astype(jnp.float32)
        if objective.teacher == "sinkhorn":
            return batch | {"teacher": ssl.sinkhorn(logits, temperature=temperature(step))}
        return batch | {"teacher_logits": logits}

    def loss(params, extra, batch, frozen, step, key):
        keys = example_keys(key, batch["position"], SIMPLEX) if model.relaxation != "softmax" else None
        views = apply(params, batch["global"], keys)
        prototypes = [views["prototypes"]]
        if section.crops.local_crops:
            prototypes.append(apply(params, batch["local"], keys)["prototypes"])
        aux = {}
        if objective.teacher == "sinkhorn":
            target = batch["teacher"]
        else:
            target = ssl.center_probs(batch["teacher_logits"], extra["center"], temperature=temperature(step))
            aux["center"] = batch["teacher_logits"].mean((0, 1))
        dino = ssl.dino(jnp.concatenate(prototypes, 1), target, temperature=objective.student_temperature).mean()
        # One crop of every image at a time: two crops of one image would be each other's nearest neighbors.
        spread = sum(ssl.koleo(views["vector"][:, g], group=objective.koleo_group).mean() for g in range(section.crops.global_crops))
        total = dino + objective.koleo * spread
        mean = target.mean((0, 1))
        usage = views["simplices"].astype(jnp.float32).mean((0, 1))
        metrics = {
            "dino": dino,
            "koleo": spread,
            "target_entropy": ssl.entropy(target).mean(),
            "prototype_entropy": ssl.entropy(mean),
            "code_perplexity": jnp.exp(ssl.entropy(usage)).mean(),
        }
        return total, (metrics, aux)

    def after_update(extra, params, aux, step):
        if objective.teacher == "sinkhorn":
            return extra
        return {"center": ssl.update_center(extra["center"], aux["center"], momentum=objective.center_momentum)}

    def ema_decay(step):
        start, end = objective.momentum
        return end - (end - start) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(step / plan.steps, 1.0)))

    def batches(split):
        source = sources.source(config.data.name, split, **config.data.options)
        return loader.batches(source, batch=plan.batch, seed=config.seed, transform=crops, fields=tuple(name for name in batch_spec if name != "position"))

    return Stage(
        init=init,
        prepare=prepare,
        loss=loss,
        after_update=after_update,
        ema_decay=ema_decay,
        batch_spec=batch_spec,
        frozen_spec={},
        load_frozen=lambda mesh: {},
        batches=batches,
        optimizer=optim.make(steps=plan.steps, **section.optimizer),
        plan=plan,
        identity={"model": section.model.to_dict(), "crops": section.crops.to_dict(), "data": config.data.to_dict()},
    )
