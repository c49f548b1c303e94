"""Where curves and pictures are shown beside metrics.jsonl: TensorBoard, and Weights & Biases.

Both take scalars and pictures [y, x, c] by step.
TensorBoard is written without tensorflow and is on by default; W&B is on when a project is named,
and comes with the extra `tracking`. With WANDB_MODE=offline it needs no network: `wandb sync` sends
a run later.
"""

import math
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dlc_jax.errors import UserError


class TensorBoard:
    """Event files under <directory>/tensorboard; what a killed run wrote after `first` is hidden.

    The caller's thread writes them: tensorboardX's own writer has one that a full disk ends, and
    then waits for it for ever.
    """

    def __init__(self, directory: Path, *, first: int):
        self._directory, self._first, self._file = directory / "tensorboard", first, None

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        from tensorboardX import summary

        self._write(step, [summary.scalar(key, value) for key, value in values.items()])

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        from tensorboardX import summary

        self._write(step, [summary.image(name, pixels, dataformats="HWC")])

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, step: int, summaries) -> None:
        # Half a second that a short job need not pay.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        if self._file is None:
            self._directory.mkdir(exist_ok=True)
            # Two runs that start in one second must not write into one file.
            suffix = f".{os.getpid()}.{self._first}"
            self._file = EventsWriter(str(self._directory / "events"), filename_suffix=suffix)
            start = SessionLog(status=SessionLog.START)
            opened = Event(wall_time=time.time(), step=self._first + 1, session_log=start)
            self._file.write_event(opened)
        for entry in summaries:
            self._file.write_event(Event(wall_time=time.time(), step=step, summary=entry))
        self._file.flush()


class Wandb:
    """A run of Weights & Biases, the same one whenever the directory's training goes on.

    Raises:
      UserError: it is not installed, or refuses to start.
    """

    def __init__(self, directory: Path, *, project: str, about: Mapping[str, Any]):
        """Starts the run, named after the end of `directory`; `about` is shown as its config."""
        try:
            import wandb
        except ImportError:
            raise UserError(
                f"log.wandb={project!r}: Weights & Biases is not installed; "
                "pip install -e '.[tracking]', or set log.wandb to ''"
            ) from None
        path = directory.absolute()
        note = path / "wandb" / "id"
        note.parent.mkdir(exist_ok=True)
        if not note.exists():
            note.write_text(secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project=project,
                id=note.read_text().strip(),
                name=f"{path.parent.name}/{path.name}",
                group=path.parent.name,
                dir=str(path),
                config=dict(about),
                resume="allow",
            )
        except Exception as error:  # not logged in, no network: its own types, which change
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            raise UserError(
                f"log.wandb={project!r}: {reason}; run `wandb login`, set WANDB_MODE=offline, or "
                "set log.wandb to ''"
            ) from error
        self._picture = wandb.Image

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        self._run.log({name: self._picture(pixels)}, step=step)

    def close(self) -> None:
        self._run.finish()


def tiled(array: np.ndarray) -> np.ndarray:
    """One picture [y, x, c] of several [b, y, x, c], row by row, about as many rows as columns."""
    if array.ndim == 3:
        return array
    count, height, width, channels = array.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    tiles = np.zeros((rows * columns, height, width, channels), array.dtype)
    tiles[:count] = array
    grid = tiles.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return grid.reshape(rows * height, columns * width, channels)
