"""One save in several processes: what fails in one of them fails in all of them."""

from collections.abc import Callable
from typing import Any

import jax

from dlc_jax.hosts.agreement import gather


class Elsewhere(Exception):
    """Another process has failed; `Together.failures` says which and why."""


class Together:
    """The meetings of one save, in the order in which they come.

    Whoever fails says so at the next meeting, where the others wait or will arrive. After that
    nobody meets again. So no process stays in a barrier that another one will never reach.
    """

    def __init__(self, name: str, gathered: Callable[[str, Any], list] = gather):
        """`name` is of one save at a time; the meetings of the save after follow on."""
        self._name, self._gather = name, gathered
        self.failures: dict[int, list] = {}  # {process: what it said of its failure}

    def __call__(self, value: Any = None) -> list:
        """The value of every process, JSON, in their order.

        Raises:
          Elsewhere: another process has failed.
          Interrupted: one of them has ended.
        """
        return self._meet([None, value])

    def barrier(self, *, key: str, timeout_ms: int) -> None:
        """What Orbax calls where its background writes meet; its time-out does not count."""
        self()

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
