"""A source whose records may be damaged: others stand in for them."""

import sys
import threading
from collections.abc import Callable

import numpy as np

from dlc_jax.errors import UserError


class Resilient:
    """A source in which others stand in for records that cannot be read.

    Each is replaced by the same one every time, and counted.

    The loader passes its transform through `read`, so that a record at which the transform fails is
    replaced too.

    Args:
      source: a random-access source; its `names`, if it has any, say which record failed.
      limit: how many different records may fail before UserError names the first ten.

    Attributes:
      bad: {index: what went wrong} so far, in this process.
    """

    def __init__(self, source, *, limit: int = 100):
        self.source, self.limit, self.bad = source, limit, {}
        self._lock = threading.Lock()

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        return self.read(index, lambda record: record)

    def read(self, index: int, finish: Callable):
        """finish(record `index`), or of the first of its replacements for which that succeeds."""
        first, attempt = index, 0
        while True:
            try:
                return finish(self.source[index])
            except (UserError, MemoryError):
                raise
            except Exception as error:
                self._note(index, error)
            # Spread over the whole source: neighbors of a bad record are often bad too.
            attempt += 1
            draw = np.random.SeedSequence([first, attempt]).generate_state(1, np.uint64)[0]
            index = int(draw % len(self.source))

    def _note(self, index, error):
        with self._lock:
            new = index not in self.bad
            self.bad[index] = f"{type(error).__name__}: {error}".splitlines()[0]
            count = len(self.bad)
            if count > self.limit or count == len(self.source):
                some = "; ".join(self._say(i) for i in sorted(self.bad)[:10])
                of = f"{count} of {len(self.source)}"
                raise UserError(
                    f"{of} records cannot be read (limit {self.limit}), such as {some}"
                ) from error
            if new and count & (count - 1) == 0:  # 1, 2, 4, 8, ...
                print(
                    f"unreadable records so far, replaced by others: {count}, last "
                    f"{self._say(index)}",
                    file=sys.stderr,
                )

    def _say(self, index):
        names = getattr(self.source, "names", None)
        return f"{names[index] if names else index} ({self.bad[index]})"
