"""Gradients in bfloat16 are those in float32, leaf by leaf.

A sum of thousands of rows in bfloat16 is not: what a table's row gets from all that read it was
wrong by more than half.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_contract import STAGES as THROWAWAY

from dlc_jax import optim
from dlc_jax.errors import UserError
from dlc_jax.step import cast, make_init, make_train_step

MOST = 0.02  # of the norm of a leaf's gradient


def gradients(stage):
    """The gradient of one step in float32 and in bfloat16, as {name: (wide, narrow)}.

    Parameters that start at zero are drawn: behind them no gradient would pass.
    """
    keeping = optim.Optimizer(tx=optax.trace(0.0), learning_rate=lambda step: 0.0)
    stage, random = dataclasses.replace(stage, optimizer=keeping), np.random.default_rng(0)

    def fill(leaf):
        drawn = jnp.asarray(0.05 * random.normal(size=leaf.shape), leaf.dtype)
        return leaf if np.any(leaf) else drawn

    state = make_init(stage)(jax.random.key(0))
    state = dataclasses.replace(state, params=jax.tree.map(fill, state.params))
    batch, frozen, found = next(stage.batches("train")), stage.load_frozen(None), []
    for dtype in ("float32", "bfloat16"):
        step = jax.jit(make_train_step(stage, dtype=dtype))
        new, _ = step(state, batch, frozen, jax.random.key(1))
        found.append(jax.tree.leaves_with_path(new.opt_state.trace))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (np.asarray(wide), narrow)
        for (path, wide), (_, narrow) in zip(*found, strict=True)
    }


def wrong(wide, narrow) -> float:
    """Their difference over the size of the first."""
    return float(np.linalg.norm(narrow - wide) / np.linalg.norm(wide))
