"""The encoder: a ViT with a simplicial embedding, trained by self-distillation (DINO) with KoLeo. Source: arXiv 2507.12318, DINOv2.

    two global crops and some local ones ──► student ──► prototypes ─┐
    the global crops ──► teacher (the state's average) ──► centering or Sinkhorn ──► cross-entropy

With one kind of crops this is the paper's encoder. With several, the positions of a code are shared out evenly among the kinds, in the
order of their names: a kind's prototypes are read from its own positions alone, and (`consistency`) each of those positions must take
the same value in all crops of its kind. So what a kind's augmentation destroys cannot be kept in its positions: crops of turned hue make
positions that do not know the color, blurred ones make positions that do not know the shape. Codes come apart by what they ignore.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dlc_jax import optim
from dlc_jax import workdir as home
from dlc_jax.data import loader, sources, transforms
from dlc_jax.errors import UserError
from dlc_jax.losses import ssl
from dlc_jax.models import simplicial
from dlc_jax.models.layers import RULES
from dlc_jax.models.simplicial import Encoder
from dlc_jax.models.vit import standardize
from dlc_jax.stage import Plan, Stage
from dlc_jax.step import example_keys

STUDENT, TEACHER = 1, 2  # purposes of keys


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
      dino: weight of the prototypes' cross-entropy; 1 in the paper.
      koleo: weight of the KoLeo term; koleo_group: examples in which nearest neighbors are looked for.
      consistency: weight of the positions' own cross-entropy between crops, each position a set of V prototypes whose targets are
        balanced over the batch (Sinkhorn); 0 in the paper.
      consistency_temperature: (student, teacher) of that term.
    """

    teacher: str = "centering"
    student_temperature: float = 0.1
    teacher_temperature: tuple[float, float, int] = (0.04, 0.07, 37_500)
    simplex_temperature: float = 1.0
    center_momentum: float = 0.9
    momentum: tuple[float, float] = (0.992, 1.0)
    dino: float = 1.0
    koleo: float = 0.1
    koleo_group: int = 64
    consistency: float = 0.0
    consistency_temperature: tuple[float, float] = (1.0, 0.5)

    def __post_init__(self):
        if self.teacher not in ("centering", "sinkhorn"):
            raise UserError(f"encoder.objective.teacher={self.teacher!r} is unknown; known: centering, sinkhorn")


def make(config, *, step: str, workdir) -> Stage:
    """The stage of a recipe's section `step`."""
    section = config[step]
    plan = Plan(**section.train)
    objective = Objective(**section.objective)
    model = Encoder(**section.model)
    kinds = sorted(section.crops)
    if objective.koleo and plan.batch % objective.koleo_group:
        raise UserError(
            f"{step}.train.batch={plan.batch} does not divide into groups of {step}.objective.koleo_group={objective.koleo_group}"
        )
    if model.positions % len(kinds):
        raise UserError(
            f"{step}.model.positions={model.positions} cannot be shared out among {len(kinds)} kinds of crops ({', '.join(kinds)})"
        )
    share = model.positions // len(kinds)
    ranges = {kind: (place * share, (place + 1) * share) for place, kind in enumerate(kinds)}

    batch_spec = {"position": jax.ShapeDtypeStruct((plan.batch,), jnp.int32)}
    for kind in kinds:
        crops = section.crops[kind]
        for name, number, size in (
            ("global", crops.global_crops, crops.global_size),
            ("local", crops.local_crops, crops.local_size),
        ):
            if number:
                batch_spec[f"{kind}/{name}"] = jax.ShapeDtypeStruct((plan.batch, number, size, size, 3), jnp.uint8)

    def apply(params, crops, keys, kind):
        """uint8 [b, g, y, x, c] -> what the model says of each crop, [b, g, ...], from the kind's positions."""
        b, g = crops.shape[:2]
        if model.relaxation == "softmax":
            keys = None
        else:
            keys = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, kinds.index(kind)), g))(keys).reshape(b * g)
        pixels = standardize(crops.reshape(b * g, *crops.shape[2:]))
        out = model.apply({"params": params}, pixels, keys=keys, temperature=objective.simplex_temperature, read=ranges[kind])
        low, high = ranges[kind]
        found = {"prototypes": out["prototypes"], "vector": out["vector"]}
        found |= {"logits": out["logits"][:, low:high], "simplices": out["simplices"][:, low:high]}
        return {name: leaf.astype(jnp.float32).reshape(b, g, *leaf.shape[1:]) for name, leaf in found.items()}

    def temperature(step):
        start, end, rise = objective.teacher_temperature
        return start + (end - start) * jnp.clip(step / max(1, rise), 0.0, 1.0)

    def init(key):
        image = jnp.zeros((1, section.model.image, section.model.image, 3), jnp.float32)
        params = model.init(key, image, keys=jax.random.split(key, 1), temperature=1.0)["params"]
        return params, {"center": jnp.zeros((len(kinds), model.prototypes), jnp.float32)}

    def prepare(params, ema, extra, batch, frozen, step, key):
        keys = example_keys(key, batch["position"], TEACHER)
        for kind in kinds:
            out = apply(ema, batch[f"{kind}/global"], keys, kind)
            if objective.teacher == "sinkhorn":
                batch = batch | {f"{kind}/target": ssl.sinkhorn(out["prototypes"], temperature=temperature(step))}
            else:
                batch = batch | {f"{kind}/teacher": out["prototypes"]}
            if objective.consistency:
                balanced = jax.vmap(lambda logits: ssl.sinkhorn(logits, temperature=objective.consistency_temperature[1]), 2, 2)
                batch = batch | {f"{kind}/values": balanced(out["logits"])}
        return batch

    def loss(params, extra, batch, frozen, step, key):
        keys = example_keys(key, batch["position"], STUDENT)
        terms = {"dino": 0.0, "koleo": 0.0, "consistency": 0.0, "target_entropy": 0.0, "code_perplexity": 0.0}
        centers = []
        for place, kind in enumerate(kinds):
            views = apply(params, batch[f"{kind}/global"], keys, kind)
            prototypes, logits = views["prototypes"], views["logits"]
            if f"{kind}/local" in batch:
                local = apply(params, batch[f"{kind}/local"], keys, kind)
                prototypes, logits = (jnp.concatenate([views[name], local[name]], 1) for name in ("prototypes", "logits"))
            if objective.teacher == "sinkhorn":
                target = batch[f"{kind}/target"]
            else:
                target = ssl.center_probs(batch[f"{kind}/teacher"], extra["center"][place], temperature=temperature(step))
                centers.append(batch[f"{kind}/teacher"].mean((0, 1)))
            terms["dino"] += ssl.dino(prototypes, target, temperature=objective.student_temperature).mean()
            # One crop of every image at a time: two crops of one image would be each other's nearest neighbors.
            vectors = jnp.moveaxis(views["vector"], 1, 0)
            terms["koleo"] += (
                sum(ssl.koleo(crop, group=objective.koleo_group).mean() for crop in vectors) if objective.koleo else 0.0
            )
            if objective.consistency:
                agree = jax.vmap(
                    lambda student, teacher: ssl.dino(student, teacher, temperature=objective.consistency_temperature[0]), 2
                )
                terms["consistency"] += agree(logits, jax.lax.stop_gradient(batch[f"{kind}/values"])).mean()
            terms["target_entropy"] += ssl.entropy(target).mean() / len(kinds)
            terms["code_perplexity"] += jnp.exp(ssl.entropy(views["simplices"].mean((0, 1)))).mean() / len(kinds)
        total = objective.dino * terms["dino"] + objective.koleo * terms["koleo"] + objective.consistency * terms["consistency"]
        return total, (
            {name: jnp.asarray(term, jnp.float32) for name, term in terms.items()},
            {"center": jnp.stack(centers)} if centers else {},
        )

    def after_update(extra, params, aux, step):
        if not aux:
            return extra
        return {"center": ssl.update_center(extra["center"], aux["center"], momentum=objective.center_momentum)}

    def ema_decay(step):
        start, end = objective.momentum
        return end - (end - start) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(step / plan.steps, 1.0)))

    def batches(split):
        source = sources.source(split=split, **(config.data.to_dict() | section.view.to_dict()))
        views = transforms.Views({kind: transforms.MultiCrop(**section.crops[kind]) for kind in kinds})
        return loader.batches(
            source,
            batch=plan.batch,
            seed=config.seed,
            transform=views,
            threads=section.threads,
            fields=tuple(batch_spec.keys() - {"position"}),
        )

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
        rules=RULES,
        flops=plan.batch * sum(flops(model, section.crops[kind]) for kind in kinds),
        identity={
            "model": section.model.to_dict(),
            "crops": section.crops.to_dict(),
            "view": section.view.to_dict(),
            **home.lasting({"data": config.data.to_dict()}),
        },
        reads=lambda: {"source": sources.identity(split="train", **config.data)},
    )


def flops(model: Encoder, crops) -> float:
    """Model FLOPs of a step for one image and one kind of crops: three forward passes of every crop for the student, one of the global
    crops for the teacher; both with registers, simplicial head and DINO head.

    In the paper's sizes (2 crops of 261 tokens, 8 of 54) 2.161 TF. Two counts that go around differ by what is not built here: 2.18 TF
    has the DINO head on masked patches (iBOT) too, and 1.64 TF is that with drop path of 0.3 by subsets of the batch, which leaves the
    student's blocks 0.7 of their work; without iBOT it would be 1.629 TF.
    """
    views = crops.global_crops * simplicial.flops(model, image=crops.global_size)
    local = crops.local_crops * simplicial.flops(model, image=crops.local_size)
    return 3 * (views + local) + views
