"""The progress line: redrawn in place on a terminal, a line at a time elsewhere."""

import contextlib
from collections.abc import Mapping
from typing import Any

_REDRAW = 0.2  # seconds between two drawings of the line on a terminal


class Line:
    """Writes to `stream`; `total` steps are what there is to do, `name` is printed in front."""

    def __init__(self, stream: Any, *, name: str, total: int):
        self._stream, self._name, self._total = stream, name, total
        self._in_place = bool(getattr(stream, "isatty", lambda: False)())
        self._drawn, self._width = 0.0, 0

    def is_stale(self, now: float) -> bool:
        """Whether it may be drawn again between two logged steps."""
        return self._in_place and now - self._drawn > _REDRAW

    def draw(
        self, step: int, values: Mapping[str, Any], rates: Mapping[str, float], now: float
    ) -> None:
        """Shows the share done, the loss in `values` and the `rates`, those that there are."""
        parts = [f"{self._name} {step}/{self._total} {100 * step / max(self._total, 1):.0f}%"]
        if isinstance(loss := values.get("loss"), float):
            parts.append(f"loss {loss:.4f}")
        elif "loss" in values:
            parts.append("loss not finite")
        if "images_per_second" in rates:
            parts.append(f"{rates['images_per_second']:.0f} images/s")
        if rates:
            pace = rates["seconds_per_step"]
            left = _span(pace * (self._total - step))
            waited = f"data {100 * rates['data_wait']:.0f}%"
            parts += [f"{1000 * pace:.1f} ms/step", waited, f"ETA {left}"]
        text, self._drawn = "  ".join(parts), now
        if self._in_place:
            # The terminal may be gone: a signal says so in a moment, and then all is saved.
            with contextlib.suppress(OSError):
                self._stream.write("\r" + text + " " * (self._width - len(text)))
                self._stream.flush()
            self._width = len(text)
        else:
            self._stream.write(text + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Ends the line that stands on a terminal."""
        if self._in_place and self._width:
            with contextlib.suppress(OSError):
                self._stream.write("\n")
                self._stream.flush()
            self._width = 0


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
