"""The one loop: it restores, evaluates, saves, fetches a batch, steps and logs.

It knows no model and no loss.
"""

import contextlib
import dataclasses
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dlc_jax import metrics, parallel, stop
from dlc_jax.checkpoint import Checkpoints, warm_start
from dlc_jax.errors import Interrupted, UserError
from dlc_jax.hosts.likeness import check_alike
from dlc_jax.stage import Stage
from dlc_jax.step import TrainState, make_init, make_train_step, make_validation_step


def compile_step(stage: Stage, mesh):
    """(jitted step with its placements, abstract state): what `train` runs and planning lowers."""
    plan = stage.plan
    shapes = jax.eval_shape(make_init(stage), jax.random.key(0))
    placements = parallel.shardings(shapes, mesh, rules=stage.rules)
    step = make_train_step(
        stage,
        accumulate=plan.accumulate,
        shares=parallel.shares(mesh),
        clip=plan.clip,
        clip_separately=plan.clip_separately,
        dtype=plan.dtype,
        shardings=placements.params,
    )
    frozen = parallel.shardings(stage.frozen_spec, mesh, rules=stage.rules, strict=False)
    one = parallel.replicated(mesh)
    jitted = jax.jit(
        step,
        in_shardings=(placements, parallel.batch_shardings(stage.batch_spec, mesh), frozen, one),
        out_shardings=(placements, one),
        donate_argnums=0,
    )
    return jitted, parallel.abstract(shapes, placements)


def abstract_state(stage: Stage, mesh) -> TrainState:
    """The state's shapes and placements."""
    return compile_step(stage, mesh)[1]


def lower(stage: Stage, mesh):
    """The step lowered from shapes alone: no data, no checkpoint."""
    step, abstract = compile_step(stage, mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.set_mesh(mesh):
        return step.lower(abstract, dict(stage.batch_spec), stage.frozen_spec, key)


def train(
    stage: Stage,
    directory: str | Path,
    *,
    mesh,
    seed: int,
    name: str,
    log: Mapping[str, Any] | None = None,
    start: Callable = warm_start,
) -> dict:
    """Trains a stage to `stage.plan.steps`, from the newest good checkpoint in `directory`, if any.

    Args:
      log: the `log` section of the recipe, see `metrics.Log`, and "about".
      start: reads what `plan.init_from` names, as `checkpoint.warm_start` does.

    Returns:
      Results of the last step: final losses and evaluators' metrics, floats by name.

    Raises:
      UserError: damaged or foreign checkpoints, a batch that the mesh does not divide, `patience`
        non-finite steps in a row.
      Interrupted: asked to stop, see stop.py; everything is saved.
    """
    directory, plan = Path(directory), stage.plan
    parallel.check_batch(
        plan.batch, mesh, accumulate=plan.accumulate, group=stage.group, where=f"{name}.train"
    )
    checkpoints = Checkpoints(directory / "checkpoints", **plan.retention)
    jitted, abstract = compile_step(stage, mesh)
    root = _root(seed, name, mesh)
    check_alike(f"data or model of {name}", stage.identity)
    with jax.set_mesh(mesh), stop.Loop() as loop, contextlib.ExitStack() as closing:
        closing.callback(checkpoints.close)
        iterator = stage.batches("train", parallel.rows(mesh, plan.batch))
        closing.callback(_close, iterator)
        restored = checkpoints.restore(abstract, iterator, stage.identity, former=stage.former)
        state, first, meta = restored or (_initial(stage, abstract, root, start), 0, {})
        frozen = stage.load_frozen(mesh)
        shown = {"total": plan.steps, "log_every": plan.log_every, "batch": plan.batch}
        writer = metrics.Writer(directory, name=name, first=first, **shown, **(log or {}))
        closing.callback(writer.close)
        writer.parameters(abstract.params)
        owed = first if meta.get("unmeasured") else None
        evaluate = _Evaluation(stage, mesh, directory, root, writer, first, owed)
        closing.callback(evaluate.close)
        for step in range(first, plan.steps + 1):
            checkpoints.check()  # of a save that failed since, nobody should train on
            # The order below is what makes a resumed run the same run; do not change it.
            # 1. Evaluate: what is measured at a step belongs to the state saved at that step. A run
            # that is asked to stop meanwhile saves, and measures when it goes on.
            is_measured = evaluate(step, state, frozen)
            asked = not is_measured or loop.reached()
            # 2. Save before a batch is fetched: the iterator stands where the saved state goes on.
            last = step == plan.steps
            due = last or asked or plan.saves(step)
            if due and (step > first or restored is None):
                # `last` puts every step up to here on file
                _check(writer.last, plan.patience, name, checkpoints)
                meta = {"identity": dict(stage.identity), "unmeasured": not is_measured}
                checkpoints.save(step, state, iterator, meta, metrics=evaluate.now)
            if last and is_measured:
                break
            if asked:
                checkpoints.wait()
                raise Interrupted(
                    f"{name}: stopped at step {step} of {plan.steps}, saved; the same command "
                    "goes on"
                )
            # 3. Fetch, 4. step.
            with writer.waiting():
                batch = next(iterator)
            batch = parallel.to_global(batch, mesh, plan.batch)
            state, values = jitted(state, batch, frozen, root)
            loop.hold()  # this step is not saved; what was before it is
            # 5. Write the metrics of the step before; reading this one's would wait for it.
            _check(writer.step(step + 1, values), plan.patience, name, checkpoints)
        checkpoints.wait()
    return {**evaluate.measured, "skipped_steps": int(state.skipped[0])}


def _root(seed: int, name: str, mesh):
    """The key of a step of the recipe, on all devices."""
    number = zlib.crc32(name.encode()) & 0x7FFFFFFF
    key = jax.random.fold_in(jax.random.key(seed), number)
    return parallel.spread(key, parallel.replicated(mesh))


def _initial(stage: Stage, abstract: TrainState, root, start=warm_start) -> TrainState:
    placements = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    init = jax.jit(make_init(stage), out_shardings=placements)
    # Where it does not fit, the error must come here: saving such a state would wait for ever.
    state = jax.block_until_ready(init(jax.random.fold_in(root, 2**31 - 1)))
    plan = stage.plan
    if not plan.init_from:
        return state
    params = start(plan.init_from, state.params, new=plan.init_new)
    # The average starts where the parameters start; a copy, because both are donated.
    ema = None if state.ema is None else jax.tree.map(lambda leaf: leaf.copy(), params)
    return dataclasses.replace(state, params=params, ema=ema)


class _Evaluation:
    """What is measured on the way: validation and the stage's evaluators, each at its cadence."""

    def __init__(
        self, stage: Stage, mesh, directory: Path, root, writer: metrics.Writer, first, owed
    ):
        self._stage, self._mesh, self._directory = stage, mesh, directory
        self._writer, self._first, self._owed = writer, first, owed
        self._validation = _Validation(stage, mesh, root)
        self.measured: dict[str, float] = {}  # the newest of each
        self.now: dict[str, float] = {}  # of this step

    def __call__(self, step: int, state: TrainState, frozen) -> bool:
        """Whether all that is due at a step was measured: not if the run is asked to stop."""
        self.now = {}
        try:
            with stop.measuring():
                self.now = self._measure(step, state, frozen)
        except stop.Asked:
            return False
        if self.now:
            self._writer.scalars(step, self.now)
            self.measured |= self.now
        return True

    def _measure(self, step: int, state: TrainState, frozen) -> dict[str, float]:
        measured = {}
        if self._due(step, self._stage.plan.validate_every):
            with self._writer.paused():
                values = self._validation(state, frozen)
            measured |= {f"validation/{key}": value for key, value in values.items()}
        for evaluator in self._stage.evals:
            if self._due(step, evaluator.every):
                with self._writer.paused():
                    values = evaluator.run(state, frozen, self._mesh, self._directory)
                for key, value in values.items():
                    if isinstance(value, np.ndarray):
                        self._writer.images(f"{evaluator.name}/{key}", value, step)
                    else:
                        measured[f"{evaluator.name}/{key}"] = value
        return measured

    def close(self) -> None:
        self._validation.close()

    def _due(self, step: int, every: int) -> bool:
        fresh = step > self._first or step == self._owed
        now = every > 0 and fresh and step % every == 0
        return now or step == self._stage.plan.steps


class _Validation:
    """(state, frozen) -> mean metrics over the first batches of the validation split.

    Always the same records with the same draws: the source is opened once and rewound.
    """

    def __init__(self, stage: Stage, mesh, root):
        self._stage, self._mesh, self._root = stage, mesh, root
        step, one = make_validation_step(stage, dtype=stage.plan.dtype), parallel.replicated(mesh)
        self._step = jax.jit(step, out_shardings=one)
        self._iterator, self._start = None, None

    def __call__(self, state: TrainState, frozen) -> dict[str, float]:
        if self._iterator is None:
            rows = parallel.rows(self._mesh, self._stage.plan.batch)
            self._iterator = self._stage.batches("validation", rows)
            self._start = self._iterator.get_state()
        results = []
        for number in range(self._stage.plan.validate_batches):
            stop.breathe()
            batch = parallel.to_global(next(self._iterator), self._mesh, self._stage.plan.batch)
            key = jax.random.fold_in(self._root, 2**31 - 2 - number)
            results.append(self._step(state, batch, frozen, key))
        self._iterator.set_state(self._start)  # now: what it read ahead is of no use
        return jax.tree.map(lambda *values: float(np.mean(values)), *jax.device_get(results))

    def close(self) -> None:
        _close(self._iterator)


def _close(iterator) -> None:
    """Stops the threads of an iterator that has some."""
    if hasattr(iterator, "close"):
        iterator.close()


def _check(last: Mapping[str, Any], patience: int, name: str, checkpoints: Checkpoints) -> None:
    """Stops a run whose loss stays non-finite: its state is the last good one, saved or not."""
    in_a_row = int(last.get("skipped_in_a_row", 0))
    if in_a_row >= patience:
        checkpoints.wait()
        step = int(last["step"])
        raise UserError(
            f"{name}: the loss was not finite for {in_a_row} steps in a row; the last good step is "
            f"{step - in_a_row}, the newest checkpoint is of step {checkpoints.latest()}; lower "
            "optimizer.learning_rate or set train.clip, then run the same command"
        )
