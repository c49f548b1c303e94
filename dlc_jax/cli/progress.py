"""The line that long work shows: how much is done, how fast, and the time left."""

import sys
import time


class Progress:
    """progress(done, total) redraws a line on a terminal, and writes one every ten seconds elsewhere: short work shows none.

    It goes to stderr, so that results can be piped. As a context, it ends the line, also when the work fails.

    Args:
      name: of the work, in front.
      unit: what is counted.
    """

    def __init__(self, name, unit):
        self._name, self._unit, self._terminal = name, unit, sys.stderr.isatty()
        self._begin, self._first, self._drawn, self._width = 0.0, None, time.monotonic(), 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._width:
            print(file=sys.stderr, flush=True)

    def __call__(self, done, total):
        now = time.monotonic()
        if self._first is None:  # what an earlier run has done says nothing about the pace of this one
            self._begin, self._first = now, done
        if now - self._drawn < (0.2 if self._terminal else 10):
            return
        self._drawn = now
        text = f"{self._name} {done}/{total} {self._unit} {100 * done // max(total, 1)}%"
        if done > self._first:
            pace = (done - self._first) / max(now - self._begin, 1e-9)
            text += f"  {pace:.3g} {self._unit}/s  ETA {span((total - done) / pace)}"
        if self._terminal:
            print("\r" + text.ljust(self._width), end="", file=sys.stderr, flush=True)
            self._width = len(text)
        else:
            print(text, file=sys.stderr, flush=True)


def span(seconds):
    """59s, 3m05s, 2h07m."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
