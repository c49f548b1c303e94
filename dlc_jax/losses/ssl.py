"""Self-distillation: a student's crops must name the prototype that a teacher's crops name.

    teacher logits ──► center_probs or sinkhorn ──► targets ─┐
    student logits ─────────────► dino (crops), ibot (masked patches)

`koleo` keeps the vectors apart. All in float32, or in float64 if given it. Source: DINO (arXiv
2104.14294), iBOT (arXiv 2111.07832), DINOv2 (arXiv 2304.07193).
"""

import jax
import jax.numpy as jnp
from jaxtyping import ScalarLike

from dlc_jax.errors import UserError
from dlc_jax.typing import Array, Bool, Float

EXACT = jax.lax.Precision.HIGHEST  # accelerators would round the factors of a float32 product
NOTHING = -1e30  # a logarithm of no mass


def dino(
    student_logits: Float[Array, "b g p"],
    teacher_probs: Float[Array, "b q p"],
    *,
    temperature: ScalarLike = 0.1,
) -> Float[Array, "b"]:
    """Cross-entropy of the student's crops under the teacher's, mean over pairs of different crops.

    The student's first q crops are the teacher's (the global ones), the rest are local. With 2
    global and 8 local crops there are 8 * 2 + 2 = 18 pairs, each of weight 1/18, as in DINOv2. No
    gradient reaches the teacher.

    Raises:
      UserError: there is no pair of different crops.
    """
    g, q = student_logits.shape[1], teacher_probs.shape[1]
    pairs = g * q - min(g, q)
    if not pairs:
        raise UserError(
            "self-distillation needs two different crops of an image: "
            "set global_crops to 2, or add local_crops"
        )
    log_probs = jax.nn.log_softmax(_wide(student_logits) / temperature, -1)
    teacher_probs = jax.lax.stop_gradient(_wide(teacher_probs))
    entropies = -jnp.einsum("bgp,bqp->bgq", log_probs, teacher_probs, precision=EXACT)
    different = ~jnp.eye(g, q, dtype=bool)[None]
    return jnp.where(different, entropies, 0).sum((1, 2)) / pairs


def ibot(
    student_logits: Float[Array, "*m k p"],
    teacher_probs: Float[Array, "*m k p"],
    share: Float[Array, "*m k"],
    *,
    temperature: ScalarLike = 0.1,
) -> Float[Array, "*m"]:
    """Cross-entropy of the student's masked patches under the teacher's, which saw them.

    The sum over a buffer of k patches. `share` is 1 / (masked patches of the patch's image), and 0
    where the buffer is not filled: the sum counts every image that has a mask once, however many
    patches that hides. No gradient reaches the teacher, and none comes from where `share` is 0.
    """
    log_probs = jax.nn.log_softmax(_wide(student_logits) / temperature, -1)
    entropies = -(jax.lax.stop_gradient(_wide(teacher_probs)) * log_probs).sum(-1)
    return jnp.where(share > 0, share * entropies, 0).sum(-1)


def center_probs(
    teacher_logits: Float[Array, "... p"], center: Float[Array, "p"], *, temperature: ScalarLike
) -> Float[Array, "... p"]:
    """softmax((logits - center) / temperature): targets in which no prototype wins everywhere."""
    center = jnp.broadcast_to(center, teacher_logits.shape)
    return jax.nn.softmax((_wide(teacher_logits) - center) / temperature, -1)


def update_center(
    center: Float[Array, "*kinds p"],
    batch_mean: Float[Array, "*kinds p"],
    *,
    momentum: ScalarLike = 0.9,
) -> Float[Array, "*kinds p"]:
    """The running mean of the teacher's logits; `batch_mean` is over the global batch."""
    return momentum * center + (1 - momentum) * _wide(batch_mean)


def sinkhorn(
    logits: Float[Array, "*samples p"],
    *,
    temperature: ScalarLike,
    iterations: int = 3,
    valid: Bool[Array, "*samples"] | None = None,
) -> Float[Array, "*samples p"]:
    """Targets by Sinkhorn-Knopp: each sums to 1, and together they use all prototypes equally.

    Everything but the last axis is a sample, and all of them are coupled: call it on the global
    batch. Each iteration gives every prototype the same total, then every sample. Samples that are
    not `valid` take no mass and get zeros, so a prototype's share is that of the valid ones. Done
    on logarithms, so that no sample is lost to underflow. Source: SwAV (arXiv 2006.09882).
    """
    log_q = _wide(logits).reshape(-1, logits.shape[-1]) / temperature
    used = None if valid is None else valid.reshape(-1, 1)
    for _ in range(iterations):
        # not -inf: without any valid sample that would be inf - inf
        mass = log_q if used is None else jnp.where(used, log_q, NOTHING)
        log_q -= jax.nn.logsumexp(mass, 0, keepdims=True)
        log_q -= jax.nn.logsumexp(log_q, 1, keepdims=True)
    q = jnp.exp(log_q)
    return (q if used is None else jnp.where(used, q, 0)).reshape(logits.shape)


def koleo(
    vectors: Float[Array, "b d"], *, group: int = 64, eps: ScalarLike = 1e-8
) -> Float[Array, "b"]:
    """-log distance to the nearest other vector on the unit sphere, which spreads the vectors out.

    Neighbors are looked for in fixed groups of `group` examples in a row, so that the value does
    not depend on how the batch is split as long as groups stay whole, and no device asks another.
    64 is the default because the paper's nearest neighbors were those within a device's batch of
    64: over more examples they are nearer, and the term pushes harder. 0 looks through the whole
    batch, which devices then gather. Two equal vectors cost -log eps and send no gradient (any
    would be a guess).

    Raises:
      UserError: groups of fewer than two, or that do not fill the batch.

    Source: Sablayrolles et al. (arXiv 1806.03198).
    """
    b = vectors.shape[0]
    group = group or b
    if group < 2 or b % group:
        raise UserError(
            f"koleo_group={group} with a batch of {b}: "
            "groups need at least 2 examples and must fill the (micro)batch"
        )
    x = _wide(vectors).reshape(b // group, group, -1)
    x = x / jnp.maximum(_norm(x), eps)
    fixed = jax.lax.stop_gradient(x)
    cosines = jnp.einsum("gid,gjd->gij", fixed, fixed, precision=EXACT)
    nearest = jnp.argmax(jnp.where(jnp.eye(group, dtype=bool)[None], -jnp.inf, cosines), -1)
    distance = _norm(x - jnp.take_along_axis(x, nearest[..., None], 1))
    return -jnp.log(distance + eps).reshape(b)


def entropy(probs: Float[Array, "... p"]) -> Float[Array, "..."]:
    """Entropy over the last axis, in nats; 0 log 0 is 0."""
    return jax.scipy.special.entr(_wide(probs)).sum(-1)


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _norm(x):
    """Length over the last axis (kept), with gradient 0 where it is 0."""
    square = jnp.square(x).sum(-1, keepdims=True)
    some = square > 0
    return jnp.where(some, jnp.sqrt(jnp.where(some, square, 1)), 0)
