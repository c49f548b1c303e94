"""The one loop. It restores, evaluates, saves, fetches a batch, steps and logs; it knows no model and no loss."""

import dataclasses
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dlc_jax import parallel
from dlc_jax.checkpoint import Checkpoints, warm_start
from dlc_jax.errors import Interrupted, UserError
from dlc_jax.metrics import Writer
from dlc_jax.stage import Stage
from dlc_jax.step import TrainState, make_init, make_train_step, make_validation_step
from dlc_jax.stop import Loop


def compile_step(stage: Stage, mesh):
    """The jitted step with its placements, and the abstract state: what `train` runs and what planning lowers."""
    plan = stage.plan
    shapes = jax.eval_shape(make_init(stage), jax.random.key(0))
    placed = parallel.shardings(shapes, mesh, rules=stage.rules)
    step = make_train_step(
        stage,
        accumulate=plan.accumulate,
        shares=parallel.shares(mesh),
        clip=plan.clip,
        clip_apart=plan.clip_apart,
        dtype=plan.dtype,
        placed=placed.params,
    )
    frozen = parallel.shardings(stage.frozen_spec, mesh, rules=stage.rules, strict=False)
    one = parallel.replicated(mesh)
    jitted = jax.jit(
        step,
        in_shardings=(placed, parallel.batch_shardings(stage.batch_spec, mesh), frozen, one),
        out_shardings=(placed, one),
        donate_argnums=0,
    )
    return jitted, parallel.abstract(shapes, placed)


def abstract_state(stage: Stage, mesh) -> TrainState:
    """The state's shapes and placements."""
    return compile_step(stage, mesh)[1]


def lower(stage: Stage, mesh):
    """The step lowered from shapes alone: no data, no checkpoint."""
    step, abstract = compile_step(stage, mesh)
    with jax.set_mesh(mesh):
        return step.lower(abstract, dict(stage.batch_spec), stage.frozen_spec, jax.eval_shape(lambda: jax.random.key(0)))


def train(stage: Stage, directory: str | Path, *, mesh, seed: int, name: str, log: Mapping[str, Any] | None = None) -> dict:
    """Trains a stage to `stage.plan.steps`, from the newest good checkpoint under `directory` if there is one.

    Returns:
      Results of the last step: final losses and evaluators' metrics, floats by name.

    Raises:
      UserError: damaged or foreign checkpoints, a batch that the mesh does not divide, `patience` non-finite steps in a row.
      Interrupted: asked to stop, see stop.py; everything is saved.
    """
    directory, plan = Path(directory), stage.plan
    parallel.check_batch(plan.batch, mesh, accumulate=plan.accumulate, group=stage.group, where=f"{name}.train")
    checkpoints = Checkpoints(directory / "checkpoints", keep=plan.keep)
    jitted, abstract = compile_step(stage, mesh)
    root = jax.device_put(
        jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()) & 0x7FFFFFFF), parallel.replicated(mesh)
    )
    iterator = stage.batches("train")
    with jax.set_mesh(mesh), Loop() as loop:
        restored = checkpoints.restore(abstract, iterator, stage.identity)
        if restored is None:
            state, first = _initial(stage, abstract, root), 0
        else:
            state, first, _ = restored
        frozen = stage.load_frozen(mesh)
        validate = _validation(stage, mesh, root)
        writer = Writer(
            directory, total=plan.steps, log_every=plan.log_every, name=name, batch=plan.batch, first=first, **(log or {})
        )
        measured: dict[str, float] = {}
        try:
            for step in range(first, plan.steps + 1):
                # The order below is what makes a resumed run the same run; do not change it.
                # 1. Evaluate: what is measured at a step belongs to the state that is saved at that step.
                last = step == plan.steps
                found = {}
                if last or (step > first and step % plan.validate_every == 0):
                    with writer.paused():
                        found |= {f"validation/{key}": value for key, value in validate(state, frozen).items()}
                for evaluator in stage.evals:
                    if last or (evaluator.every and step > first and step % evaluator.every == 0):
                        with writer.paused():
                            values = evaluator.run(state, frozen, mesh, directory)
                        for key, value in values.items():
                            if isinstance(value, np.ndarray):
                                writer.images(f"{evaluator.name}/{key}", value, step)
                            else:
                                found[f"{evaluator.name}/{key}"] = value
                if found:
                    writer.scalars(step, found)
                    measured |= found
                # 2. Save, before a batch is fetched: the iterator then stands where the saved state will go on.
                due = last or loop.asked or step % plan.save_every == 0
                if due and (step > first or restored is None):
                    _check(writer.last, plan.patience, name, checkpoints)  # `last` puts every step up to here on file
                    checkpoints.save(step, state, iterator, {"identity": dict(stage.identity)})
                if last:
                    break
                if loop.asked:
                    checkpoints.wait()
                    raise Interrupted(f"{name}: stopped at step {step} of {plan.steps}, saved; the same command goes on")
                # 3. Fetch, 4. step.
                with writer.waiting():
                    batch = next(iterator)
                state, metrics = jitted(state, parallel.to_global(batch, mesh), frozen, root)
                loop.hold()  # this step is not saved; what was before it is
                # 5. Write the metrics of the step before; reading this one's would wait for it.
                _check(writer.step(step + 1, metrics), plan.patience, name, checkpoints)
            checkpoints.wait()
        finally:
            try:
                writer.close()
            finally:
                checkpoints.close()
    return {**measured, "skipped_steps": int(state.skipped[0])}


def _initial(stage: Stage, abstract: TrainState, root) -> TrainState:
    placed = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    state = jax.jit(make_init(stage), out_shardings=placed)(jax.random.fold_in(root, 2**31 - 1))
    plan = stage.plan
    if not plan.init_from:
        return state
    params = warm_start(plan.init_from, state.params, new=plan.init_new)
    # The average starts where the parameters start; a copy, because both are donated.
    ema = None if state.ema is None else jax.tree.map(lambda leaf: leaf.copy(), params)
    return dataclasses.replace(state, params=params, ema=ema)


def _validation(stage: Stage, mesh, root):
    """(state, frozen) -> mean metrics over the first batches of the validation split: always the same records, the same draws."""
    step = jax.jit(make_validation_step(stage, dtype=stage.plan.dtype))

    def validate(state, frozen):
        iterator = stage.batches("validation")
        found = []
        for number in range(stage.plan.validate_batches):
            batch = parallel.to_global(next(iterator), mesh)
            found.append(step(state, batch, frozen, jax.random.fold_in(root, 2**31 - 2 - number)))
        return jax.tree.map(lambda *values: float(np.mean(values)), *jax.device_get(found))

    return validate


def _check(metrics: Mapping[str, Any], patience: int, name: str, checkpoints: Checkpoints) -> None:
    """Stops a run whose loss stays non-finite: its state is still the last good one, so what is saved is good."""
    in_a_row = int(metrics.get("skipped_in_a_row", 0))
    if in_a_row >= patience:
        checkpoints.wait()
        step = int(metrics["step"])
        raise UserError(
            f"{name}: the loss was not finite for {in_a_row} steps in a row; the last good step is {step - in_a_row}, the newest "
            f"checkpoint is of step {checkpoints.latest()}; lower optimizer.learning_rate or set train.clip, then run the same command"
        )
