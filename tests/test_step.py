"""One training step on three numbers: what a stage is given, and which steps are skipped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlc_jax.errors import UserError
from dlc_jax.optim import AdamW
from dlc_jax.stage import Plan, Stage
from dlc_jax.step import (
    cast,
    example_keys,
    make_init,
    make_train_step,
    make_validation_step,
    shared_key,
)

ROOT, OFFSET = jax.random.key(5), {"w": np.float32([4, 5, 6])}


def watched() -> Stage:
    """Its metrics are what it was given. Of zeros, its loss is finite and its gradient is not."""

    def name(prefix, key, **given):
        found = {f"{prefix}/{name}": tree["w"] for name, tree in given.items()}
        return found | {f"{prefix}/key": jax.random.key_data(key)}

    def prepare(params, ema, extra, batch, frozen, step, key):
        return batch | name("prepare", key, params=params, ema=ema, frozen=frozen)

    def loss(params, extra, batch, frozen, step, key):
        seen = name("loss", key, params=params, frozen=frozen)
        seen |= {name: value for name, value in batch.items() if "/" in name}
        value = jnp.sqrt(batch["x"] * params["w"]).astype(jnp.float32).sum()
        return value, (seen, {"x": batch["x"]})

    weights, zeros = np.float32([1, 2, 3]), np.zeros(3, np.float32)
    return Stage(
        init=lambda key: ({"w": jnp.asarray(weights)}, {"params": zeros, "x": zeros}),
        prepare=prepare,
        loss=loss,
        after_update=lambda extra, params, aux, step: {"params": params["w"], "x": aux["x"]},
        ema_decay=lambda step: 0.75,
        batch_spec={},
        batches=None,
        optimizer=AdamW(learning_rate=0.1, schedule="linear").make(5),
        plan=Plan(steps=5, batch=3),
    )


@pytest.fixture(scope="module")
def trace():
    """States before each step and after the last, and metrics; of four batches the third is 0."""
    step, state = jax.jit(make_train_step(watched())), make_init(watched())(ROOT)
    states, metrics = [jax.device_get(state)], []
    for scale in (1, 2, 0, 1):
        batch = {"x": np.full(3, scale, np.float32)}
        state, found = step(state, batch, OFFSET, ROOT)
        states.append(jax.device_get(state))
        metrics.append(jax.device_get(found))
    return states, metrics


def test_every_step_has_a_key_of_its_own_from_the_root(trace):
    for number, found in enumerate(trace[1]):
        want = jax.random.key_data(jax.random.fold_in(ROOT, number))
        np.testing.assert_array_equal(found["prepare/key"], want)
        np.testing.assert_array_equal(found["loss/key"], want)


def test_prepare_is_given_parameters_and_their_average(trace):
    states, metrics = trace
    for state, found in zip(states, metrics):
        np.testing.assert_array_equal(found["prepare/params"], state.params["w"])
        np.testing.assert_array_equal(found["prepare/ema"], state.ema["w"])
    assert np.abs(states[1].ema["w"] - states[1].params["w"]).min() > 0.01


def test_extra_is_made_of_the_new_parameters(trace):
    states, _ = trace
    np.testing.assert_array_equal(states[1].extra["params"], states[1].params["w"])
    np.testing.assert_array_equal(states[2].extra["x"], [2, 2, 2])


def test_a_gradient_that_is_not_finite_skips_the_step_though_the_loss_is(trace):
    states, metrics = trace
    assert metrics[2]["loss"] == 0 and not np.isfinite(metrics[2]["gradient_norm"])
    for name in ("params", "opt_state", "ema", "extra"):
        before, after = getattr(states[2], name), getattr(states[3], name)
        jax.tree.map(np.testing.assert_array_equal, before, after)
    assert [int(state.step) for state in states] == [0, 1, 2, 3, 4]
    skipped = [state.skipped.tolist() for state in states]
    assert skipped == [[0, 0], [0, 0], [0, 0], [1, 1], [1, 0]]
    assert np.isfinite(states[4].params["w"]).all()
    assert (states[4].params["w"] != states[3].params["w"]).all()


def test_metrics_are_of_the_step_they_describe(trace):
    states, metrics = trace
    w = states[1].params["w"].astype(np.float64)
    norm = np.linalg.norm(2 / (2 * np.sqrt(2 * w)))  # d sqrt(2 w) / dw
    np.testing.assert_allclose(metrics[1]["gradient_norm"], norm, rtol=1e-5)
    np.testing.assert_allclose(metrics[1]["learning_rate"], 0.08, rtol=1e-6)  # a fifth down to 0


def test_validation_is_given_what_a_step_is(trace):
    state = trace[0][1]
    batch = {"x": np.ones(3, np.float32)}
    found = jax.jit(make_validation_step(watched()))(state, batch, OFFSET, ROOT)
    for name, want in (("params", state.params), ("ema", state.ema), ("frozen", OFFSET)):
        np.testing.assert_array_equal(found[f"prepare/{name}"], want["w"])
    for name in ("prepare/key", "loss/key"):
        np.testing.assert_array_equal(found[name], jax.random.key_data(ROOT))


def test_validation_has_a_loss_of_its_own_where_a_stage_gives_one(trace):
    def other(params, extra, batch, frozen, step, key):
        return jnp.float32(42.0), ({"of": jnp.float32(1.0)}, {})

    stage = dataclasses.replace(watched(), validation_loss=other)
    batch = {"x": np.ones(3, np.float32)}
    found = jax.jit(make_validation_step(stage))(trace[0][1], batch, OFFSET, ROOT)
    assert found == {"loss": 42.0, "of": 1.0}


def test_bfloat16_reaches_everything_a_stage_computes_with():
    state, batch = make_init(watched())(ROOT), {"x": np.ones(3, np.float32)}
    for make in (make_train_step, make_validation_step):
        step = make(watched(), dtype="bfloat16")
        found = jax.eval_shape(step, state, batch, OFFSET, ROOT)
        found = found[1] if make is make_train_step else found
        wide = {name for name, leaf in found.items() if "/" in name and leaf.dtype != jnp.bfloat16}
        assert wide == {"prepare/key", "loss/key"}, make.__name__


def test_shared_keys_differ_by_purpose_and_from_every_examples():
    def draw(key):
        shared = [shared_key(key, purpose)[None] for purpose in range(3)]
        examples = [example_keys(key, jnp.arange(4), purpose) for purpose in range(3)]
        return jax.random.key_data(jnp.concatenate([*shared, *examples]))

    keys = np.asarray(jax.jit(draw)(ROOT))
    assert len(np.unique(keys, axis=0)) == len(keys) == 15


def test_tables_stay_wide_in_all_that_a_stage_computes_with_and_each_must_match():
    state, batch = make_init(watched())(ROOT), {"x": np.ones(3, np.float32)}
    for make in (make_train_step, make_validation_step):
        step = make(dataclasses.replace(watched(), tables=("w",)), dtype="bfloat16")
        found = jax.eval_shape(step, state, batch, OFFSET, ROOT)
        found = found[1] if make is make_train_step else found
        narrow = {name for name, leaf in found.items() if leaf.dtype == jnp.bfloat16}
        assert narrow == {"prepare/frozen", "loss/frozen"}, make.__name__
        wrong = dataclasses.replace(watched(), tables=("w", "embed"))
        with pytest.raises(UserError, match="'embed' matches no parameter; names are w"):
            jax.eval_shape(make(wrong, dtype="bfloat16"), state, batch, OFFSET, ROOT)
    tree = {"a": {"table": jnp.ones(2), "tables": jnp.ones(2)}, "n": jnp.ones(2, jnp.int32)}
    found = jax.tree.map(lambda leaf: leaf.dtype.name, cast(tree, jnp.bfloat16, (r"a/table",)))
    assert found == {"a": {"table": "float32", "tables": "bfloat16"}, "n": "int32"}
