"""The loop: what is killed and started again ends where an uninterrupted run ends, bit for bit.

What goes wrong is said in a line.
"""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from throwaway import Numbers, coupled, joint

from dlc_jax import parallel
from dlc_jax.checkpoint import Checkpoints, load_params
from dlc_jax.errors import Interrupted, UserError
from dlc_jax.optim import AdamW
from dlc_jax.stage import Evaluator
from dlc_jax.step import TrainState
from dlc_jax.train import _initial, _Validation, compile_step, train


def run(stage, directory, **options):
    mesh = parallel.make_mesh(devices=jax.devices()[: options.pop("devices", 1)])
    return train(stage, directory, **(dict(mesh=mesh, seed=0, name="tried") | options))


def final(stage, directory):
    """The saved state, as numpy."""
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    _, abstract = compile_step(stage, mesh)
    state, step, _ = Checkpoints(directory / "checkpoints").restore(
        abstract, stage.batches("train"), stage.identity
    )
    assert step == stage.plan.steps
    return jax.tree.map(np.asarray, state)


class Stopping(Numbers):
    """Raises after some batches, as a machine that dies between two steps."""

    def __init__(self, batch, *, after, **options):
        super().__init__(batch, **options)
        self.after, self.count = after, 0

    def __next__(self):
        self.count += 1
        if self.count > self.after:
            raise MemoryError("the machine is gone")
        return super().__next__()


class Closing:
    """An iterator with threads, as it were."""

    def __init__(self, batches):
        self.closed, self.get_state, self.set_state = False, batches.get_state, batches.set_state
        self.batches = batches

    def __next__(self):
        return next(self.batches)

    def close(self):
        self.closed = True


def dying(stage, after, **options):
    return dataclasses.replace(
        stage,
        batches=lambda split, rows=None: (
            Stopping(8, after=after, **options) if split == "train" else stage.batches(split, rows)
        ),
    )


@pytest.mark.parametrize("make", [coupled, joint], ids=["coupled", "joint"])
@pytest.mark.parametrize("after", [3, 5])
def test_resume_is_bit_exact(make, after, tmp_path):
    stage = make(steps=8)
    results = run(stage, tmp_path / "whole")
    with pytest.raises(MemoryError):
        run(dying(stage, after, seed=0 if make is coupled else 10), tmp_path / "parts")
    assert run(stage, tmp_path / "parts") == results
    jax.tree.map(
        np.testing.assert_array_equal,
        final(stage, tmp_path / "whole"),
        final(stage, tmp_path / "parts"),
    )
    lines = [
        json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
    ]
    assert sorted({line["step"] for line in lines}) == [2, 4, 6, 8]  # log_every is 2


def test_a_finished_run_does_nothing_and_a_longer_one_goes_on(tmp_path):
    run(coupled(steps=4), tmp_path)
    before = sorted((tmp_path / "checkpoints").iterdir())
    run(coupled(steps=4), tmp_path)
    assert sorted((tmp_path / "checkpoints").iterdir()) == before
    run(coupled(steps=6), tmp_path)
    assert int(final(coupled(steps=6), tmp_path).step) == 6


def test_resume_on_other_devices(tmp_path):
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices; on CPU the tests force them")
    stage = coupled(steps=6)
    run(stage, tmp_path / "one")
    with pytest.raises(MemoryError):
        run(dying(stage, 3), tmp_path / "two", devices=4)
    run(stage, tmp_path / "two", devices=2)
    one, two = final(stage, tmp_path / "one"), final(stage, tmp_path / "two")
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one.params, two.params
    )


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path):
    stage = coupled(steps=8)
    results = run(stage, tmp_path)
    newest = tmp_path / "checkpoints" / "8"
    data = max(
        (path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    data.write_bytes(bytes(byte ^ 1 for byte in data.read_bytes()))
    assert run(stage, tmp_path) == results
    assert (
        tmp_path / "checkpoints" / "8.damaged"
    ).is_dir()  # it was seen, kept, and made again from step 6
    assert int(final(stage, tmp_path).step) == 8


def test_non_finite_steps_in_a_row_stop_the_run_and_name_the_last_good_step(tmp_path):
    stage = coupled(steps=20, patience=3)

    def loss(params, extra, batch, frozen, step, key):
        value, rest = stage.loss(params, extra, batch, frozen, step, key)
        return jnp.where(step >= 5, jnp.nan, value), rest

    stopped = dataclasses.replace(stage, loss=loss)
    with pytest.raises(UserError, match="not finite for 3 steps in a row; the last good step is 5"):
        run(stopped, tmp_path)
    assert (
        load_params(
            tmp_path / "checkpoints", jax.eval_shape(lambda: stage.init(jax.random.key(0))[0])
        )
        is not None
    )
    run(stage, tmp_path)  # with the cause removed, the same command goes on


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path):
    stage = coupled(steps=8)
    results = run(stage, tmp_path / "whole")

    class Asking(Numbers):
        def __next__(self):
            if self.next == 24:  # before the fourth batch
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__next__()

    asked = dataclasses.replace(
        stage,
        batches=lambda split, rows=None: (
            Asking(8) if split == "train" else stage.batches(split, rows)
        ),
    )
    with pytest.raises(Interrupted, match="stopped at step 4 of 8"):
        run(asked, tmp_path / "parts")
    assert run(stage, tmp_path / "parts") == results


COMMAND = """
import dataclasses, os, signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
import jax
from throwaway import Numbers, coupled
from dlc_jax import command, parallel
from dlc_jax.train import train

class Asking(Numbers):
    def __next__(self):
        if self.next == 24:  # before the fourth batch
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(1)  # for the thread to hear of it
        return super().__next__()

def run():
    stage = coupled(steps=8)

    def batches(split, rows=None):
        return Asking(8) if split == "train" else stage.batches(split, rows)

    asked = dataclasses.replace(stage, batches=batches)
    mesh = parallel.make_mesh(devices=jax.devices()[:1])
    train(asked, sys.argv[1], mesh=mesh, seed=0, name="tried")

sys.exit(command.outcome(run, alone=True))
"""


def test_a_command_whose_terminal_is_gone_saves_and_the_same_command_goes_on(tmp_path):
    results = run(coupled(steps=8), tmp_path / "whole")
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here.parents[1]), str(here)])}
    command = [sys.executable, "-c", COMMAND, str(tmp_path / "parts")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    line = "dlc_jax: tried: stopped at step 4 of 8, saved; the same command goes on\n"
    assert (ended.stderr, ended.returncode) == (line, 75)
    assert run(coupled(steps=8), tmp_path / "parts") == results


def test_warm_start_is_strict_and_names_what_is_new(tmp_path):
    run(joint(steps=2), tmp_path / "first")
    with pytest.raises(UserError, match="head.bias"):
        run(joint(steps=2, wide=True, init_from=str(tmp_path / "first")), tmp_path / "strict")
    named = joint(steps=2, wide=True, init_from=str(tmp_path / "first"), init_new=("head.*",))
    named = dataclasses.replace(named, ema_decay=lambda step: 1.0)  # the average stays at its start
    run(named, tmp_path / "named", seed=1)  # of another seed: its own draw would be far away
    one, two = final(joint(steps=2), tmp_path / "first"), final(named, tmp_path / "named")
    moved = np.abs(one.params["table"] - two.params["table"]).max()
    assert 0 < moved < 0.1  # two small steps from there, not a fresh draw
    np.testing.assert_array_equal(two.ema["table"], one.params["table"])


def test_evaluators_run_at_their_cadence_and_before_the_save(tmp_path):
    seen = []

    def count(state, frozen, mesh, directory):
        saved = [path.name for path in (tmp_path / "checkpoints").glob("[0-9]") if path.is_dir()]
        seen.append((int(state.step), str(int(state.step)) in saved))
        return {"steps": float(state.step)}

    stage = dataclasses.replace(
        coupled(steps=6), evals=(Evaluator("count", 2, count), Evaluator("last", 0, count))
    )
    results = run(stage, tmp_path)
    assert [step for step, _ in seen] == [2, 4, 6, 6]
    assert not any(saved for _, saved in seen)
    assert results["count/steps"] == results["last/steps"] == 6


def test_the_best_step_stays_and_every_nth_is_saved_between_saves(tmp_path):
    def measure(state, frozen, mesh, directory):
        return {"accuracy": {2: 0.5, 4: 0.9}.get(int(state.step), 0.1)}

    def kept(directory):
        return sorted(int(path.name) for path in (directory / "checkpoints").glob("*[0-9]"))

    stage = coupled(steps=12, keep_best="-count/accuracy", keep_period=5)
    stage = dataclasses.replace(stage, evals=(Evaluator("count", 2, measure),))
    run(stage, tmp_path / "kept")
    assert kept(tmp_path / "kept") == [0, 4, 5, 10, 12]
    misspelt = coupled(steps=12, keep_best="count/acc")
    misspelt = dataclasses.replace(misspelt, evals=stage.evals)
    words = "keep_best='count/acc': count does not measure it, but count/accuracy; set it to one"
    with pytest.raises(UserError, match=words):
        run(misspelt, tmp_path / "misspelt")
    assert kept(tmp_path / "misspelt") == [0, 2]  # what was trained is saved
    run(stage, tmp_path / "misspelt")  # the same command, corrected
    assert final(stage, tmp_path / "misspelt").step == 12


def test_an_evaluators_pictures_are_shown_and_are_no_results(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def draw(state, frozen, mesh, directory):
        return {"samples": np.full((4, 6, 3), int(state.step), np.uint8), "mean": float(state.step)}

    results = run(
        dataclasses.replace(coupled(steps=4), evals=(Evaluator("grid", 2, draw),)), tmp_path
    )
    assert results["grid/mean"] == 4 and "grid/samples" not in results
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [(event.step, event.width, event.height) for event in found.Images("grid/samples")] == [
        (2, 6, 4),
        (4, 6, 4),
    ]
    assert [(event.step, event.value) for event in found.Scalars("grid/mean")] == [(2, 2), (4, 4)]


def test_validation_is_on_the_same_records_with_the_same_draws(tmp_path):
    """Its numbers differ by what was learned alone: a state that does not learn has the same."""
    opened, made = [], joint(steps=8, validate_batches=2)
    still = dataclasses.replace(made, optimizer=AdamW(learning_rate=0.0).make(8))

    def batches(split, rows=None):
        opened.append((split, Closing(made.batches(split, rows))))
        return opened[-1][1]

    run(dataclasses.replace(still, batches=batches), tmp_path)
    assert [split for split, _ in opened] == ["train", "validation"]
    assert all(iterator.closed for _, iterator in opened)
    assert opened[1][1].get_state() == {"global_next_index": 0}  # it has nothing to read ahead for
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    validation = [line["validation/loss"] for line in lines if "validation/loss" in line]
    assert len(validation) == 2 and validation[0] == validation[1]
    # training draws anew in every step
    assert len({line["loss"] for line in lines if "loss" in line}) > 1


def test_validation_is_the_mean_over_batches_each_with_draws_of_its_own():
    def measure(count):
        def loss(params, extra, batch, frozen, step, key):
            return batch["x"].mean(), ({"draw": jax.random.uniform(key)}, {})

        stage = dataclasses.replace(joint(validate_batches=count), loss=loss)
        mesh = parallel.make_mesh(devices=jax.devices()[:1])
        state = TrainState(step=0, params={}, opt_state=(), ema=None, extra={}, skipped=None)
        return _Validation(stage, mesh, jax.random.key(0))(state, {})

    first, all_three = measure(1), measure(3)
    batches = joint().batches("validation")
    means = [next(batches)["x"].mean() for _ in range(3)]
    assert all_three["loss"] == pytest.approx(np.mean(means), abs=1e-6)
    assert first["draw"] != all_three["draw"]


def test_a_run_draws_from_its_seed_and_its_name(tmp_path, monkeypatch):
    """Parameters and steps do: the root key of both is watched, and nothing is computed."""
    roots, mesh = [], parallel.make_mesh(devices=jax.devices()[:1])
    _, abstract = compile_step(joint(), mesh)

    def watch(root):
        roots.append(tuple(np.asarray(jax.random.key_data(root)).tolist()))

    def initial(stage, abstract, root, start):
        watch(root)
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)

    def step(state, batch, frozen, root):
        watch(root)
        raise MemoryError("far enough")

    monkeypatch.setattr("dlc_jax.train._initial", initial)
    monkeypatch.setattr("dlc_jax.train.compile_step", lambda stage, mesh: (step, abstract))
    for number, (seed, name) in enumerate([(0, "one"), (1, "one"), (0, "two"), (0, "one")]):
        with pytest.raises(MemoryError):
            train(joint(), tmp_path / str(number), mesh=mesh, seed=seed, name=name)
    assert roots[::2] == roots[1::2]
    assert len(set(roots)) == 3 and roots[-1] == roots[0]


def test_parameters_are_drawn_from_the_key_of_no_step():
    """Parts of a split key are those of `fold_in` with 0, 1, ...: both would draw alike."""
    stage = dataclasses.replace(joint(), init=lambda key: ({}, {"key": jax.random.key_data(key)}))
    _, abstract = compile_step(stage, parallel.make_mesh(devices=jax.devices()[:1]))
    root = jax.random.key(0)
    others = jax.jit(lambda root: jax.vmap(jax.random.fold_in, (None, 0))(root, jnp.arange(100)))(
        root
    )
    used = np.asarray(_initial(stage, abstract, root).extra["key"])
    for other in (jax.random.key_data(root)[None], jax.random.key_data(others)):
        assert not (np.asarray(other) == used).all(1).any()


def test_what_was_opened_is_closed_however_the_run_ends(tmp_path):
    opened = []
    stage = dying(coupled(steps=8), 5)

    def batches(split, rows=None):
        opened.append(Closing(stage.batches(split, rows)))
        return opened[-1]

    with pytest.raises(MemoryError):
        run(dataclasses.replace(stage, batches=batches), tmp_path)
    assert [iterator.closed for iterator in opened] == [True, True]


def test_a_run_writes_the_table_of_its_parameters(tmp_path):
    run(joint(steps=2), tmp_path)
    text = (tmp_path / "parameters.txt").read_text()
    shapes = compile_step(joint(), parallel.make_mesh(devices=jax.devices()[:1]))[1].params
    for path, leaf in jax.tree.leaves_with_path(shapes):
        name, shape = (
            jax.tree_util.keystr(path, simple=True, separator="/"),
            re.escape(str(leaf.shape)),
        )
        assert re.search(
            rf"^\| {name} +\| {shape} +\| {leaf.dtype} \| {leaf.size} +\| \(\) ", text, re.M
        ), text
    assert f"Total: {sum(leaf.size for leaf in jax.tree.leaves(shapes)):,} -- " in text


def test_a_checkpoint_of_before_a_field_goes_on_in_its_present_form(tmp_path):
    stage = coupled(steps=4)
    run(dataclasses.replace(stage, identity={"old": 1}), tmp_path)
    renamed = dataclasses.replace(coupled(steps=6), identity={"new": 1})
    with pytest.raises(UserError, match="of another model or data"):
        run(renamed, tmp_path)
    run(dataclasses.replace(renamed, former=lambda saved: {"new": saved["old"]}), tmp_path)
    assert (tmp_path / "checkpoints" / "6").is_dir()


def test_a_batch_that_the_mesh_does_not_divide_is_refused(tmp_path):
    with pytest.raises(UserError, match="tried.train.batch=8 does not divide by 3"):
        run(coupled(), tmp_path, devices=3)
