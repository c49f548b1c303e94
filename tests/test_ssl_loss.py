"""Self-distillation against NumPy in float64: crops, masked patches, centering, Sinkhorn, KoLeo."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlc_jax import parallel
from dlc_jax.errors import UserError
from dlc_jax.losses import masked as buffer
from dlc_jax.losses import ssl

RNG = np.random.default_rng(0)


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def floats(*arrays):
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays)


@pytest.mark.parametrize("g, q", [(10, 2), (2, 2), (3, 1), (4, 4)])
def test_dino_against_the_sums_of_dinov2(g, q):
    student, teacher = (
        RNG.normal(size=(3, g, 6)),
        np.exp(log_softmax(RNG.normal(size=(3, q, 6)) * 4)),
    )
    log_p = log_softmax(student / 0.1)
    local = sum(-(teacher[:, t] * log_p[:, s]).sum(-1) for s in range(q, g) for t in range(q))
    globe = sum(
        -(teacher[:, t] * log_p[:, s]).sum(-1) for s in range(q) for t in range(q) if s != t
    )
    expected = (local + globe) / (
        (g - q) * q + q * (q - 1)
    )  # 16 + 2 for the usual 8 local and 2 global crops
    found = ssl.dino(*floats(student, teacher), temperature=0.1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_dino_ignores_the_same_view_and_sends_nothing_to_the_teacher():
    student, teacher = floats(
        RNG.normal(size=(1, 2, 5)), np.exp(log_softmax(RNG.normal(size=(1, 2, 5))))
    )
    to_student, to_teacher = jax.grad(lambda s, t: ssl.dino(s, t).sum(), (0, 1))(student, teacher)
    assert (to_teacher == 0).all()
    other = teacher.at[0, 0].set(jnp.eye(5)[0])  # changes what crop 1 learns, not crop 0
    changed = jax.grad(lambda s: ssl.dino(s, other).sum())(student)
    np.testing.assert_array_equal(changed[0, 0], to_student[0, 0])
    assert (changed[0, 1] != to_student[0, 1]).any()
    with pytest.raises(UserError, match="two different crops"):
        ssl.dino(student[:, :1], teacher[:, :1])


def reference_ibot(student, teacher, masked, temperature):
    """Per image the mean over its masked patches, then the sum over images.

    Logits and probabilities are [images, patches, p].
    """
    total = 0.0
    for logits, probs, mask in zip(student, teacher, masked):
        if mask.any():
            total += np.mean(
                [
                    -(p * log_softmax(x / temperature)).sum()
                    for x, p in zip(logits[mask], probs[mask])
                ]
            )
    return total


def ragged():
    """Logits and targets of six images of nine patches, of which none to nine are masked."""
    masked = np.arange(9) < np.array([3, 0, 9, 1, 0, 5])[:, None]
    masked = RNG.permuted(masked, axis=1)
    return RNG.normal(size=(6, 9, 7)), np.exp(log_softmax(RNG.normal(size=(6, 9, 7)) * 4)), masked


def test_ibot_counts_every_image_with_a_mask_once():
    student, teacher, masked = ragged()
    place, share = buffer.fill(
        jnp.asarray(masked).reshape(2, 3, 9), group=1, size=14
    )  # one group has 12 of 27, one 6
    taken = [buffer.take(array.reshape(6, 9, 7), place) for array in floats(student, teacher)]
    # the unfilled places hold other patches of the group: what stands there must not matter
    found = ssl.ibot(*taken, share, temperature=0.1)
    expected = [
        reference_ibot(student[i : i + 3], teacher[i : i + 3], masked[i : i + 3], 0.1)
        for i in (0, 3)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert ssl.ibot(*taken, jnp.zeros_like(share)).tolist() == [0, 0]


def test_ibot_sends_gradients_to_the_students_masked_patches_alone():
    student, teacher, masked = ragged()
    place, share = buffer.fill(jnp.asarray(masked)[:, None], group=6, size=20)

    def loss(student, teacher):
        return ssl.ibot(buffer.take(student, place), buffer.take(teacher, place), share).sum()

    to_student, to_teacher = jax.grad(loss, (0, 1))(*floats(student, teacher))
    assert (to_teacher == 0).all()
    np.testing.assert_array_equal((to_student != 0).any(-1), masked)


def test_centering_against_numpy():
    logits, center = RNG.normal(size=(4, 2, 6)), RNG.normal(size=6)
    found = ssl.center_probs(*floats(logits, center), temperature=0.04)
    np.testing.assert_allclose(found, np.exp(log_softmax((logits - center) / 0.04)), atol=1e-5)
    mean = logits.mean((0, 1))
    np.testing.assert_allclose(
        ssl.update_center(*floats(center, mean), momentum=0.9), 0.9 * center + 0.1 * mean, rtol=1e-5
    )


def reference_sinkhorn(logits, temperature, iterations):
    """As in the papers: prototypes x samples, of total 1."""
    q = np.exp(logits.reshape(-1, logits.shape[-1]).T / temperature)
    k, b = q.shape
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdims=True) * k
        q /= q.sum(0, keepdims=True) * b
    return (q * b).T.reshape(logits.shape)


def test_sinkhorn_against_numpy_and_its_sums():
    logits = RNG.normal(size=(8, 2, 5)) * 0.3
    found = ssl.sinkhorn(*floats(logits), temperature=0.1)
    np.testing.assert_allclose(found, reference_sinkhorn(logits, 0.1, 3), atol=1e-5)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)
    long = ssl.sinkhorn(*floats(logits), temperature=0.1, iterations=200)
    np.testing.assert_allclose(long.sum((0, 1)), 16 / 5, atol=1e-3)
    assert abs(found.sum((0, 1)) - 16 / 5).max() > 0.01  # three iterations are only on the way


def test_sinkhorn_gives_no_mass_to_what_is_not_valid():
    logits, valid = RNG.normal(size=(5, 6, 4)) * 0.3, RNG.random((5, 6)) < 0.6
    logits[~valid] *= 100  # would take every prototype
    found = ssl.sinkhorn(*floats(logits), temperature=0.1, valid=jnp.asarray(valid))
    np.testing.assert_allclose(found[valid], reference_sinkhorn(logits[valid], 0.1, 3), atol=1e-5)
    assert (np.asarray(found)[~valid] == 0).all()
    long = ssl.sinkhorn(*floats(logits), temperature=0.1, iterations=200, valid=jnp.asarray(valid))
    np.testing.assert_allclose(long.sum((0, 1)), valid.sum() / 4, atol=1e-3)
    nothing = ssl.sinkhorn(*floats(logits), temperature=0.1, valid=jnp.zeros((5, 6), bool))
    assert (np.asarray(nothing) == 0).all()


def test_sinkhorn_survives_logits_far_apart():
    logits = np.array([[0.0, 10.0], [500.0, 490.0], [-500.0, -505.0]])
    found = np.asarray(ssl.sinkhorn(*floats(logits), temperature=0.04))
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)


def reference_koleo(vectors, group):
    out = []
    for rows in vectors.reshape(-1, group, vectors.shape[-1]):
        rows = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
        distances = np.linalg.norm(rows[:, None] - rows[None], axis=-1)
        np.fill_diagonal(distances, np.inf)
        out += list(-np.log(distances.min(1) + 1e-8))
    return np.array(out)


@pytest.mark.parametrize("group", [2, 4, 12])
def test_koleo_against_numpy(group):
    vectors = RNG.normal(size=(12, 7)) * RNG.uniform(0.1, 10, size=(12, 1))
    np.testing.assert_allclose(
        ssl.koleo(*floats(vectors), group=group), reference_koleo(vectors, group), atol=1e-5
    )


def test_koleo_without_a_group_looks_through_the_whole_batch():
    (vectors,) = floats(RNG.normal(size=(12, 7)))
    np.testing.assert_array_equal(ssl.koleo(vectors, group=0), ssl.koleo(vectors, group=12))


@pytest.mark.parametrize("term", ["koleo", "sinkhorn"])
def test_whole_batches_on_eight_devices(term):
    """What couples the whole batch, and its gradient.

    Of vectors well apart: a whole step with drop path has rows so alike that rounding chooses the
    nearest; without drop path its gradients agree to 2e-6.
    """
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices; on CPU the tests force them")
    mesh = parallel.make_mesh(devices=jax.devices()[:8])
    vectors, weights = floats(RNG.normal(size=(32, 7)), RNG.normal(size=(7, 7)))

    def loss(weights, vectors):
        if term == "koleo":
            return ssl.koleo(vectors @ weights, group=0).mean()
        return ssl.entropy(ssl.sinkhorn(vectors @ weights, temperature=0.5)).mean()

    one = jax.jit(jax.value_and_grad(loss))(weights, vectors)
    with jax.set_mesh(mesh):
        spread = jax.device_put(vectors, jax.NamedSharding(mesh, parallel.BATCH))
        eight = jax.jit(jax.value_and_grad(loss))(weights, spread)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, eight)


def test_koleo_groups_are_apart():
    (vectors,) = floats(RNG.normal(size=(8, 5)))
    changed = vectors.at[4:].set(
        vectors[:4]
    )  # the second group now repeats the first: no matter to either
    np.testing.assert_array_equal(ssl.koleo(changed, group=4)[:4], ssl.koleo(vectors, group=4)[:4])
    np.testing.assert_array_equal(ssl.koleo(vectors, group=4)[4:], ssl.koleo(vectors[4:], group=4))
    slope = jax.grad(lambda x: ssl.koleo(x, group=4)[:4].sum())(vectors)
    assert (slope[4:] == 0).all() and (slope[:4] != 0).any()


def test_koleo_of_equal_or_zero_vectors_has_a_finite_gradient():
    vectors = jnp.array([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    value, slope = jax.value_and_grad(lambda x: ssl.koleo(x, group=4).sum())(vectors)
    assert np.isfinite(value) and np.isfinite(slope).all()
    assert float(ssl.koleo(vectors, group=4)[0]) == pytest.approx(-np.log(1e-8), rel=1e-5)


def test_koleo_gradient_pushes_neighbors_apart():
    vectors = jnp.array([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.05]])
    slope = jax.grad(lambda x: ssl.koleo(x, group=3).sum())(vectors)
    moved = vectors - 1e-3 * slope
    assert moved[0, 1] > vectors[0, 1] and moved[1, 1] < vectors[1, 1]
    vectors = np.asarray(vectors, np.float64)  # by differences, also of being another's nearest
    for place in np.ndindex(3, 2):
        step = np.zeros((3, 2))
        step[place] = 1e-4
        ends = [reference_koleo(vectors + sign * step, 3).sum() for sign in (1, -1)]
        assert float(slope[place]) == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("group", [1, 5])
def test_koleo_tells_a_group_that_does_not_fit(group):
    with pytest.raises(UserError, match=f"koleo_group={group}"):
        ssl.koleo(jnp.ones((8, 3)), group=group)


def test_entropy():
    assert float(ssl.entropy(jnp.full((4,), 0.25))) == pytest.approx(np.log(4))
    assert float(ssl.entropy(jnp.eye(3)[0])) == 0


def test_all_of_it_to_ten_digits_in_float64():
    with jax.enable_x64(True):
        student, teacher, masked = ragged()
        center, valid = RNG.normal(size=7), masked.reshape(-1)
        found, expected = [], []

        def compare(ours, reference):
            assert ours.dtype == jnp.float64
            found.append(ours), expected.append(reference)

        log_p = log_softmax(student / 0.1)
        pairs = [
            -(teacher[:, t] * log_p[:, s]).sum(-1) for s in range(9) for t in range(2) if s != t
        ]
        compare(ssl.dino(jnp.asarray(student), jnp.asarray(teacher[:, :2])), sum(pairs) / 16)
        place, share = buffer.fill(jnp.asarray(masked)[:, None], group=6, size=54)
        taken = [buffer.take(jnp.asarray(array), place) for array in (student, teacher)]
        compare(ssl.ibot(*taken, share).sum(), reference_ibot(student, teacher, masked, 0.1))
        compare(
            ssl.center_probs(jnp.asarray(student), jnp.asarray(center), temperature=0.04),
            np.exp(log_softmax((student - center) / 0.04)),
        )
        mean = student.mean((0, 1))
        compare(
            ssl.update_center(jnp.asarray(center), jnp.asarray(mean)), 0.9 * center + 0.1 * mean
        )
        flat = 0.3 * student.reshape(-1, 7)
        targets = ssl.sinkhorn(jnp.asarray(flat), temperature=0.1, valid=jnp.asarray(valid))
        compare(targets[valid], reference_sinkhorn(flat[valid], 0.1, 3))
        compare(ssl.koleo(jnp.asarray(flat), group=6), reference_koleo(flat, 6))
        for ours, reference in zip(found, expected):
            np.testing.assert_allclose(
                ours, reference, rtol=0, atol=1e-10 * max(1, np.abs(reference).max())
            )
