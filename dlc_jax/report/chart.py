"""Curves and bars as SVG, without any outside resource: colors come from the page's style."""

import math
from collections.abc import Callable, Mapping, Sequence

from dlc_jax.report.words import number, text, words

_LEFT, _MIDDLE, _RIGHT, _BOTTOM = 76, 261, 446, 236  # of the axes, in a picture of 480 x 288
_LOG = 50.0  # a series that spans this factor is drawn on a logarithmic axis


def chart(
    title: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    note: str = "",
    hold: tuple[float, float] | None = None,
    say: Callable[[float], str] = number,
    errors: Mapping[float, float] | None = None,
) -> str:
    """One or two series over steps, with axes, numbers, a legend and a sentence below.

    Args:
      title: heading.
      lines: name -> points (step, value).
      note: the sentence.
      hold: values that the axis always includes, such as 0 for a rate. Without, it is as long as
        the values need, and logarithmic if all are positive and far apart.
      say: a value in words.
      errors: step -> standard error of the first series there, drawn as bars of one error.

    Returns:
      A figure in HTML.
    """
    ends = _ends(next(iter(lines.values())), errors or {})
    top = 14 + 20 * len(lines)
    points = [point for line in lines.values() for point in line]
    x0, x1 = min(x for x, _ in points), max(x for x, _ in points)
    values = [y for _, y in points] + [y for _, *both in ends for y in both]
    low, high = min(values), max(values)
    x1 += x1 == x0
    log = low > 0 and high / low >= _LOG and hold is None
    low, high = (low, high) if hold is None else (min(low, *hold), max(high, *hold))
    # nearly constant: half its size above and below
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-100):
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    scale = math.log10 if log else float
    y0, y1 = scale(low), scale(high)

    def at(x: float, y: float) -> tuple[str, str]:
        right, up = (x - x0) / (x1 - x0), (scale(y) - y0) / (y1 - y0)
        return f"{_LEFT + right * (_RIGHT - _LEFT):.1f}", f"{_BOTTOM - up * (_BOTTOM - top):.1f}"

    parts = []
    for tick in log_ticks(low, high) if log else ticks(low, high, 5):
        parts += _rule(float(at(x0, tick)[1]), say(tick))
    for tick in ticks(x0, x1, 5):
        parts.append(_under(float(at(tick, low)[0]), number(tick)))
    parts.append(_under(_MIDDLE, "step", below=44))
    for index, (name, line) in enumerate(lines.items()):
        line = thinned(line)
        if len(line) == 1:
            x, y = at(*line[0])
            parts.append(f'<circle class="s{index}" cx="{x}" cy="{y}" r="4"></circle>')
        else:
            joined = " ".join(",".join(at(*point)) for point in line)
            parts.append(f'<polyline class="s{index}" points="{joined}"></polyline>')
        legend = text(f"{words(name)}: {say(line[-1][1])} at the end")
        parts.append(f'<text class="l{index}" x="{_LEFT}" y="{18 + 20 * index}">{legend}</text>')
    for x, *both in ends:
        (right, below), (_, above) = (at(x, y) for y in both)
        parts.append(f'<path class="s0" d="M{right},{below}V{above}"></path>')
    label = f"{title} over steps"
    return _figure(title + (" (logarithmic)" if log else ""), label, parts, note)


def _ends(line, errors: Mapping[float, float]) -> list[tuple[float, float, float]]:
    """(step, lower end, upper end) of the error bars of a series."""
    return [(x, y - errors[x], y + errors[x]) for x, y in line if x in errors]


def bars(
    title: str,
    values: Sequence[float],
    *,
    under: str,
    first: int = 1,
    highest: float | None = None,
    note: str = "",
) -> str:
    """One bar for each value; many bars look like an area.

    Args:
      title: heading.
      values: heights of the bars, from 0.
      under: what the bars are numbered by, written below them.
      first: the number of the first bar.
      highest: the upper end of the axis; None is the largest value.
      note: a sentence.

    Returns:
      A figure in HTML.
    """
    count, top = len(values), 14
    highest = max(highest or 0, *values) or 1
    width = (_RIGHT - _LEFT) / count
    gap = 1 if width > 4 else 0
    parts = []
    for tick in ticks(0, highest, 5):
        parts += _rule(_BOTTOM - tick / highest * (_BOTTOM - top), number(tick))
    for tick in ticks(first, first + count - 1, 5) if count > 1 else [first]:
        if float(tick).is_integer():
            parts.append(_under(_LEFT + (tick - first + 0.5) * width, number(tick)))
    parts.append(_under(_MIDDLE, under, below=44))
    # one path for all: half a thousand positions are as many bars
    outline = [f"M{_LEFT},{_BOTTOM}"]
    for index, value in enumerate(values):
        x, y = _LEFT + index * width, _BOTTOM - value / highest * (_BOTTOM - top)
        outline.append(f"M{x:.1f},{_BOTTOM}V{y:.1f}H{x + width - gap:.1f}V{_BOTTOM}Z")
    parts.append(f'<path class="bars" d="{" ".join(outline)}"></path>')
    return _figure(title, f"{title} by {under}", parts, note)


def ticks(low: float, high: float, about: int) -> list[float]:
    """Returns round numbers within [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    size = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9)
    return [float(f"{i * size:.10g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Returns powers of ten within [low, high].

    If they are many, every second, third, ... decade; if fewer than three, 2s and 5s too.
    """
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    decades = range(first, last + 1, max(1, math.ceil((last - first + 1) / 6)))
    if len(decades) > 2:
        return [float(f"1e{decade}") for decade in decades]
    fine = (float(f"{n}e{decade}") for decade in range(first - 1, last + 1) for n in (1, 2, 5))
    return [tick for tick in fine if low <= tick <= high]


def thinned(line: Sequence[tuple[float, float]], most: int = 400) -> Sequence[tuple[float, float]]:
    """Keeps about `most` points: the lowest and the highest of each run, so no spike is lost."""
    if len(line) <= most:
        return line
    size = math.ceil(2 * (len(line) - 2) / (most - 2))
    kept = {0, len(line) - 1}
    for start in range(1, len(line) - 1, size):
        run = range(start, min(start + size, len(line) - 1))
        kept |= {min(run, key=lambda i: line[i][1]), max(run, key=lambda i: line[i][1])}
    return [line[i] for i in sorted(kept)]


def _rule(y: float, label: str) -> list[str]:
    """A horizontal line with its number at the left."""
    return [
        f'<line class="rule" x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"></line>',
        f'<text x="{_LEFT - 8}" y="{y + 5:.1f}" text-anchor="end">{text(label)}</text>',
    ]


def _under(x: float, label: str, *, below: int = 20) -> str:
    """A text centered below the axis."""
    return f'<text x="{x:.1f}" y="{_BOTTOM + below}" text-anchor="middle">{text(label)}</text>'


def _figure(title: str, label: str, parts: Sequence[str], note: str) -> str:
    head = f'<svg viewBox="0 0 480 288" role="img" aria-label="{text(label)}">'
    caption = [f"<figcaption>{text(note)}</figcaption>"] if note else []
    heading = f"<h3>{text(title)}</h3>"
    return "\n".join(["<figure>", heading, head, *parts, "</svg>", *caption, "</figure>"])
