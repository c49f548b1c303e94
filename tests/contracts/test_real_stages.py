"""The stages of the quickstart keep the contract too: the same step accumulated, a falling loss.

Devices: test_mesh.py.
"""

import dataclasses

import jax
import numpy as np
import pytest
from test_contract import run

from dlc_jax.step import make_init, make_validation_step


@pytest.mark.slow
@pytest.mark.parametrize("name", ["encoder", "prior", "generator", "modern"])
def test_accumulation_equals_the_whole_step(name, real_stages):
    """Noise, masks and dropped codes follow the example; Sinkhorn sees the global batch.

    KoLeo's groups of 8 stay whole.
    """
    alone, first, _ = run(real_stages[name], steps=2)
    _, metrics, _ = run(real_stages[name], steps=2, accumulate=2)
    for key, rtol in (("loss", 2e-5), ("gradient_norm", 1e-3)):
        one, two = ([m[key] for m in each] for each in (first, metrics))
        np.testing.assert_allclose(one, two, rtol=rtol)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(alone.params)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["encoder", "prior", "generator", "modern"])
def test_loss_falls(name, real_stages):
    """On one batch with one draw of noise and times.

    From step to step the draws alone move the loss more than 20 steps of learning do.
    """
    stage = real_stages[name]
    before = make_init(stage)(jax.random.key(0))
    after, metrics, _ = run(stage, steps=20)
    assert np.isfinite([entry["loss"] for entry in metrics]).all()
    step, batch = jax.jit(make_validation_step(stage)), next(stage.batches("validation"))
    # The same teacher for both: one that has learned something would ask harder questions.
    states = (dataclasses.replace(before, params=state.params) for state in (before, after))
    first, second = (step(state, batch, {}, jax.random.key(3)) for state in states)
    assert second["loss"] < first["loss"]
