"""What a run reports: metrics.jsonl, TensorBoard, W&B, a progress line.

Process 0 writes; every process may read `last`. Metrics are fetched one step late: asking for the
numbers of a step just dispatched would make the host wait for the device.

    <directory>/metrics.jsonl     strict JSON; a line every `log_every` steps, each once, also after
                                  kills; a line per evaluation
    <directory>/tensorboard/      the same, and pictures; so in W&B, see boards.py
    <directory>/seconds.json      seconds spent up to "step": {"before": in runs before this one,
                                  "seconds": in all, "useful": of these in steps that count,
                                  "restarts": runs before this one, "step"}
    <directory>/parameters.txt    the table of the parameters, as the last run placed them
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import platform
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dlc_jax.errors import UserError
from dlc_jax.metrics import files
from dlc_jax.metrics.boards import TensorBoard, Wandb, tiled
from dlc_jax.metrics.progress import Line
from dlc_jax.typing import Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Log:
    """Where metrics are shown beside metrics.jsonl: the `log` section of a recipe.

    Attributes:
      tensorboard: Whether event files of TensorBoard are written.
      wandb: Project of Weights & Biases. "" is none.
    """

    tensorboard: bool = True
    wandb: str = ""


class Writer:
    """Receives every step's metrics as device arrays and writes those of the step before.

    Raises, from every method: UserError if the directory cannot be written.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        total: int,
        log_every: int,
        name: str,
        batch: int = 0,
        first: int = 0,
        about: Mapping[str, Any] | None = None,
        stream: Any = None,
        **log: bool | str,
    ):
        """Opens the files; drops from metrics.jsonl what a killed run wrote after step `first`.

        Args:
          total: steps in all, for the share and the time left.
          name: of the step of the recipe, printed in front.
          batch: examples per step, for images per second; 0 leaves that out.
          first: steps already taken, as restored.
          about: the recipe, which W&B shows beside the run.
          stream: where the progress line goes; sys.stdout, looked up now, by default.
          log: fields of `Log`.
        """
        self._directory, self._total, self._log_every = Path(directory), total, log_every
        self._batch, self._first, self._main = batch, first, jax.process_index() == 0
        self._line = Line(sys.stdout if stream is None else stream, name=name, total=total)
        self._boards, self._file = [], None
        self._pending: tuple[int, Any] | None = None  # the newest step, its metrics on the device
        self._last: dict[str, Any] = {"step": first}
        self._old: dict[str, Any] = {}  # what is already written for step `first`
        self._start, self._before = time.monotonic(), 0.0
        self._useful, self._restarts = 0.0, 0
        self._mark: tuple[float, int] | None = None  # time and step since which rates are taken
        self._waited, shown = 0.0, Log(**log)
        if self._main:
            with self._writing():
                self._directory.mkdir(parents=True, exist_ok=True)
                self._begin(files.noted(self._directory))
                self._old = files.trim(self._directory / "metrics.jsonl", first)
                if shown.tensorboard:
                    self._boards.append(TensorBoard(self._directory, first=first))
                if shown.wandb:
                    board = Wandb(self._directory, project=shown.wandb, about=about or {})
                    self._boards.append(board)
                self._file = open(self._directory / "metrics.jsonl", "a")
                self._note(first)

    def _begin(self, noted: Mapping[str, float]) -> None:
        """Goes on from what the runs before noted; steps that were lost have not been useful."""
        self._before = noted["seconds"]
        self._restarts = 0 if noted["is_first"] else int(noted["restarts"]) + 1
        kept = min(1.0, self._first / noted["step"]) if noted["step"] else 0.0
        self._useful = noted["useful"] * kept

    def step(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Takes the metrics of the step just dispatched; writes and returns those before, `last`.

        Args:
          step: steps taken, this one included; what the state's counter says after it.
        """
        self._flush()
        self._pending = (step, dict(metrics))
        return self._last

    @property
    def last(self) -> dict[str, Any]:
        """Metrics of the newest step as numbers, with "step". It waits for that step and writes it.

        Read it before saving: a run that is killed after saving must find all steps before on file.
        """
        self._flush()
        return self._last

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes what evaluators measured at `step`.

        What a resumed run measures once more at its first step is dropped.
        """
        self._flush()
        old = self._old if step == self._first else {}
        new = {key: files.plain(value) for key, value in values.items() if key not in old}
        if new:
            self._write(step, new)
            self._show(step, new)

    def images(self, name: str, array: Any, step: int) -> None:
        """Shows pictures in TensorBoard and W&B.

        Args:
          array: [y, x, c] or [b, y, x, c], tiled; uint8, or floats from 0 to 1.
        """
        with self._writing():
            for board in self._boards:
                board.image(name, tiled(np.asarray(array)), step)

    def parameters(self, params: Tree) -> None:
        """Writes the table of the parameters: name, shape, dtype, size and placement.

        Args:
          params: nested dict of arrays, or of jax.ShapeDtypeStruct with shardings.
        """
        if self._main:
            from clu import parameter_overview  # and flax: what trains nothing need not load it

            table = parameter_overview.get_parameter_overview(params, include_stats="sharding")
            with self._writing():
                files.replace(self._directory / "parameters.txt", table + "\n")

    @contextlib.contextmanager
    def waiting(self):
        """Times what the loop waits for data."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._waited += time.monotonic() - start

    @contextlib.contextmanager
    def paused(self):
        """Keeps what is done meanwhile, such as evaluations, out of the rates."""
        self._flush()
        start = time.monotonic()
        try:
            yield
        finally:
            if self._mark is not None:
                self._mark = (self._mark[0] + time.monotonic() - start, self._mark[1])

    def close(self) -> None:
        """Writes the newest step and closes the files."""
        try:
            self._flush()
            self._note(self._last["step"])
        finally:
            self._line.close()
            opened, self._file, self._boards = [*self._boards, self._file], None, []
            with self._writing(), contextlib.ExitStack() as closing:
                for file in opened:
                    if file is not None:
                        closing.callback(file.close)

    def _flush(self) -> None:
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        fetched = jax.device_get(metrics)  # waits for the device
        values = {key: files.plain(value) for key, value in fetched.items()}
        now, due = time.monotonic(), step % self._log_every == 0 or step >= self._total
        rates = self._rates(step, now)
        line = values | (rates if due else {})
        self._last = {**line, "step": step}
        if due:
            self._useful += (now - self._mark[0]) if rates else 0.0
            self._write(step, line)
            self._show(step, line)
            self._note(step)
        if self._main and (due or self._line.is_stale(now)):
            self._line.draw(step, values, rates, now)
        if due or self._mark is None:
            self._mark, self._waited = (now, step), 0.0

    def _rates(self, step: int, now: float) -> dict[str, float]:
        """Over the steps since the last logged one; none for the first step, which compiles."""
        if self._mark is None or step <= self._mark[1]:
            return {}
        span = max(now - self._mark[0], 1e-9)
        pace = span / (step - self._mark[1])
        rates = {"seconds_per_step": pace, "data_wait": min(1.0, self._waited / span)}
        rates |= {"goodput": (self._useful + span) / self._seconds(), "restarts": self._restarts}
        return rates | ({"images_per_second": self._batch / pace} if self._batch else {})

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        if self._main:
            row = {"step": step} | dict(values) | {"step": step}
            with self._writing():
                self._file.write(json.dumps(row, allow_nan=False) + "\n")
                self._file.flush()  # a killed process flushes nothing

    def _show(self, step: int, values: Mapping[str, Any]) -> None:
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        with self._writing():
            for board in self._boards:
                board.scalars(numbers, step)

    def _seconds(self) -> float:
        """Spent in this step of the recipe so far, over all runs."""
        return self._before + time.monotonic() - self._start

    def _note(self, step: int) -> None:
        if self._main:
            facts = {"before": self._before, "seconds": self._seconds(), "step": step}
            facts |= {"useful": self._useful, "restarts": self._restarts}
            with self._writing():
                files.replace(self._directory / "seconds.json", json.dumps(facts) + "\n")

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._directory}: {error.strerror}; make room there, then run the same command"
            ) from error


def peak_memory_gb() -> float:
    """Largest memory that this process ever held, in 1e9 bytes.

    Not its children: a fork that only starts git counts as large as its parent.
    """
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide what is computed, by name."""
    names = ("jax", "jaxlib", "libtpu", "numpy", "flax", "optax", "orbax-checkpoint", "grain")
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def device() -> str:
    """What the numbers of this process were computed on, such as "8 x NVIDIA H100"."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"
