"""Every stage, real or throwaway, keeps the contract.

One compile, frozen inputs untouched, the same step however it is split.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from throwaway import coupled, job, joint

from dlc_jax import parallel, train
from dlc_jax.stage import Job, Stage
from dlc_jax.step import example_keys, make_init, make_train_step, make_validation_step, split

STAGES = {"coupled": coupled, "joint": joint}


def run(stage, *, steps=1, mesh=None, accumulate=1, **options):
    """State and metrics after some steps."""
    mesh = mesh or parallel.make_mesh(devices=jax.devices()[:1])
    plan = dataclasses.replace(stage.plan, accumulate=accumulate, **options)
    stage = dataclasses.replace(stage, plan=plan)
    step, abstract = train.compile_step(stage, mesh)
    with jax.set_mesh(mesh):
        placed = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        state = jax.jit(make_init(stage), out_shardings=placed)(jax.random.key(0))
        frozen, batches, root = stage.load_frozen(mesh), stage.batches("train"), jax.random.key(1)
        before = jax.tree.map(np.array, frozen)
        every = []
        for _ in range(steps):
            state, metrics = step(state, parallel.to_global(next(batches), mesh), frozen, root)
            every.append(jax.device_get(metrics))
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, frozen))
    return state, every, step


@pytest.mark.parametrize("name", STAGES)
def test_loss_is_finite_and_falls_with_one_compile(name):
    _, metrics, step = run(STAGES[name](steps=40), steps=40)
    losses = [entry["loss"] for entry in metrics]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    assert step._cache_size() == 1


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=str)
def test_eight_devices_do_what_one_does(name, sizes):
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices; on CPU the tests force them")
    named = dict(zip(parallel.AXES, sizes))
    mesh = parallel.make_mesh(**named, devices=jax.devices()[:8])
    alone, first, _ = run(STAGES[name](), steps=3)
    together, second, _ = run(STAGES[name](), steps=3, mesh=mesh)
    np.testing.assert_allclose([m["loss"] for m in first], [m["loss"] for m in second], rtol=1e-5)
    close = functools.partial(np.testing.assert_allclose, atol=1e-4)
    jax.tree.map(close, alone.params, together.params)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_equals_the_whole_step(name, accumulate):
    """Draws follow the example, not the microbatch, so the gradient is the same up to rounding."""
    whole, first, _ = run(STAGES[name](), steps=2)
    parts, second, _ = run(STAGES[name](), steps=2, accumulate=accumulate)
    for a, b in zip(first, second):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
        np.testing.assert_allclose(a["gradient_norm"], b["gradient_norm"], rtol=1e-4)
    close = functools.partial(np.testing.assert_allclose, atol=1e-4)
    jax.tree.map(close, (whole.params, whole.extra), (parts.params, parts.extra))


def test_draws_differ_between_examples_and_purposes():
    key, position = jax.random.key(0), jnp.arange(64)
    draw = jax.vmap(jax.random.uniform)
    one, two = (draw(example_keys(key, position, purpose)) for purpose in (1, 2))
    assert len(np.unique(np.concatenate([one, two]))) == 128


def test_split_keeps_neighbors_and_loses_nothing():
    batch = {"x": jnp.arange(16)}
    parts = split(batch, 2, 2)["x"]
    assert sorted(np.asarray(parts).ravel().tolist()) == list(range(16))
    # Each of two shares cuts its own eight examples in two: groups of four stay whole.
    assert np.asarray(parts).tolist() == [[0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]]


def test_average_and_extra_follow_the_updates():
    state, _, _ = run(coupled(), steps=1)
    start = make_init(coupled())(jax.random.key(0))
    # decay(0) = 1 / 10: the average has moved nine tenths of the way.
    want = jax.tree.map(lambda old, new: old + 0.9 * (new - old), start.params, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state.ema, want)
    assert int(state.extra["updates"]) == 1


def test_bfloat16_keeps_a_float32_master():
    stage = joint(steps=30)
    state, metrics, _ = run(stage, steps=30, dtype="bfloat16")
    _, exact, _ = run(stage, steps=30)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(metrics[0]["loss"], exact[0]["loss"], rtol=0.05)
    assert metrics[0]["loss"] != exact[0]["loss"]  # it was another computation
    assert metrics[-1]["loss"] < metrics[0]["loss"]


def test_clipping_bounds_the_update():
    stage = joint()
    step = make_train_step(stage, clip=1e-3)
    state = make_init(stage)(jax.random.key(0))
    batch = next(stage.batches("train"))
    free, _ = make_train_step(stage)(state, batch, {}, jax.random.key(1))
    clipped, metrics = step(state, batch, {}, jax.random.key(1))
    ratio = 1e-3 / float(metrics["gradient_norm"])
    # Adam's first moment is a tenth of the gradient it was given.
    moment = lambda state: state.opt_state[0].mu["table"]  # noqa: E731
    np.testing.assert_allclose(moment(clipped), moment(free) * ratio, rtol=1e-5)


def bad_at(stage, *bad):
    """The stage with a loss that is not a number at some steps."""

    def loss(params, extra, batch, frozen, step, key):
        value, rest = stage.loss(params, extra, batch, frozen, step, key)
        return jnp.where(jnp.isin(step, jnp.array(bad)), jnp.nan, value), rest

    return dataclasses.replace(stage, loss=loss)


def test_a_step_without_a_finite_loss_changes_nothing_and_is_counted():
    good, _, _ = run(coupled(), steps=2)
    state, metrics, _ = run(bad_at(coupled(), 2, 3), steps=4)
    kept = lambda state: (state.params, state.opt_state, state.ema, state.extra)  # noqa: E731
    # Two programs, compiled apart: their last bits may differ.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, kept(good), kept(state))
    assert state.skipped.tolist() == [2, 2] and int(state.step) == 4
    state, _, _ = run(bad_at(coupled(), 2), steps=4)
    assert state.skipped.tolist() == [1, 0]
    assert not np.allclose(state.params["kernel"], good.params["kernel"])


def test_validation_takes_no_step():
    stage = coupled()
    state = make_init(stage)(jax.random.key(0))
    batch, frozen = next(stage.batches("validation")), stage.load_frozen(None)
    metrics = make_validation_step(stage)(state, batch, frozen, jax.random.key(3))
    assert np.isfinite(metrics["loss"])


@pytest.mark.parametrize("name", STAGES)
def test_lowers_from_shapes_alone(name):
    stage = dataclasses.replace(STAGES[name](), batches=None, load_frozen=None)
    assert "func" in train.lower(stage, parallel.make_mesh()).as_text()[:2000]


def test_job_runs_and_lowers(tmp_path):
    made = job()
    assert isinstance(made, Job) and not isinstance(made, Stage)
    assert made.run(parallel.make_mesh(), tmp_path) == {"job/devices": len(jax.devices())}
    assert "multiply" in made.programs["twice"].lower(parallel.make_mesh()).as_text()
