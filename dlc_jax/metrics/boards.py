"""Where curves and pictures are shown beside metrics.jsonl: TensorBoard, and Weights & Biases. Both take scalars and pictures by step.

TensorBoard is written without tensorflow and is on by default; W&B is on when a project is named, and comes with the extra `tracking`.
With WANDB_MODE=offline it needs no network: `wandb sync` sends a run later.
"""

import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dlc_jax.errors import UserError


class TensorBoard:
    """Event files under <directory>/tensorboard; what a killed run wrote after step `first` is hidden.

    They are written by the caller's thread: tensorboardX's own writer has one that a full disk ends, and then waits for it for ever.
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
        from tensorboardX.event_file_writer import EventsWriter  # half a second that a short job need not pay
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        if self._file is None:
            self._directory.mkdir(exist_ok=True)
            # Two runs that start in one second must not write into one file.
            self._file = EventsWriter(str(self._directory / "events"), filename_suffix=f".{os.getpid()}.{self._first}")
            start = SessionLog(status=SessionLog.START)
            self._file.write_event(Event(wall_time=time.time(), step=self._first + 1, session_log=start))
        for entry in summaries:
            self._file.write_event(Event(wall_time=time.time(), step=step, summary=entry))
        self._file.flush()


class Wandb:
    """A run of Weights & Biases, the same one whenever the directory's training goes on.

    Raises:
      UserError: it is not installed, or refuses to start.
    """

    def __init__(self, directory: Path, *, project: str, about: Mapping[str, Any]):
        """Starts the run, named after the last two parts of `directory`; `about` is shown as its config."""
        try:
            import wandb
        except ImportError:
            raise UserError(
                f"log.wandb={project!r}: Weights & Biases is not installed; pip install -e '.[tracking]', or set log.wandb to ''"
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
                f"log.wandb={project!r}: {reason}; run `wandb login`, set WANDB_MODE=offline, or set log.wandb to ''"
            ) from error
        self._picture = wandb.Image

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        self._run.log({name: self._picture(pixels)}, step=step)

    def close(self) -> None:
        self._run.finish()
