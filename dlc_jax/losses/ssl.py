"""Self-distillation: a student's crops must name the prototype that a teacher's crops name. All in float32.

    teacher logits ──► center_probs or sinkhorn ──► targets ─┐
    student logits ──────────────────────────────► dino ◄────┘        koleo keeps the vectors apart

Source: DINO (arXiv 2104.14294), DINOv2 (arXiv 2304.07193).
"""

import jax
import jax.numpy as jnp
from jaxtyping import ScalarLike

from dlc_jax.errors import UserError
from dlc_jax.typing import Array, Float

EXACT = jax.lax.Precision.HIGHEST  # accelerators would round the factors of a float32 product


def dino(
    student_logits: Float[Array, "b g p"], teacher_probs: Float[Array, "b q p"], *, temperature: ScalarLike = 0.1
) -> Float[Array, "b"]:
    """Cross-entropy of the student's crops under the teacher's, per example: the mean over all pairs of two different crops.

    Shapes: the student's first q crops are the teacher's (the global ones), the rest are local. With 2 global and 8 local crops
    there are 8 * 2 + 2 = 18 pairs, each of weight 1/18, as in DINOv2. No gradient reaches the teacher.
    Raises: UserError if there is no pair of different crops.
    """
    g, q = student_logits.shape[1], teacher_probs.shape[1]
    pairs = g * q - min(g, q)
    if not pairs:
        raise UserError("self-distillation needs two different crops of an image: set global_crops to 2, or add local_crops")
    log_probs = jax.nn.log_softmax(student_logits.astype(jnp.float32) / temperature, -1)
    teacher_probs = jax.lax.stop_gradient(teacher_probs.astype(jnp.float32))
    entropies = -jnp.einsum("bgp,bqp->bgq", log_probs, teacher_probs, precision=EXACT)
    different = ~jnp.eye(g, q, dtype=bool)[None]
    return jnp.where(different, entropies, 0).sum((1, 2)) / pairs


def center_probs(
    teacher_logits: Float[Array, "... p"], center: Float[Array, "p"], *, temperature: ScalarLike
) -> Float[Array, "... p"]:
    """Targets by centering: softmax of (logits - center) / temperature, so that no prototype can win everywhere."""
    center = jnp.broadcast_to(center, teacher_logits.shape)
    return jax.nn.softmax((teacher_logits.astype(jnp.float32) - center) / temperature, -1)


def update_center(
    center: Float[Array, "*kinds p"], batch_mean: Float[Array, "*kinds p"], *, momentum: ScalarLike = 0.9
) -> Float[Array, "*kinds p"]:
    """The running mean of the teacher's logits; `batch_mean` is over the global batch."""
    return momentum * center + (1 - momentum) * batch_mean.astype(jnp.float32)


def sinkhorn(logits: Float[Array, "b *crops p"], *, temperature: ScalarLike, iterations: int = 3) -> Float[Array, "b *crops p"]:
    """Targets by Sinkhorn-Knopp: each sums to 1, and together they use every prototype about equally.

    Everything but the last axis is a sample, and all of them are coupled: call it on the global batch. Each iteration gives every
    prototype the same total, then every sample. Done on logarithms, so that no sample is lost to underflow.
    Source: SwAV (arXiv 2006.09882).
    """
    log_q = logits.astype(jnp.float32).reshape(-1, logits.shape[-1]) / temperature
    for _ in range(iterations):
        log_q -= jax.nn.logsumexp(log_q, 0, keepdims=True)
        log_q -= jax.nn.logsumexp(log_q, 1, keepdims=True)
    return jnp.exp(log_q).reshape(logits.shape)


def koleo(vectors: Float[Array, "b d"], *, group: int, eps: ScalarLike = 1e-8) -> Float[Array, "b"]:
    """-log distance to the nearest other vector on the unit sphere, per example; spreads the vectors out.

    Neighbors are looked for in fixed groups of `group` examples in a row, so that the value does not depend on how the batch is
    split as long as groups stay whole. Two equal vectors cost -log eps and send no gradient (any would be a guess).
    Raises: UserError for groups of fewer than two, or that do not fill the batch. Source: Sablayrolles et al. (arXiv 1806.03198).
    """
    b = vectors.shape[0]
    if group < 2 or b % group:
        raise UserError(
            f"koleo_group={group} with a batch of {b}: groups need at least 2 examples and must fill the (micro)batch"
        )
    x = vectors.astype(jnp.float32).reshape(b // group, group, -1)
    x = x / jnp.maximum(_norm(x), eps)
    fixed = jax.lax.stop_gradient(x)
    cosines = jnp.einsum("gid,gjd->gij", fixed, fixed, precision=EXACT)
    nearest = jnp.argmax(jnp.where(jnp.eye(group, dtype=bool)[None], -jnp.inf, cosines), -1)
    distance = _norm(x - jnp.take_along_axis(x, nearest[..., None], 1))
    return -jnp.log(distance + eps).reshape(b)


def entropy(probs: Float[Array, "... p"]) -> Float[Array, "..."]:
    """Entropy over the last axis, in nats; 0 log 0 is 0."""
    return jax.scipy.special.entr(probs.astype(jnp.float32)).sum(-1)


def divergence(
    teacher_probs: Float[Array, "... p"], student_logits: Float[Array, "... p"], *, temperature: ScalarLike = 0.1
) -> Float[Array, "..."]:
    """KL of the student's distribution from the teacher's, in nats: the part of the cross-entropy that the student can remove."""
    teacher_probs = teacher_probs.astype(jnp.float32)
    log_probs = jax.nn.log_softmax(student_logits.astype(jnp.float32) / temperature, -1)
    return -(teacher_probs * log_probs).sum(-1) - entropy(teacher_probs)


def _norm(x):
    """Length over the last axis (kept), with gradient 0 where it is 0."""
    square = jnp.square(x).sum(-1, keepdims=True)
    some = square > 0
    return jnp.where(some, jnp.sqrt(jnp.where(some, square, 1)), 0)
