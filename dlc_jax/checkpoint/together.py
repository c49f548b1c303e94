"""One save in several processes: what fails in one of them fails in all of them."""

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from dlc_jax import remote
from dlc_jax.hosts.agreement import gather


class Elsewhere(Exception):
    """Another process has failed; `Together.failures` says which and why."""


class Together:
    """The meetings of one save, in the order in which they come.

    Whoever fails says so at the next meeting, where the others wait or will arrive. After that
    nobody meets again. So no process stays in a barrier that another one will never reach.
    """

    def __init__(self, name: str, step: Path, gathered: Callable[[str, Any], list] = gather):
        """
        Args:
          name: of one save at a time; the meetings of the save after follow on.
          step: folder that is being made.
        """
        self._name, self._step, self._gather = name, step, gathered
        self._exchanged: set[Path] = set()
        self.failures: dict[int, list] = {}  # {process: what it said of its failure}

    def __call__(self, value: Any = None) -> list:
        """The value of every process, JSON, in their order.

        Raises:
          Elsewhere: another process has failed.
          Interrupted: one of them has ended.
        """
        return self._meet([None, value])

    def begin(self, items: Iterable[str]) -> None:
        """Makes the folder of each item that Orbax's other processes wait for without a meeting."""
        if remote.is_copy(self._step) and jax.process_index() > 0:
            shutil.rmtree(self._step, ignore_errors=True)  # one that process 0 has moved aside
            for item in items:
                inner = f"{item}.orbax-checkpoint-tmp/array_metadatas"
                path = self._step.with_name(f"{self._step.name}.orbax-checkpoint-tmp") / inner
                path.mkdir(parents=True, exist_ok=True)

    def barrier(self, *, key: str, timeout_ms: int) -> None:
        """What Orbax calls where its background writes meet; its time-out does not count.

        It takes the folder for one that all processes see. Of an object store's each has a copy. So
        process 0 has, after each meeting, what the others have written, and they have its folders.
        """
        if not remote.is_copy(self._step):
            self()
            return
        first, folders = jax.process_index() == 0, []
        for path in self._unfinished():
            self._exchanged.add(path)
            folders += [str(each.relative_to(path.parent)) for each in (path, *path.rglob("*/"))]
            if not first:
                remote.send(path)
        folders = self(folders)[0]
        for path in self._unfinished() if first and jax.process_count() > 1 else ():
            remote.fetch(path, whole=True)
        for name in folders if not first else ():
            (self._step.parent / name).mkdir(parents=True, exist_ok=True)

    def clear(self) -> None:
        """Removes what was exchanged; all processes call it when the step is sealed."""
        for path in self._exchanged:
            shutil.rmtree(path, ignore_errors=True)
            if jax.process_index() == 0 and jax.process_count() > 1:
                remote.remove(path)

    def _unfinished(self) -> list[Path]:
        return list(self._step.parent.glob(f"{self._step.name}.orbax-checkpoint-tmp*"))

    def fail(self, said: Any) -> dict[int, list]:
        """Tells the others, JSON, unless they have failed before; returns all `failures`."""
        if not self.failures:
            try:
                self._meet([said, None])
            except Elsewhere:
                pass
        return self.failures

    def _meet(self, mine: list) -> list:
        everyone = self._gather(self._name, mine)
        self.failures = {who: said for who, (said, _) in enumerate(everyone) if said is not None}
        if self.failures:
            raise Elsewhere(f"process {min(self.failures)} of {jax.process_count()} has failed")
        return [value for _, value in everyone]
