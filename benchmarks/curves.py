"""Curves of a run's step as one picture.

    python benchmarks/curves.py runs/cifar10/encoder curves.svg probe/label codes/perplexity loss …

One panel for each name: that of a metric in the step's metrics.jsonl, or its end.
"""

import re
import sys
from pathlib import Path

from dlc_jax.report.chart import chart
from dlc_jax.report.curves import read_metrics

WIDTH, HEIGHT, COLUMNS, HEAD = 480, 288, 3, 28
STYLE = (
    "svg{background:#fff;font:14px sans-serif}.rule{stroke:#ddd}"
    "polyline{fill:none;stroke:#1769aa;stroke-width:2}"
    "circle{fill:#1769aa}.title{font-weight:bold}"
)


def main(step: str, out: str, *names: str) -> None:
    found = read_metrics(Path(step) / "metrics.jsonl")
    panels = []
    for place, name in enumerate(names):
        metrics = [metric for metric in found if f"/{metric}".endswith(f"/{name}")]
        if not metrics:
            sys.exit(f"{step} has no metric {name}; it has {', '.join(sorted(found))}")
        metric = min(metrics, key=len)
        drawing = re.search(r"<svg.*</svg>", chart(metric, {metric: found[metric]}), re.DOTALL)[0]
        x, y = place % COLUMNS * WIDTH, place // COLUMNS * (HEIGHT + HEAD)
        panels.append(f'<text class="title" x="{x + 20}" y="{y + 20}">{metric}</text>')
        placed = f'<svg x="{x}" y="{y + HEAD}" width="{WIDTH}" height="{HEIGHT}" '
        panels.append(drawing.replace("<svg ", placed, 1))
    width, height = min(len(names), COLUMNS) * WIDTH, -(-len(names) // COLUMNS) * (HEIGHT + HEAD)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">'
    style = f"<style>{STYLE}</style>"
    Path(out).write_text("\n".join([head + style, *panels, "</svg>"]) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
