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
from recipes import load
from test_contract import STAGES as THROWAWAY

from dlc_jax import optim
from dlc_jax.stages import STAGES
from dlc_jax.step import make_init, make_train_step

NAMES = "encoder prior sedd own_rows flow distill hastened generator modern".split()
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


def errors(pairs) -> dict[str, float]:
    """{name: norm of the difference, over that of the leaf's gradient}.

    A gradient below a hundredth of the whole one is compared with that hundredth: what cancels to
    next to nothing keeps the rounding of its terms.
    """
    norms = {name: np.linalg.norm(wide) for name, (wide, _) in pairs.items()}
    least = 0.01 * np.linalg.norm(list(norms.values()))
    return {
        name: float(np.linalg.norm(narrow - wide) / max(norms[name], least))
        for name, (wide, narrow) in pairs.items()
    }


@pytest.fixture(scope="module")
def stages(real_stages, tmp_path_factory):
    """Those of the quickstart and the small ones; the encoder without KoLeo.

    An encoder that has learned nothing gives all images nearly the same vector, and KoLeo's
    gradient is one over their distances: there bfloat16 is wrong by 7 %, however it is summed.
    """
    lines = {"encoder.train.batch": 32, "encoder.objective.koleo": 0.0}
    lines |= {"encoder.objective.plain": 1.0}
    lines |= {"encoder.objective.ibot": 1.0, "encoder.objective.mask_group": 32}
    lines |= {"*.model*.width": 32, "*.model*.depth": 2, "*.model*.heads": 2}
    lines |= {"sedd.like": "prior", "sedd.model.sigma_conditioning": True}
    lines |= {"sedd.process.objective": "score", "sedd.process.noise.schedule": "log_linear"}
    lines |= {"own_rows.like": "prior", "own_rows.model.per_position": True}
    lines |= {"flow.like": "prior", "flow.process.name": "flow"}
    lines |= {"flow.model.sigma_conditioning": True, "flow.model.per_position": True}
    lines |= {"distill.stage": "distill", "distill.train.batch": 32, "*.optimizer.warmup": 0}
    lines |= {"hastened.like": "distill", "hastened.teacher": "flow"}
    lines |= {"hastened.process.name": "flow", "hastened.model.sigma_conditioning": True}
    lines |= {"hastened.model.per_position": True}
    config, workdir = load("quickstart.py:tiny", lines), tmp_path_factory.mktemp("stages")
    names = ("encoder", "sedd", "own_rows", "flow", "distill", "hastened")
    made = {name: STAGES[config[name].stage](config, step=name, workdir=workdir) for name in names}
    for name in names[1:]:
        made[name] = dataclasses.replace(made[name], batches=real_stages["prior"].batches)
    for name in ("distill", "hastened"):
        teacher = {"teacher": made[name].init(jax.random.key(5))[0]}
        made[name] = dataclasses.replace(made[name], load_frozen=lambda mesh, given=teacher: given)
    return {**real_stages, **{name: make() for name, make in THROWAWAY.items()}, **made}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, *THROWAWAY])
def test_bfloat16_gives_the_gradient_of_float32(name, stages):
    found = errors(gradients(stages[name]))
    worst = sorted(found.items(), key=lambda pair: -pair[1])[:5]
    assert all(error <= MOST for error in found.values()), worst
