"""The contracts. A recipe is a list of steps, each a Stage (trained) or a Job (run once).

A new method is a new one of these. Nothing here computes: `train.py` drives a Stage, `main.py` runs
a Job, and neither knows a model or a loss.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dlc_jax.errors import UserError

Tree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How a stage is trained: the `train` section of a recipe.

    Attributes:
      steps: optimizer steps in all.
      batch: global batch, examples per step.
      accumulate: microbatches per step.
      clip: largest gradient norm; 0 never clips.
      clip_separately: regular expressions of parameters, each clipped by itself. All others are
        clipped together.
      dtype: of the computation, "float32" or "bfloat16".
      log_every: steps between two lines of the log.
      save_every: steps between two checkpoints; 0 is a quarter of `steps`. The last step is always
        saved.
      validate_every: steps between two validations; 0 is a quarter of `steps`. The last step is
        always validated.
      validate_batches: batches of the fixed validation split.
      keep: newest checkpoints kept, at least 2.
      keep_period: steps between two checkpoints that are saved and kept for ever; 0 is none.
      keep_best: metric whose best checkpoint is kept too, such as "validation/loss" (smallest); "-"
        before it, as in "-monitor/probe/shape", keeps the largest; "" is none.
      patience: non-finite steps in a row after which the run stops.
      init_from: directory of a trained step to start from (its average if it has one), or of an
        exported run; "" starts afresh.
      init_new: regular expressions of parameters that `init_from` may lack.
    """

    steps: int = 1000
    batch: int = 256
    accumulate: int = 1
    clip: float = 0.0
    clip_separately: tuple[str, ...] = ()
    dtype: str = "float32"
    log_every: int = 50
    save_every: int = 0
    validate_every: int = 0
    validate_batches: int = 8
    keep: int = 2
    keep_period: int = 0
    keep_best: str = ""
    patience: int = 10
    init_from: str = ""
    init_new: tuple[str, ...] = ()

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"train.dtype={self.dtype!r} is unknown; known: float32, bfloat16")
        for name in ("save_every", "validate_every"):
            if getattr(self, name) == 0:
                object.__setattr__(self, name, max(1, self.steps // 4))
        positive = "steps batch accumulate log_every save_every validate_every patience".split()
        for name in positive:
            if getattr(self, name) < 1:
                raise UserError(f"train.{name}={getattr(self, name)} must be at least 1")
        if self.keep_period < 0:
            raise UserError(f"train.keep_period={self.keep_period} must be at least 0")

    @property
    def retention(self) -> dict[str, Any]:
        """Which checkpoints stay, as `Checkpoints` takes it."""
        return {name: getattr(self, name) for name in ("keep", "keep_period", "keep_best")}

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due at a step that is not the last."""
        return step % self.save_every == 0 or (
            self.keep_period > 0 and step % self.keep_period == 0
        )


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Something measured every `every` steps, and at the last one.

    Attributes:
      name: prefix of its metrics.
      every: steps between two runs; 0 runs it at the last step only.
      run: (state, frozen, mesh, directory) -> {metric: float, or a picture: uint8 [y, x, 3]}.
        Pictures go to TensorBoard and W&B; what the report shall show is written to
        `directory`/pictures.
    """

    name: str
    every: int
    run: Callable[..., Mapping[str, Any]]


def _unchanged_batch(params, ema, extra, batch, frozen, step, key):
    return batch


def _unchanged_extra(extra, params, aux, step):
    return extra


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A trained step. What has a default here most stages leave as it is.

    Attributes:
      init: (key) -> (params, extra). `extra` is any other state: a center, a queue.
      loss: (params, extra, batch, frozen, step, key) -> (loss, (metrics, aux)). Runs per
        microbatch; loss, metrics and aux are means.
      validation_loss: what is validated instead of `loss`, of the same form: without dropout.
      batch_spec: abstract GLOBAL batch, a dict of jax.ShapeDtypeStruct. `position`, int32 [b], is
        each record's place in the global step. Random draws are folded with it, so they do not
        depend on devices, processes or accumulation.
      batches: (split, rows) -> checkpointable iterator of HOST-LOCAL numpy batches with `position`;
        splits: "train", "validation". `rows` names the rows of the global batch that this process
        reads, see `parallel.rows`; None are all.
      optimizer: optim.Optimizer.
      plan: how long and how it is trained.
      prepare: (params, ema, extra, batch, frozen, step, key) -> batch. Runs once on the GLOBAL
        batch, before it is split for accumulation, without gradient: teachers, Sinkhorn, anything
        coupled across the batch.
      after_update: (extra, params, aux, step) -> extra, with the new parameters and aux averaged
        over microbatches.
      ema_decay: (step) -> decay of the average of the parameters; None keeps no average. DINO's
        teacher is this average.
      frozen_spec: abstract tree of what `load_frozen` returns.
      load_frozen: (mesh) -> parameters of upstream networks: an argument of the step, never closed
        over, never donated.
      rules: how parameters are split that `parallel` would not split so by size alone: (regular
        expression over the path, axis, mesh axis). Each must match.
      tables: regular expressions of the whole names of tables of rows that many positions read, as
        in code_table/table, and of single rows such as mask tokens. They stay float32 where the
        rest is cast to `train.dtype`; the model casts what it reads. A row's gradient is a sum over
        all that read it, added one by one: of thousands of bfloat16 numbers most is lost. Each must
        match.
      evals: what to measure on the way.
      group: examples in a row that belong together and must stay so in a microbatch.
      flops: model FLOPs of one optimizer step over the global batch: forward and twice that for
        backward of what is trained, forward alone of teachers. Recomputation (remat) is left out;
        what else is, is said beside each model.
      identity: what must not change under a checkpoint: the parts of the config that define model
        and data.
      former: a checkpoint's identity -> the same with the names and fields of this version.
      reads: () -> what must not change either, of what is read from disk: the content of data and
        code stores. Asked when the stage is about to be trained, so that planning needs no files.
    """

    init: Callable
    loss: Callable
    batch_spec: Mapping[str, Any]
    batches: Callable
    optimizer: Any
    plan: Plan
    prepare: Callable = _unchanged_batch
    validation_loss: Callable | None = None
    after_update: Callable = _unchanged_extra
    ema_decay: Callable | None = None
    frozen_spec: Tree = dataclasses.field(default_factory=dict)
    load_frozen: Callable = lambda mesh: {}
    rules: tuple[tuple[str, int, str], ...] = ()
    tables: tuple[str, ...] = ()
    evals: tuple[Evaluator, ...] = ()
    group: int = 1
    flops: float = 0.0
    identity: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    former: Callable[[Mapping], Mapping] = lambda saved: saved
    reads: Callable[[], Mapping[str, Any]] = dict


@dataclasses.dataclass(frozen=True)
class Program:
    """A computation that can be compiled without being run: what planning asks for.

    Attributes:
      lower: (mesh) -> jax.stages.Lowered, from abstract shapes.
      state: (mesh) -> what stays on the devices between calls: tree of jax.ShapeDtypeStruct with
        shardings.
      flops: model FLOPs of one call, all devices together.
      batch: examples of one call.
    """

    lower: Callable
    state: Callable
    flops: float
    batch: int


@dataclasses.dataclass(frozen=True)
class Job:
    """A step that is run, not trained: code export, sampling, probing, a report.

    Attributes:
      run: (mesh, directory) -> {result: value} for results.json; resumable by shard: what is
        complete is not done again.
      programs: its large computations by name.
      settings: fields of its section that may change in a workdir; the job is run again then.
      is_intact: (directory) -> whether what a complete job left there is still there; if not, it is
        run again. Every process asks at every start, so it must be quick.
    """

    run: Callable[..., Mapping[str, Any]]
    programs: Mapping[str, Program] = dataclasses.field(default_factory=dict)
    settings: tuple[str, ...] = ()
    is_intact: Callable[[Path], bool] = lambda directory: True
