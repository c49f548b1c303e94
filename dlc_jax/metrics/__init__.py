"""What a run tells about itself: metrics.jsonl, TensorBoard, W&B, a progress line. Process 0 writes; every process may read `last`.

Metrics are fetched one step late: asking for the numbers of a step just dispatched would make the host wait for the device.

    <directory>/metrics.jsonl    strict JSON; a line every `log_every` steps, each once, also after kills; a line per evaluation
    <directory>/tensorboard/     the same, and pictures; so in W&B, see boards.py
    <directory>/seconds.json     seconds spent up to "step": {"before": in runs before this one, "seconds": in all, "step"}
"""

import contextlib
import json
import math
import os
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dlc_jax.errors import UserError
from dlc_jax.metrics.boards import TensorBoard, Wandb

_REDRAW = 0.2  # seconds between two drawings of the line on a terminal


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
        tensorboard: bool = True,
        wandb: str = "",
        about: Mapping[str, Any] | None = None,
        stream: Any = None,
    ):
        """Opens the files, and drops from metrics.jsonl what a killed run wrote after the step that this one goes on from.

        Args:
          total: steps in all, for the share and the time left.
          name: of the step of the recipe, printed in front.
          batch: examples per step, for images per second; 0 leaves that out.
          first: steps already taken, as restored.
          tensorboard: writes its event files.
          wandb: project of Weights & Biases; "" is none.
          about: the recipe, which W&B shows beside the run.
          stream: where the progress line goes; sys.stdout, looked up now, by default.
        """
        self._directory, self._total, self._log_every, self._name, self._batch = Path(directory), total, log_every, name, batch
        self._stream = sys.stdout if stream is None else stream
        self._in_place = bool(getattr(self._stream, "isatty", lambda: False)())
        self._main = jax.process_index() == 0
        self._first, self._boards, self._file = first, [], None
        self._pending: tuple[int, Any] | None = None  # the newest step, its metrics still on the device
        self._last: dict[str, Any] = {"step": first}
        self._old: dict[str, Any] = {}  # what is already written for step `first`
        self._start, self._before = time.monotonic(), 0.0
        self._mark: tuple[float, int] | None = None  # time and step at which the present window of rates began
        self._waited, self._drawn, self._width = 0.0, 0.0, 0
        if self._main:
            with self._writing():
                self._directory.mkdir(parents=True, exist_ok=True)
                self._before = _seconds(self._directory)
                self._old = _trim(self._directory / "metrics.jsonl", first)
                if tensorboard:
                    self._boards.append(TensorBoard(self._directory, first=first))
                if wandb:
                    self._boards.append(Wandb(self._directory, project=wandb, about=about or {}))
                self._file = open(self._directory / "metrics.jsonl", "a")
                self._note(first)

    def step(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Takes the metrics of the step that was just dispatched; writes and returns those of the step before, as `last`.

        Args:
          step: steps taken, this one included; what the state's counter says after it.
        """
        self._flush()
        self._pending = (step, dict(metrics))
        return self._last

    @property
    def last(self) -> dict[str, Any]:
        """Metrics of the newest step as numbers, with "step". It waits for that step and writes it.

        Read it before saving: a run that is killed after saving must find all of the steps before on file.
        """
        self._flush()
        return self._last

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes what evaluators measured at `step`; what a resumed run measures once more at its first step is dropped."""
        self._flush()
        new = {key: _plain(value) for key, value in values.items() if step != self._first or key not in self._old}
        if new:
            self._write(step, new)
            self._show(step, new)

    def images(self, name: str, array: Any, step: int) -> None:
        """Shows pictures in TensorBoard and W&B: [y, x, c] or [b, y, x, c], tiled; uint8, or floats from 0 to 1."""
        with self._writing():
            for board in self._boards:
                board.image(name, _tiled(np.asarray(array)), step)

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
            if self._in_place and self._width:
                with contextlib.suppress(OSError):
                    self._stream.write("\n")
                    self._stream.flush()
                self._width = 0
            files, self._file, self._boards = [*self._boards, self._file], None, []
            with self._writing(), contextlib.ExitStack() as closing:
                for file in files:
                    if file is not None:
                        closing.callback(file.close)

    def _flush(self) -> None:
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = {key: _plain(value) for key, value in jax.device_get(metrics).items()}  # waits for the device
        now, due = time.monotonic(), step % self._log_every == 0 or step >= self._total
        rates = self._rates(step, now)
        line = values | (rates if due else {})
        self._last = {**line, "step": step}
        if due:
            self._write(step, line)
            self._show(step, line)
            self._note(step)
        if self._main and (due or (self._in_place and now - self._drawn > _REDRAW)):
            self._draw(step, values, rates, now)
        if due or self._mark is None:
            self._mark, self._waited = (now, step), 0.0

    def _rates(self, step: int, now: float) -> dict[str, float]:
        """Over the steps since the last logged one; none for the first step, which compiles."""
        if self._mark is None or step <= self._mark[1]:
            return {}
        span = max(now - self._mark[0], 1e-9)
        pace = span / (step - self._mark[1])
        rates = {"seconds_per_step": pace, "data_wait": min(1.0, self._waited / span)}
        return rates | ({"images_per_second": self._batch / pace} if self._batch else {})

    def _draw(self, step: int, values: Mapping[str, Any], rates: Mapping[str, float], now: float) -> None:
        parts = [f"{self._name} {step}/{self._total} {100 * step / max(self._total, 1):.0f}%"]
        if isinstance(loss := values.get("loss"), float):
            parts.append(f"loss {loss:.4f}")
        elif "loss" in values:
            parts.append("loss not finite")
        if self._batch and rates:
            parts.append(f"{rates['images_per_second']:.0f} images/s")
        if rates:
            pace = rates["seconds_per_step"]
            left = _span(pace * (self._total - step))
            parts += [f"{1000 * pace:.1f} ms/step", f"data {100 * rates['data_wait']:.0f}%", f"ETA {left}"]
        text, self._drawn = "  ".join(parts), now
        if self._in_place:
            with contextlib.suppress(OSError):  # the terminal is gone: a signal says so in a moment, and then all is saved
                self._stream.write("\r" + text + " " * (self._width - len(text)))
                self._stream.flush()
            self._width = len(text)
        else:
            self._stream.write(text + "\n")
            self._stream.flush()

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        if self._main:
            with self._writing():
                self._file.write(json.dumps({"step": step} | dict(values) | {"step": step}, allow_nan=False) + "\n")
                self._file.flush()  # a killed process flushes nothing

    def _show(self, step: int, values: Mapping[str, Any]) -> None:
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        with self._writing():
            for board in self._boards:
                board.scalars(numbers, step)

    def _note(self, step: int) -> None:
        if self._main:
            facts = {"before": self._before, "seconds": self._before + time.monotonic() - self._start, "step": step}
            with self._writing():
                _replace(self._directory / "seconds.json", json.dumps(facts) + "\n")

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except OSError as error:
            raise UserError(f"{self._directory}: {error.strerror}; make room there, then run the same command") from error


def peak_memory_gb() -> float:
    """Largest memory that this process ever held, in 1e9 bytes. Not its children: a fork that only starts git counts as large as its parent."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def device() -> str:
    """What the numbers of this process were computed on, such as "8 x NVIDIA H100"."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def _trim(path: Path, first: int) -> dict[str, Any]:
    """Drops lines of steps after `first`, torn and damaged ones, joins those of one step. Returns what is written of step `first`."""
    if not path.exists():
        return {}
    kept: dict[int, dict] = {}
    text = path.read_text(encoding="utf-8", errors="replace")  # a damaged line is dropped like a torn one
    for line in text.split("\n"):
        try:
            row = json.loads(line)
            step = row["step"]
        except (ValueError, TypeError, KeyError):  # killed while writing
            continue
        if isinstance(step, int) and step <= first:
            kept[step] = kept.get(step, {}) | row
    trimmed = "".join(json.dumps(row) + "\n" for row in kept.values())
    if trimmed != text:
        _replace(path, trimmed)
    return kept.get(first, {})


def _seconds(directory: Path) -> float:
    try:
        return float(json.loads((directory / "seconds.json").read_text())["seconds"])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return 0.0


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _plain(value: Any) -> Any:
    """A number, or a list of numbers, as strict JSON has it: what is not finite is null."""
    value = np.asarray(value).tolist() if hasattr(value, "dtype") else value
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tiled(array: np.ndarray) -> np.ndarray:
    if array.ndim == 3:
        return array
    count, height, width, channels = array.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    tiles = np.zeros((rows * columns, height, width, channels), array.dtype)
    tiles[:count] = array
    return tiles.reshape(rows, columns, height, width, channels).swapaxes(1, 2).reshape(rows * height, columns * width, channels)


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
