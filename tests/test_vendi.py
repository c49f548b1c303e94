"""The Vendi score by its definition, on both sides and in streams."""

import numpy as np
import pytest

from dlc_jax.errors import UserError
from dlc_jax.evals.vendi import Vendi, vendi_score


def by_definition(x):
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(unit @ unit.T / len(x))
    values = values[values > 1e-14]
    return np.exp(-(values * np.log(values)).sum())


@pytest.mark.parametrize("count", [5, 12, 40])
def test_definition(count):
    x = np.random.default_rng(0).normal(size=(count, 12)) + 0.3
    stream, half = Vendi(12), Vendi(12)
    stream.add(x[: count // 3])
    half.add(x[count // 3 :])
    stream.merge(half)
    for found in (vendi_score(x), stream.score()):
        assert found == pytest.approx(by_definition(x), rel=1e-9)


def test_extremes():
    assert vendi_score(np.diag([1.0, 2, 3])) == pytest.approx(3)
    assert vendi_score(np.tile([[0.1, -3, 4]], (20, 1))) == pytest.approx(1)


def test_refusals():
    x = np.ones((4, 3))
    stream = Vendi(3)
    with pytest.raises(UserError, match="needs images; there are none"):
        stream.score()
    stream.add(x)
    with pytest.raises(UserError, match=r"must be \[images, 3\], not \[4, 2\]"):
        stream.add(x[:, :2])
    x[2] = 0
    with pytest.raises(UserError, match="1 of 4 rows are zero, the first is row 6"):
        stream.add(x)
    x[1] = np.nan
    with pytest.raises(UserError, match="1 of 4 rows are NaN or infinite, the first is row 5"):
        stream.add(x)
    with pytest.raises(UserError, match="0 rows, the metric needs 1"):
        vendi_score(x[:0])
