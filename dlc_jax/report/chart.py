"""Curves as SVG, without any outside resource: colors come from the page's style."""

import math
from collections.abc import Mapping, Sequence

from dlc_jax.report.words import number, text, words


def chart(title: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Returns an SVG of one or two series over steps, with axes, numbers and a legend."""
    left, right, top, bottom = 76, 446, 14 + 20 * len(lines), 236
    points = [point for line in lines.values() for point in line]
    x0, x1 = min(x for x, _ in points), max(x for x, _ in points)
    y0, y1 = min(y for _, y in points), max(y for _, y in points)
    x1 += x1 == x0
    if y1 - y0 <= 1e-12 * max(abs(y0), abs(y1), 1e-100):  # as good as constant: half its size above and below
        y0, y1 = y0 - (abs(y0) or 1) / 2, y1 + (abs(y1) or 1) / 2

    def at(x: float, y: float) -> tuple[str, str]:
        return f"{left + (x - x0) / (x1 - x0) * (right - left):.1f}", f"{bottom - (y - y0) / (y1 - y0) * (bottom - top):.1f}"

    parts = [f'<svg viewBox="0 0 480 288" role="img" aria-label="{text(title)} over steps">']
    for tick in ticks(y0, y1, 5):
        _, y = at(x0, tick)
        parts.append(f'<line class="rule" x1="{left}" x2="{right}" y1="{y}" y2="{y}"></line>')
        parts.append(f'<text x="{left - 8}" y="{float(y) + 5:.1f}" text-anchor="end">{text(number(tick))}</text>')
    for tick in ticks(x0, x1, 5):
        x, _ = at(tick, y0)
        parts.append(f'<text x="{x}" y="{bottom + 20}" text-anchor="middle">{text(number(tick))}</text>')
    parts.append(f'<text x="{(left + right) // 2}" y="{bottom + 44}" text-anchor="middle">step</text>')
    for index, (name, line) in enumerate(lines.items()):
        line = thinned(line)
        if len(line) == 1:
            x, y = at(*line[0])
            parts.append(f'<circle class="s{index}" cx="{x}" cy="{y}" r="4"></circle>')
        else:
            parts.append(f'<polyline class="s{index}" points="{" ".join(",".join(at(*point)) for point in line)}"></polyline>')
        legend = f"{words(name)}: {number(line[-1][1])} at the end"
        parts.append(f'<text class="l{index}" x="{left}" y="{18 + 20 * index}">{text(legend)}</text>')
    return f"<h3>{text(title)}</h3>\n" + "\n".join([*parts, "</svg>"])


def ticks(low: float, high: float, about: int) -> list[float]:
    """Returns round numbers within [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    size = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9)
    return [float(f"{i * size:.10g}") for i in range(first, last + 1)]


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
