"""Precision, recall, density and coverage by their definitions."""

import numpy as np
import pytest

from dlc_jax.errors import UserError
from dlc_jax.evals.manifold import Manifold, precision_recall_density_coverage, radii


def sets(n=90, m=70, d=5):
    random = np.random.default_rng(0)
    samples = random.normal(size=(n, d)) * 0.8 + 0.4
    return samples.astype(np.float32), random.normal(size=(m, d)).astype(np.float32)


def by_definition(samples, reference, k, k_density):
    def apart(x, y):
        return np.linalg.norm(x[:, None].astype(float) - y, axis=-1)

    own, own_samples = np.sort(apart(reference, reference)), np.sort(apart(samples, samples))
    cross = apart(reference, samples)  # column 0 of `own` is the row itself
    inside = cross < own[:, k_density, None]
    return Manifold(
        (cross <= own[:, k, None]).any(0).mean(),
        (cross <= own_samples[:, k]).any(1).mean(),
        inside.sum(0).mean() / k_density,
        inside.any(1).mean(),
    )


@pytest.mark.parametrize("k, k_density", [(3, 5), (6, 1)])
@pytest.mark.parametrize("block", [9, 70, 1000])
def test_definition(k, k_density, block):
    expected = by_definition(*sets(), k, k_density)
    shared = {"neighbors": k, "neighbors_density": k_density, "block": block}
    found = precision_recall_density_coverage(*sets(), **shared)
    assert found == pytest.approx(expected, abs=1e-12) and 0.1 < min(expected[:2]) < 0.99


def test_far_from_the_origin():
    """Norms of 10^6 times the distances: without centering nothing would be left of them."""
    samples, reference = (np.float32(1000) + np.round(64 * part) / 64 for part in sets())
    expected = by_definition(samples, reference, 3, 5)
    assert precision_recall_density_coverage(samples, reference) == pytest.approx(expected)


def test_a_copy_counts_as_a_neighbor_and_the_row_itself_does_not():
    x = np.array([[0.0, 0], [0, 0], [3, 0], [0, 4]], np.float32)
    for block in (2, 4):
        found = radii(x, (1, 2, 3), mean=np.zeros(2, np.float32), block=block)
        np.testing.assert_allclose(found, [[0, 9, 16]] * 2 + [[9, 9, 25], [16, 16, 25]])


def test_same_set_and_distant_sets():
    samples, reference = sets()
    found = precision_recall_density_coverage(reference, reference)
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)
    assert precision_recall_density_coverage(samples + 100, reference) == (0, 0, 0, 0)


def test_memory_maps(tmp_path):
    samples, reference = sets()
    samples.tofile(tmp_path / "x")
    mapped = np.memmap(tmp_path / "x", np.float32, "r", shape=samples.shape)
    found = precision_recall_density_coverage(mapped, reference, block=40)
    assert found == precision_recall_density_coverage(samples, reference, block=40)


def test_refusals():
    samples, reference = sets()
    with pytest.raises(UserError, match="reference: 5 rows, the metric needs 6"):
        precision_recall_density_coverage(samples, reference[:5])
    with pytest.raises(UserError, match="samples: all 90 rows are equal"):
        precision_recall_density_coverage(0 * samples, reference)
    with pytest.raises(UserError, match=r"reference must be \[images, 5\], not \[70, 4\]"):
        precision_recall_density_coverage(samples, reference[:, :4])
    samples[[7, 9], 2] = np.inf
    with pytest.raises(UserError, match="samples: 2 of 90 rows .* the first is row 7"):
        precision_recall_density_coverage(samples, reference)
