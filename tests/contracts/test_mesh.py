"""Every stage on eight devices does what it does on one: the first gradient, twenty losses.

It compiles once, and nothing is transferred unasked.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_contract import STAGES as THROWAWAY

from dlc_jax import optim, parallel, train
from dlc_jax.step import make_init

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2)]
STEPS = 20


def remembering(stage):
    """The stage with an optimizer whose state holds the last gradient too."""
    tx = stage.optimizer.tx

    def update(grads, state, params):
        updates, state = tx.update(grads, state[1], params)
        return updates, (grads, state)

    kept = optax.GradientTransformation(
        lambda params: (jax.tree.map(jnp.zeros_like, params), tx.init(params)), update
    )
    return dataclasses.replace(
        stage, optimizer=optim.Optimizer(tx=kept, learning_rate=stage.optimizer.learning_rate)
    )


def follow(stage, mesh):
    """(first gradient, its placements, the losses), as `train` computes them.

    Nothing crosses to a device unasked.
    """
    stage = remembering(stage)
    step, abstract = train.compile_step(stage, mesh)
    with jax.set_mesh(mesh):
        placed = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        state = jax.jit(make_init(stage), out_shardings=placed)(jax.random.key(0))
        root, batches = (
            jax.device_put(jax.random.key(1), parallel.replicated(mesh)),
            stage.batches("train"),
        )
        frozen, losses = stage.load_frozen(mesh), []
        for _ in range(STEPS):
            batch = next(batches)
            with jax.transfer_guard("disallow"):
                state, metrics = step(state, parallel.to_global(batch, mesh), frozen, root)
            losses.append(float(metrics["loss"]))
            if len(losses) == 1:
                first = jax.device_get(state.opt_state[0])
                specs = {
                    axis
                    for leaf in jax.tree.leaves(state.opt_state[0])
                    for axis in leaf.sharding.spec
                    if axis
                }
    assert step._cache_size() == 1
    return first, specs, losses


@pytest.fixture(scope="module")
def stages(real_stages):
    return real_stages | {name: make(steps=STEPS) for name, make in THROWAWAY.items()}


@pytest.fixture(scope="module")
def alone(stages):
    """What one device does, computed once for each stage."""
    found = {}

    def of(name):
        if name not in found:
            found[name] = follow(stages[name], parallel.make_mesh(devices=jax.devices()[:1]))
        return found[name]

    return of


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("name", ["encoder", "prior", "generator", *THROWAWAY])
def test_eight_devices_do_what_one_does(name, sizes, stages, alone, monkeypatch):
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices; on CPU the tests force them")
    monkeypatch.setattr(
        parallel, "SMALLEST", 64
    )  # otherwise arrays of this size are replicated, and nothing is tested
    data, fsdp, tensor = sizes
    if not stages[
        name
    ].rules:  # a stage without a transformer has nothing that `tensor` could split
        data, tensor = data * tensor, 1
    mesh = parallel.make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=jax.devices()[:8])
    gradient, _, losses = alone(name)
    found, specs, together = follow(stages[name], mesh)
    if name not in THROWAWAY:
        assert specs == {axis for axis in ("fsdp", "tensor") if mesh.shape[axis] > 1}

    def compare(path, one, eight):
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(one, eight, rtol=0, atol=1e-5 * np.abs(one).max(), err_msg=where)

    np.testing.assert_allclose(losses[0], together[0], rtol=1e-5)
    jax.tree_util.tree_map_with_path(compare, gradient, found)
    np.testing.assert_allclose(losses, together, rtol=1e-3)
