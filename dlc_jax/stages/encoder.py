"""The encoder: a ViT with a simplicial embedding, trained by self-distillation. Source: arXiv 2507.12318, DINOv2 (arXiv 2304.07193).

    two global crops, some with masks, and some local ones ──► student ──► prototypes of crops and of masked patches ─┐
    the global crops, whole ──► teacher (the state's average) ──► centering or Sinkhorn ──► cross-entropy: DINO, iBOT

KoLeo keeps the vectors of different images apart. With one kind of crops this is the paper's encoder. With several, the positions of a
code are shared out evenly among the kinds, in the order of their names: a kind's prototypes are read from its own positions alone, and
(`consistency`) each of those positions must take the same value in all crops of its kind. So what a kind's augmentation destroys cannot be
kept in its positions: crops of turned hue make positions that do not know the color, blurred ones make positions that do not know the
shape. Codes come apart by what they ignore.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from dlc_jax import checkup, optim
from dlc_jax import workdir as home
from dlc_jax.data import loader, masks, sources, transforms
from dlc_jax.errors import UserError
from dlc_jax.losses import masked, ssl
from dlc_jax.models import simplicial
from dlc_jax.models.drop_path import drop_subsets
from dlc_jax.models.layers import RULES
from dlc_jax.models.simplicial import Encoder
from dlc_jax.models.vit import standardize
from dlc_jax.stage import Plan, Stage
from dlc_jax.step import example_keys

STUDENT, TEACHER, DROP = 1, 2, 3  # purposes of keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """The `objective` section. What rises does so linearly: (start, end, steps).

    Attributes:
      teacher: "centering" or "sinkhorn".
      student_temperature: of the student's prototype softmax.
      teacher_temperature: of the teacher's; it rises.
      simplex_temperature: of the simplicial embedding; (student's, teacher's), and each rises.
      center_momentum: of the running means of teacher logits, one of crops and one of patches.
      momentum: (start, end) of the teacher's decay, a cosine over the run.
      dino: weight of the prototypes' cross-entropy; 1 in the paper.
      ibot: weight of the cross-entropy of masked patches; 1 in the paper, 0 draws no masks.
      mask_share, mask_ratio: share of the global crops that have a mask, and range of the share of patches that one hides.
      mask_group: examples among which that share and range are spread evenly.
      koleo: weight of the KoLeo term; koleo_group: examples in which nearest neighbors are looked for, see `ssl.koleo`; 0 is all.
      drop_path: share of the student's residuals that are left out; 0.3 in the paper.
      drop_path_group: examples, with all their crops, among which those are chosen; see `drop_path.drop_subsets`.
      consistency: weight of the positions' own cross-entropy between crops, each position a set of V prototypes whose targets are
        balanced over the batch (Sinkhorn); 0 in the paper.
      consistency_temperature: (student, teacher) of that term.
    """

    teacher: str = "centering"
    student_temperature: float = 0.1
    teacher_temperature: tuple[float, float, int] = (0.04, 0.07, 37_500)
    simplex_temperature: tuple[tuple[float, float, int], tuple[float, float, int]] = ((1.0, 1.0, 1), (1.0, 1.0, 1))
    center_momentum: float = 0.9
    momentum: tuple[float, float] = (0.992, 1.0)
    dino: float = 1.0
    ibot: float = 1.0
    mask_share: float = 0.5
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    mask_group: int = 64
    koleo: float = 0.1
    koleo_group: int = 64
    drop_path: float = 0.3
    drop_path_group: int = 64
    consistency: float = 0.0
    consistency_temperature: tuple[float, float] = (1.0, 0.5)

    def __post_init__(self):
        if self.teacher not in ("centering", "sinkhorn"):
            raise UserError(f"encoder.objective.teacher={self.teacher!r} is unknown; known: centering, sinkhorn")
        if [len(each) if isinstance(each, tuple) else 0 for each in self.simplex_temperature] != [3, 3]:
            raise UserError(
                f"encoder.objective.simplex_temperature={self.simplex_temperature} must be two of (start, end, steps): "
                "the student's and the teacher's"
            )
        if not 0 <= self.drop_path < 1:
            raise UserError(f"encoder.objective.drop_path={self.drop_path} must be at least 0 and below 1")

    def groups(self) -> dict[str, int]:
        """The groups of examples that a microbatch must have whole, by the name of their field."""
        used = {"koleo_group": self.koleo and self.koleo_group, "mask_group": self.ibot, "drop_path_group": self.drop_path}
        return {name: getattr(self, name) for name, weight in used.items() if weight}


def make(config, *, step: str, workdir) -> Stage:
    """The stage of a recipe's section `step`."""
    section = config[step]
    plan = Plan(**section.train)
    objective = Objective(**section.objective)
    model = Encoder(**section.model)
    kinds = sorted(section.crops)
    for name, size in objective.groups().items():
        if size < 1 or plan.batch % (plan.accumulate * size):
            raise UserError(
                f"{step}.train.batch={plan.batch} in {plan.accumulate} microbatch(es) does not divide into groups of "
                f"{step}.objective.{name}={size}; set {name} to a number of examples that does"
            )
    if objective.koleo and not objective.koleo_group and plan.accumulate > 1:
        raise UserError(f"{step}.objective.koleo_group=0 compares the whole batch: set {step}.train.accumulate=1, or a group")
    if model.positions < 1:
        raise UserError(f"{step}.model.positions={model.positions} must be at least 1")
    if model.positions % len(kinds):
        raise UserError(
            f"{step}.model.positions={model.positions} cannot be shared out among {len(kinds)} kinds of crops ({', '.join(kinds)})"
        )
    check_crops(section.crops, model.patch, step)
    share = model.positions // len(kinds)
    ranges = {kind: (place * share, (place + 1) * share) for place, kind in enumerate(kinds)}
    sides = {kind: section.crops[kind].global_size // model.patch for kind in kinds}
    buffers = {
        kind: masks.buffer(
            images=objective.mask_group * section.crops[kind].global_crops,
            patches=sides[kind] ** 2,
            share=objective.mask_share,
            ratio=objective.mask_ratio,
        )
        for kind in kinds
    }

    batch_spec = {"position": jax.ShapeDtypeStruct((plan.batch,), jnp.int32)}
    for kind in kinds:
        crops = section.crops[kind]
        for name, number, size in (
            ("global", crops.global_crops, crops.global_size),
            ("local", crops.local_crops, crops.local_size),
        ):
            if number:
                batch_spec[f"{kind}/{name}"] = jax.ShapeDtypeStruct((plan.batch, number, size, size, 3), jnp.uint8)
    read = tuple(batch_spec.keys() - {"position"})
    if objective.ibot:
        for kind in kinds:
            shape = (plan.batch, section.crops[kind].global_crops, sides[kind] ** 2)
            batch_spec[f"{kind}/masked"] = jax.ShapeDtypeStruct(shape, jnp.bool_)

    def apply(params, crops, keys, kind, *, local=False, temperature, hidden=None, kept=None):
        """uint8 [b, g, y, x, c] -> what the model says of each crop, [b, g, ...], from the kind's positions; `patches` stay [b * g, n, d]."""
        b, g = crops.shape[:2]
        if model.relaxation == "softmax":
            keys = None
        else:
            keys = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, number(kind, local)), g))(keys).reshape(b * g)
        pixels = standardize(crops.reshape(b * g, *crops.shape[2:]))
        hidden = None if hidden is None else hidden.reshape(b * g, -1)
        out = model.apply(
            {"params": params}, pixels, keys=keys, temperature=temperature, masked=hidden, kept=kept, read=ranges[kind]
        )
        low, high = ranges[kind]
        found = {"prototypes": out["prototypes"], "vector": out["vector"]}
        found |= {"logits": out["logits"][:, low:high], "simplices": out["simplices"][:, low:high]}
        found = {name: leaf.astype(jnp.float32).reshape(b, g, *leaf.shape[1:]) for name, leaf in found.items()}
        return found | {"patches": out["patches"]}

    def number(kind, local):
        return 2 * kinds.index(kind) + local

    def patch_logits(params, patches, hidden, kind):
        """(prototype scores [m, k, p], share of each [m, k]) of the masked patches; see `losses.masked`."""
        place, share = masked.fill(hidden, group=objective.mask_group, size=buffers[kind])
        found = masked.take(patches, place)
        return model.apply({"params": params}, found, method=lambda model, x: model.score(model.normalize(x))), share

    def subsets(key, position, crops, kind, local):
        """Rows of each group that drop path keeps, or None; drawn from the place of the group's first example."""
        if not objective.drop_path:
            return None
        leaders = example_keys(key, position.reshape(-1, objective.drop_path_group)[:, 0], DROP)
        leaders = jax.vmap(lambda key: jax.random.fold_in(key, number(kind, local)))(leaders)
        rows = objective.drop_path_group * crops.shape[1]
        return drop_subsets(leaders, depth=model.depth, rows=rows, rate=objective.drop_path)

    def init(key):
        image = jnp.zeros((1, section.model.image, section.model.image, 3), jnp.float32)
        params = model.init(key, image, keys=jax.random.split(key, 1), temperature=1.0)["params"]
        centers = ("center", "patch_center") if objective.ibot else ("center",)
        return params, {name: jnp.zeros((len(kinds), model.prototypes), jnp.float32) for name in centers}

    def prepare(params, ema, extra, batch, frozen, step, key):
        keys = example_keys(key, batch["position"], TEACHER)
        temperature = _rise(objective.teacher_temperature, step)
        for kind in kinds:
            out = apply(ema, batch[f"{kind}/global"], keys, kind, temperature=_rise(objective.simplex_temperature[1], step))
            if objective.teacher == "sinkhorn":
                batch = batch | {f"{kind}/target": ssl.sinkhorn(out["prototypes"], temperature=temperature)}
            else:
                batch = batch | {f"{kind}/teacher": out["prototypes"]}
            if objective.ibot:
                logits, share = patch_logits(ema, out["patches"], batch[f"{kind}/masked"], kind)
                if objective.teacher == "sinkhorn":
                    batch = batch | {f"{kind}/patch_target": ssl.sinkhorn(logits, temperature=temperature, valid=share > 0)}
                else:
                    batch = batch | {f"{kind}/patch_teacher": logits}
            if objective.consistency:
                balanced = jax.vmap(lambda logits: ssl.sinkhorn(logits, temperature=objective.consistency_temperature[1]), 2, 2)
                batch = batch | {f"{kind}/values": balanced(out["logits"])}
        return batch

    def loss(params, extra, batch, frozen, step, key):
        keys = example_keys(key, batch["position"], STUDENT)
        names = ("dino", "ibot", "koleo", "consistency", "target_entropy", "code_perplexity")
        terms = dict.fromkeys(names, 0.0)
        temperature = _rise(objective.teacher_temperature, step)
        centering = objective.teacher == "centering"
        means = []
        for place, kind in enumerate(kinds):

            def student(local, hidden=None, kind=kind):
                crops = batch[f"{kind}/{'local' if local else 'global'}"]
                kept = subsets(key, batch["position"], crops, kind, local)
                simplex = _rise(objective.simplex_temperature[0], step)
                return apply(params, crops, keys, kind, local=local, temperature=simplex, hidden=hidden, kept=kept)

            views = student(local=False, hidden=batch.get(f"{kind}/masked"))
            prototypes, logits = views["prototypes"], views["logits"]
            if f"{kind}/local" in batch:
                local = student(local=True)
                prototypes, logits = (jnp.concatenate([views[name], local[name]], 1) for name in ("prototypes", "logits"))
            mean = {}
            if centering:
                target = ssl.center_probs(batch[f"{kind}/teacher"], extra["center"][place], temperature=temperature)
                mean["center"] = batch[f"{kind}/teacher"].mean((0, 1))
            else:
                target = batch[f"{kind}/target"]
            terms["dino"] += ssl.dino(prototypes, target, temperature=objective.student_temperature).mean()
            if objective.ibot:
                images = math.prod(views["vector"].shape[:2])
                scores, share = patch_logits(params, views["patches"], batch[f"{kind}/masked"], kind)
                if centering:
                    teacher = batch[f"{kind}/patch_teacher"]
                    patch_target = ssl.center_probs(teacher, extra["patch_center"][place], temperature=temperature)
                    # Sums and numbers for each image: microbatches have different numbers of masked patches.
                    seen = (share > 0)[..., None]
                    mean["patch_center"] = jnp.where(seen, teacher, 0).astype(jnp.float32).sum((0, 1)) / images
                    mean["patches"] = seen.sum() / images
                else:
                    patch_target = batch[f"{kind}/patch_target"]
                terms["ibot"] += ssl.ibot(scores, patch_target, share, temperature=objective.student_temperature).sum() / images
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
            means.append(mean)
        total = sum(getattr(objective, name) * terms[name] for name in ("dino", "ibot", "koleo", "consistency"))
        metrics = {name: jnp.asarray(term, jnp.float32) for name, term in terms.items()}
        return total, (metrics, jax.tree.map(lambda *each: jnp.stack(each), *means))

    def after_update(extra, params, aux, step):
        if not aux:
            return extra
        means = {"center": aux["center"]}
        if objective.ibot:
            means["patch_center"] = aux["patch_center"] / jnp.maximum(aux["patches"], 1e-6)[:, None]
        return {name: ssl.update_center(extra[name], mean, momentum=objective.center_momentum) for name, mean in means.items()}

    def ema_decay(step):
        start, end = objective.momentum
        return end - (end - start) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(step / plan.steps, 1.0)))

    def batches(split):
        source = sources.source(split=split, **(config.data.to_dict() | section.view.to_dict()))
        views = transforms.Views({kind: transforms.MultiCrop(**section.crops[kind]) for kind in kinds})
        drawn = None
        if objective.ibot:
            crops = {kind: (section.crops[kind].global_crops, sides[kind]) for kind in kinds}
            drawn = masks.GroupMasks(
                crops, group=objective.mask_group, share=objective.mask_share, ratio=objective.mask_ratio, seed=config.seed
            )
        return loader.batches(
            source, batch=plan.batch, seed=config.seed, transform=views, threads=section.threads, fields=read, grouped=drawn
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
        evals=checkup.evaluators(config, step=step, workdir=workdir),
        group=math.lcm(*objective.groups().values()),
        flops=plan.batch * sum(flops(model, section.crops[kind], objective) for kind in kinds),
        identity={
            "model": section.model.to_dict(),
            "crops": section.crops.to_dict(),
            "view": section.view.to_dict(),
            **home.lasting({"data": config.data.to_dict()}),
        },
        reads=lambda: {"source": sources.identity(split="train", **config.data)},
    )


def check_crops(crops, patch: int, step: str) -> None:
    """UserError if patches do not divide the crops of a section `crops`."""
    if patch < 1:
        raise UserError(f"{step}.model.patch={patch} must be at least 1")
    for kind, one in crops.items():
        for name in ("global", "local"):
            size = one[f"{name}_size"]
            if one[f"{name}_crops"] and (size % patch or size < patch):
                raise UserError(
                    f"{step}.crops.{kind}.{name}_size={size} cannot be cut into patches of {patch}; give "
                    f"--config.{step}.crops.{kind}.{name}_size={max(1, size // patch) * patch}"
                )


def flops(model: Encoder, crops, objective: Objective) -> float:
    """Model FLOPs of a step for one image and one kind of crops: three forward passes of every crop for the student, one of the global
    crops for the teacher, both with registers, simplicial head and DINO head; and as many of the masked patches through their head.

    Drop path leaves the student's blocks their share of the work. Masked patches are counted as many as are hidden on the average; the
    buffer has a little room beyond. In the paper's sizes (2 crops of 261 tokens, 8 of 54) 1.64 TF, of which masked patches are 0.02;
    without drop path 2.18.
    """

    def views(drop_path):
        return crops.global_crops * simplicial.flops(model, image=crops.global_size, drop_path=drop_path)

    local = crops.local_crops * simplicial.flops(model, image=crops.local_size, drop_path=objective.drop_path)
    patches = 0.0
    if objective.ibot:
        hidden = objective.mask_share * sum(objective.mask_ratio) / 2
        patches = crops.global_crops * (crops.global_size // model.patch) ** 2 * hidden * simplicial.head_flops(model)
    return 3 * (views(objective.drop_path) + local + patches) + views(0.0) + patches


def _rise(schedule, step):
    """(start, end, steps) at a step: a straight line, and then its end."""
    start, end, steps = schedule
    return start + (end - start) * jnp.clip(step / max(1, steps), 0.0, 1.0)
