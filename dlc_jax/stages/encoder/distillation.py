"""Self-distillation with a simplicial embedding: teacher, student, and what is asked of them.

Each function takes the `Setup` of the stage first, and then what `stage.Stage` says.
"""

import collections
import math

import jax
import jax.numpy as jnp

from dlc_jax.losses import masked, ssl
from dlc_jax.models.drop_path import drop_subsets
from dlc_jax.models.vit import standardize
from dlc_jax.stages.encoder.objective import rise
from dlc_jax.stages.encoder.setup import Setup
from dlc_jax.step import example_keys

STUDENT, TEACHER, DROP = 1, 2, 3  # purposes of keys
TERMS = ("dino", "ibot", "koleo", "consistency", "plain")


def init(setup: Setup, key):
    """(params, extra): the centers of teacher logits, a row a kind."""
    model = setup.model
    image = jnp.zeros((1, model.backbone.image, model.backbone.image, 3), jnp.float32)
    params = model.init(key, image, keys=jax.random.split(key, 1), temperature=1.0)["params"]
    centers = ("center", "patch_center") if setup.objective.ibot else ("center",)
    shape = (len(setup.kinds), model.dino.prototypes)
    return params, {name: jnp.zeros(shape, jnp.float32) for name in centers}


def views(setup, params, crops, keys, kind, *, local=False, temperature, hidden=None, kept=None):
    """What the model says of each crop, from the kind's positions.

    Args:
      crops: uint8 [b, g, y, x, c].
      keys: one an example.
      hidden: bool [b, g, n], the patches that are masked.
      kept: rows that drop path computes.

    Returns:
      prototypes, vector, logits, simplices: float32 [b, g, ...]; patches [b * g, n, d].
    """
    b, g = crops.shape[:2]
    if setup.model.simplicial.relaxation == "softmax":
        keys = None
    else:
        number = setup.number(kind, local)
        split = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, number), g))
        keys = split(keys).reshape(b * g)
    pixels = standardize(crops.reshape(b * g, *crops.shape[2:]))
    low, high = setup.ranges[kind]
    out = setup.model.apply(
        {"params": params},
        pixels,
        keys=keys,
        temperature=temperature,
        masked=None if hidden is None else hidden.reshape(b * g, -1),
        kept=kept,
        read=(low, high),
    )
    found = {name: out[name] for name in ("prototypes", "vector")}
    found |= {name: out[name][:, low:high] for name in ("logits", "simplices")}
    found = {
        name: leaf.astype(jnp.float32).reshape(b, g, *leaf.shape[1:])
        for name, leaf in found.items()
    }
    return found | {"patches": out["patches"]}


def patch_scores(setup, params, patches, hidden, kind):
    """(prototype scores [m, k, p], share of each [m, k]) of masked patches; `losses.masked`."""
    group = setup.objective.mask_group
    place, share = masked.fill(hidden, group=group, size=setup.buffer(kind))
    chosen = masked.take(patches, place)
    score = setup.model.apply(
        {"params": params}, chosen, method=lambda model, x: model.score(model.normalize(x))
    )
    return score, share


def subsets(setup, key, position, crops, kind, local):
    """Rows of each group that drop path keeps, or None.

    They are drawn from the place of the group's first example.
    """
    objective = setup.objective
    if not objective.drop_path:
        return None
    leaders = position.reshape(-1, objective.drop_path_group)[:, 0]
    keys, number = example_keys(key, leaders, DROP), setup.number(kind, local)
    keys = jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
    rows = objective.drop_path_group * crops.shape[1]
    depth = setup.model.backbone.depth
    return drop_subsets(keys, depth=depth, rows=rows, rate=objective.drop_path)


def prepare(setup: Setup, params, ema, extra, batch, frozen, step, key):
    """Adds the teacher's targets, or the logits that centering makes targets of."""
    objective, teacher = setup.objective, (frozen or {}).get("teacher", ema)
    keys = example_keys(key, batch["position"], TEACHER)
    temperature = rise(objective.teacher_temperature, step)
    is_sinkhorn, cool = objective.teacher == "sinkhorn", objective.consistency_temperature[1]
    balance = jax.vmap(lambda logits: ssl.sinkhorn(logits, temperature=cool), -2, -2)
    for kind in setup.kinds:
        simplex = rise(objective.simplex_temperature[1], step)
        out = views(setup, teacher, batch[f"{kind}/global"], keys, kind, temperature=simplex)
        if is_sinkhorn:
            target = ssl.sinkhorn(out["prototypes"], temperature=temperature)
            batch = batch | {f"{kind}/target": target}
        else:
            batch = batch | {f"{kind}/teacher": out["prototypes"]}
        if objective.ibot:
            hidden = batch[f"{kind}/masked"]
            logits, share = patch_scores(setup, teacher, out["patches"], hidden, kind)
            if is_sinkhorn:
                target = ssl.sinkhorn(logits, temperature=temperature, valid=share > 0)
                batch = batch | {f"{kind}/patch_target": target}
            else:
                batch = batch | {f"{kind}/patch_teacher": logits}
        if objective.consistency:
            batch = batch | {f"{kind}/values": balance(out["logits"])}
        if objective.plain:
            batch = batch | {f"{kind}/plain": balance(out["logits"].mean(1))}
    return batch


def loss(setup: Setup, params, extra, batch, frozen, step, key):
    """The weighted terms of all kinds; aux has the means that the centers follow.

    Metrics are the terms that were computed, and no others.
    """
    objective = setup.objective
    terms: dict = collections.defaultdict(float)
    means = []
    for place, kind in enumerate(setup.kinds if objective.reads_crops else ()):
        means.append(add_terms(setup, terms, params, extra, batch, step, key, kind, place))
    if objective.plain:
        terms["plain"] = plain_term(setup, params, batch)
    total = sum((getattr(objective, name) * terms[name] for name in TERMS if name in terms), 0.0)
    metrics = {name: jnp.asarray(term, jnp.float32) for name, term in terms.items()}
    return total, (metrics, jax.tree.map(lambda *each: jnp.stack(each), *means) if means else {})


def add_terms(setup: Setup, terms, params, extra, batch, step, key, kind, place):
    """Adds the terms of one kind of crops, the `place`-th; returns {center: mean}."""
    objective, kinds = setup.objective, len(setup.kinds)
    keys = example_keys(key, batch["position"], STUDENT)
    temperature = rise(objective.teacher_temperature, step)
    simplex = rise(objective.simplex_temperature[0], step)

    def student(local, hidden=None):
        crops = batch[f"{kind}/{'local' if local else 'global'}"]
        kept = subsets(setup, key, batch["position"], crops, kind, local)
        how = {"temperature": simplex, "hidden": hidden, "kept": kept}
        return views(setup, params, crops, keys, kind, local=local, **how)

    seen = student(local=False, hidden=batch.get(f"{kind}/masked"))
    prototypes, logits = seen["prototypes"], seen["logits"]
    if f"{kind}/local" in batch:
        local = student(local=True)
        prototypes = jnp.concatenate([prototypes, local["prototypes"]], 1)
        logits = jnp.concatenate([logits, local["logits"]], 1)
    mean = {}
    if objective.teacher == "centering":
        teacher = batch[f"{kind}/teacher"]
        target = ssl.center_probs(teacher, extra["center"][place], temperature=temperature)
        mean["center"] = teacher.mean((0, 1))
    else:
        target = batch[f"{kind}/target"]
    terms["dino"] += ssl.dino(prototypes, target, temperature=objective.student_temperature).mean()
    if objective.ibot:
        term, means = patch_term(setup, params, extra, batch, seen, temperature, kind, place)
        terms["ibot"] += term
        mean |= means
    if objective.koleo:
        # One crop of every image at a time: two of one image would be each other's neighbors.
        vectors = jnp.moveaxis(seen["vector"], 1, 0)
        group = objective.koleo_group
        terms["koleo"] += sum(ssl.koleo(crop, group=group).mean() for crop in vectors)
    if objective.consistency:
        warm = objective.consistency_temperature[0]
        agree = jax.vmap(lambda student, teacher: ssl.dino(student, teacher, temperature=warm), 2)
        values = jax.lax.stop_gradient(batch[f"{kind}/values"])
        terms["consistency"] += agree(logits, values).mean()
    terms["target_entropy"] += ssl.entropy(target).mean() / kinds
    usage = seen["simplices"].mean((0, 1))
    terms["code_perplexity"] += jnp.exp(ssl.entropy(usage)).mean() / kinds
    return mean


def plain_term(setup: Setup, params, batch):
    """Cross-entropy of the images' own values under those of their crops, summed over kinds."""
    warm, _ = setup.objective.consistency_temperature
    images = standardize(batch["plain"])
    logits = setup.model.apply({"params": params}, images, method="logits")
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32) / warm)
    total = 0.0
    for kind in setup.kinds:
        low, high = setup.ranges[kind]
        targets = jax.lax.stop_gradient(batch[f"{kind}/plain"])
        total -= (targets * log_probs[:, low:high]).sum(-1).mean()
    return total


def patch_term(setup: Setup, params, extra, batch, seen, temperature, kind, place):
    """(iBOT's term, {center: mean}) of the masked patches of one kind of crops."""
    objective = setup.objective
    images = math.prod(seen["vector"].shape[:2])
    hidden = batch[f"{kind}/masked"]
    scores, share = patch_scores(setup, params, seen["patches"], hidden, kind)
    mean = {}
    if objective.teacher == "centering":
        teacher = batch[f"{kind}/patch_teacher"]
        center = extra["patch_center"][place]
        target = ssl.center_probs(teacher, center, temperature=temperature)
        # Sums and numbers for each image: microbatches have different numbers of masked patches.
        is_masked = (share > 0)[..., None]
        total = jnp.where(is_masked, teacher, 0).astype(jnp.float32).sum((0, 1))
        mean = {"patch_center": total / images, "patches": is_masked.sum() / images}
    else:
        target = batch[f"{kind}/patch_target"]
    values = ssl.ibot(scores, target, share, temperature=objective.student_temperature)
    return values.sum() / images, mean


def after_update(setup: Setup, extra, params, aux, step):
    """Moves the centers towards the means of this step."""
    if not aux:
        return extra
    means = {"center": aux["center"]}
    if setup.objective.ibot:
        patches = jnp.maximum(aux["patches"], 1e-6)[:, None]
        means["patch_center"] = aux["patch_center"] / patches
    momentum = setup.objective.center_momentum
    return {
        name: ssl.update_center(extra[name], mean, momentum=momentum)
        for name, mean in means.items()
    }


def ema_decay(setup: Setup, step):
    """The teacher's: a cosine from the start of `momentum` to its end."""
    start, end = setup.objective.momentum
    done = jnp.minimum(step / setup.steps, 1.0)
    return end - (end - start) * 0.5 * (1 + jnp.cos(jnp.pi * done))
