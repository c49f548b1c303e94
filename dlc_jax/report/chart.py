"""Curves and bars as SVG, without any outside resource: colors come from the page's style."""

import math
from collections.abc import Callable, Mapping, Sequence

from dlc_jax.report.words import number, text, words

_LEFT, _RIGHT, _BOTTOM = 76, 446, 236  # of the axes, in a picture of 480 x 288
_LOG = 50.0  # a series that spans this factor is drawn on a logarithmic axis


def chart(
    title: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    note: str = "",
    hold: tuple[float, float] | None = None,
    say: Callable[[float], str] = number,
) -> str:
    """One or two series over steps, with axes, numbers, a legend and a sentence below.

    Args:
      title: heading.
      lines: name -> points (step, value).
      note: the sentence.
      hold: values that the axis holds in any case, such as 0 for a rate. Without, it is as long as
        the values need, and logarithmic if all are positive and far apart.
      say: a value in words.

    Returns:
      A figure in HTML.
    """
    top = 14 + 20 * len(lines)
    points = [point for line in lines.values() for point in line]
    x0, x1 = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    x1 += x1 == x0
    log = low > 0 and high / low >= _LOG and hold is None
    low, high = (low, high) if hold is None else (min(low, *hold), max(high, *hold))
    # as good as constant: half its size above and below
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-100):
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    scale = math.log10 if log else float
    y0, y1 = scale(low), scale(high)

    def at(x: float, y: float) -> tuple[str, str]:
        right, up = (x - x0) / (x1 - x0), (scale(y) - y0) / (y1 - y0)
        return f"{_LEFT + right * (_RIGHT - _LEFT):.1f}", f"{_BOTTOM - up * (_BOTTOM - top):.1f}"

    parts = [f'<svg viewBox="0 0 480 288" role="img" aria-label="{text(title)} over steps">']
    for tick in log_ticks(low, high) if log else ticks(low, high, 5):
        _, y = at(x0, tick)
        parts.append(f'<line class="rule" x1="{_LEFT}" x2="{_RIGHT}" y1="{y}" y2="{y}"></line>')
        parts.append(
            f'<text x="{_LEFT - 8}" y="{float(y) + 5:.1f}" text-anchor="end">{text(say(tick))}</text>'
        )
    for tick in ticks(x0, x1, 5):
        x, _ = at(tick, low)
        parts.append(
            f'<text x="{x}" y="{_BOTTOM + 20}" text-anchor="middle">{text(number(tick))}</text>'
        )
    parts.append(
        f'<text x="{(_LEFT + _RIGHT) // 2}" y="{_BOTTOM + 44}" text-anchor="middle">step</text>'
    )
    for index, (name, line) in enumerate(lines.items()):
        line = thinned(line)
        if len(line) == 1:
            x, y = at(*line[0])
            parts.append(f'<circle class="s{index}" cx="{x}" cy="{y}" r="4"></circle>')
        else:
            parts.append(
                f'<polyline class="s{index}" points="{" ".join(",".join(at(*point)) for point in line)}"></polyline>'
            )
        legend = f"{words(name)}: {say(line[-1][1])} at the end"
        parts.append(
            f'<text class="l{index}" x="{_LEFT}" y="{18 + 20 * index}">{text(legend)}</text>'
        )
    return _figure(title + (" (logarithmic)" if log else ""), "\n".join([*parts, "</svg>"]), note)


def bars(
    title: str,
    values: Sequence[float],
    *,
    under: str,
    first: int = 1,
    highest: float | None = None,
    note: str = "",
) -> str:
    """One bar a value, from 0 to `highest` (None: the largest), numbered from `first`; many become an area.

    Args:
      title: heading.
      under: what the bars are numbered by, written below them.
      note: a sentence.

    Returns:
      A figure in HTML.
    """
    count, top = len(values), 14
    highest = max(highest or 0, *values) or 1
    width = (_RIGHT - _LEFT) / count
    gap = 1 if width > 4 else 0
    parts = [f'<svg viewBox="0 0 480 288" role="img" aria-label="{text(title)} by {text(under)}">']
    for tick in ticks(0, highest, 5):
        y = _BOTTOM - tick / highest * (_BOTTOM - top)
        parts.append(
            f'<line class="rule" x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"></line>'
        )
        parts.append(
            f'<text x="{_LEFT - 8}" y="{y + 5:.1f}" text-anchor="end">{text(number(tick))}</text>'
        )
    for tick in ticks(first, first + count - 1, 5) if count > 1 else [first]:
        if float(tick).is_integer():
            x = _LEFT + (tick - first + 0.5) * width
            parts.append(
                f'<text x="{x:.1f}" y="{_BOTTOM + 20}" text-anchor="middle">{text(number(tick))}</text>'
            )
    parts.append(
        f'<text x="{(_LEFT + _RIGHT) // 2}" y="{_BOTTOM + 44}" text-anchor="middle">{text(under)}</text>'
    )
    # one path for all: half a thousand positions are as many bars
    outline = [f"M{_LEFT},{_BOTTOM}"]
    for index, value in enumerate(values):
        x, y = _LEFT + index * width, _BOTTOM - value / highest * (_BOTTOM - top)
        outline.append(f"M{x:.1f},{_BOTTOM}V{y:.1f}H{x + width - gap:.1f}V{_BOTTOM}Z")
    parts.append(f'<path class="bars" d="{" ".join(outline)}"></path>')
    return _figure(title, "\n".join([*parts, "</svg>"]), note)


def ticks(low: float, high: float, about: int) -> list[float]:
    """Returns round numbers within [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    size = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9)
    return [float(f"{i * size:.10g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Returns powers of ten within [low, high], of every second, third, ... decade if they are many; fewer than two get 2s and 5s too."""
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    decades = range(first, last + 1, max(1, math.ceil((last - first + 1) / 6)))
    found = [float(f"1e{decade}") for decade in decades]
    if len(found) > 2:
        return found
    fine = [
        float(f"{factor}e{decade}") for decade in range(first - 1, last + 1) for factor in (1, 2, 5)
    ]
    return [tick for tick in fine if low <= tick <= high]


def thinned(line: Sequence[tuple[float, float]], most: int = 400) -> Sequence[tuple[float, float]]:
    """Keeps at most about `most` points: of each run of neighbors the lowest and the highest, so that no spike is lost."""
    if len(line) <= most:
        return line
    size = math.ceil(2 * (len(line) - 2) / (most - 2))
    kept = {0, len(line) - 1}
    for start in range(1, len(line) - 1, size):
        run = range(start, min(start + size, len(line) - 1))
        kept |= {min(run, key=lambda i: line[i][1]), max(run, key=lambda i: line[i][1])}
    return [line[i] for i in sorted(kept)]


def _figure(title: str, drawing: str, note: str) -> str:
    below = f"\n<figcaption>{text(note)}</figcaption>" if note else ""
    return f"<figure>\n<h3>{text(title)}</h3>\n{drawing}{below}\n</figure>"
