"""Nearest neighbors in cases counted by hand, and against NumPy written out."""

import numpy as np

from dlc_jax.evals import neighbors


def _codes(count, length=4, values=5, seed=0):
    return np.random.default_rng(seed).integers(0, values, (count, length))


def test_nearest_codes_and_votes_by_hand():
    train = np.array([[0, 0, 0], [0, 0, 1], [1, 1, 1], [0, 1, 0]])
    test = np.array([[0, 0, 0], [1, 1, 0]])
    # Distances: 0 1 3 1 and 2 3 1 1; ties go to the lower index.
    found = neighbors.nearest_neighbors(train, test, neighbors=3)
    np.testing.assert_array_equal(found, [[0, 1, 3], [2, 3, 0]])
    votes = np.array([[2, 1, 1], [2, 1, 0], [0, 1, 1]])
    np.testing.assert_array_equal(neighbors.vote(votes, classes=3), [1, 2, 1])


def test_neighbors_do_not_depend_on_chunks():
    train, test = _codes(50), _codes(30, seed=8)
    whole = neighbors.nearest_neighbors(train, test, neighbors=5)
    parts = [neighbors.nearest_neighbors(train, test[i : i + 1], neighbors=5) for i in range(30)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_votes_of_features_are_those_written_out():
    random = np.random.default_rng(0)
    train, unseen = random.normal(size=(60, 8)), random.normal(size=(25, 8))
    labels, asked = (
        np.stack([random.integers(0, 3, n), random.integers(0, 5, n)], axis=1) for n in (60, 25)
    )
    found = neighbors.feature_knn(
        train, labels, unseen, asked, classes=(3, 5), neighbors=(1, 10, 60, 61)
    )
    assert list(found) == [1, 10, 60]  # 61 voters there are not
    cosine = (unseen / np.linalg.norm(unseen, axis=1)[:, None]) @ (
        train / np.linalg.norm(train, axis=1)[:, None]
    ).T
    for number, accuracy in found.items():
        for column, classes in enumerate((3, 5)):
            right = 0
            for row in range(25):
                votes = np.zeros(classes)
                for at in np.argsort(-cosine[row])[:number]:
                    votes[labels[at, column]] += np.exp(cosine[row, at] / 0.07)
                right += votes.argmax() == asked[row, column]
            assert accuracy[column] == right / 25
    tiny = neighbors.feature_knn(
        train, labels, unseen, asked, classes=(3, 5), neighbors=(10,), chunk_bytes=4 * 60 * 7
    )
    np.testing.assert_array_equal(tiny[10], found[10])


def test_the_length_of_a_feature_does_not_matter_and_few_examples_leave_no_voters():
    train, labels = np.array([[10.0, 1.0], [0.1, 0.1]]), np.array([[0], [1]])
    unseen, asked = np.array([[5.0, 5.0]]), np.array([[1]])
    assert (
        neighbors.feature_knn(train, labels, unseen, asked, classes=(2,), neighbors=(1,))[1] == 1.0
    )
    assert neighbors.feature_knn(train, labels, unseen, asked, classes=(2,)) == {}
