"""The line that long work shows: how much is done, how fast, and the time left."""

import sys
import time


class Progress:
    """progress(done, total) redraws a line on a terminal, and writes one a half minute elsewhere.

    Short work shows none. It goes to stderr, so that results can be piped. As a context, it ends
    the line, also when the work fails.

    Args:
      name: of the work, in front.
      unit: what is counted.
      silent: shows nothing, as all processes of a run but the first.
    """

    def __init__(self, name, unit, *, silent=False):
        self._name, self._unit, self._silent = name, unit, silent
        self._terminal = sys.stderr.isatty()
        self._begin, self._first, self._drawn, self._width = 0.0, None, time.monotonic(), 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._width:
            print(file=sys.stderr, flush=True)

    def __call__(self, done, total):
        now = time.monotonic()
        # What an earlier run has done says nothing about the pace of this one.
        if self._first is None:
            self._begin, self._first = now, done
        if self._silent or now - self._drawn < (0.2 if self._terminal else 30):
            return
        self._drawn = now
        text = f"{self._name}: {done:,}/{total:,} {self._unit}"
        if done > self._first:
            pace = (done - self._first) / max(now - self._begin, 1e-9)
            text += f", {pace:,.0f} {self._unit}/s, {span((total - done) / pace)} left"
        if self._terminal:
            print("\r" + text.ljust(self._width), end="", file=sys.stderr, flush=True)
            self._width = len(text)
        else:
            print(text, file=sys.stderr, flush=True)


def span(seconds):
    """59 s, 3 min, 2 h 07 min."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
