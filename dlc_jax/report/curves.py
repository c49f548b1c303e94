"""Charts of what a step wrote while it ran: metrics over steps, and how codes use their values."""

import json
import pathlib
from collections.abc import Iterable

from dlc_jax.report.chart import bars, chart
from dlc_jax.report.words import finite, number, percent, text, words

# title -> (names, the sentence below, what the axis always includes, value in words); the first
# chart shows two series; a missing one is left out
_CURVES = {
    "Loss": (
        ("loss", "validation/loss"),
        "What training minimizes: lower is better. "
        "Dashed: the same on held-out data that training never sees.",
        None,
        number,
    ),
    "Learning rate": (("learning_rate",), "How large a step the optimizer takes.", (0, 0), number),
    "Images per second": (
        ("images_per_second",),
        "Training examples per second, without the time of evaluations: higher is faster.",
        (0, 0),
        number,
    ),
    "Share of time waiting for data": (
        ("data_wait",),
        "Share of the time in which the computation waited for the next batch: near 0 is best.",
        (0, 0.05),
        percent,
    ),
}
_NO_CURVE = {"step", "time", "seconds", "wall_time", "epoch"}
_MORE_CURVES = 24  # charts of a step's other metrics, at most
_SCORED = (
    "Bars are one standard error: how far the value would move with other samples of the same "
    "model. With few images a Fréchet distance has a bias besides, see scores.json."
)
_RANKS = 200  # values shown of a long vocabulary


def read_metrics(path: pathlib.Path) -> dict[str, list[tuple[float, float]]]:
    """Returns name -> [(step, value)], sorted by step.

    Where a step was written twice, as after a resume, the later line counts.
    """
    rows: dict[float, dict] = {}
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except ValueError:
                    continue  # a run was killed while it wrote this line
                if isinstance(row, dict) and finite(row.get("step")):
                    rows.setdefault(row["step"], {}).update(row)
    except OSError:
        return {}
    series: dict[str, list[tuple[float, float]]] = {}
    for step in sorted(rows):
        for name, value in rows[step].items():
            # no axis can be drawn for larger values
            if name not in _NO_CURVE and finite(value) and abs(value) < 1e100:
                series.setdefault(name, []).append((step, value))
    return series


def curves(steps: Iterable[pathlib.Path]) -> list[str]:
    """A section for each step that has metrics: the four usual charts, the others folded away."""
    parts = []
    for step in steps:
        series = read_metrics(step / "metrics.jsonl")
        if not series:
            continue
        charts = []
        for title, (names, note, hold, say) in _CURVES.items():
            if lines := {name: series.pop(name) for name in names if name in series}:
                charts.append(chart(title, lines, note=note, hold=hold, say=say))
        parts.append(f"<h2>Curves: {text(words(step.name))}</h2>\n{_side_by_side(charts)}")
        charts = []
        for name in [name for name in series if name.startswith("scores/")]:
            if name not in series or name.endswith("_error"):
                continue
            line, errors = series.pop(name), dict(series.pop(f"{name}_error", ()))
            charts.append(
                chart(scored(name), {name: line}, note=_SCORED * bool(errors), errors=errors)
            )
        if charts:
            parts.append(f"<h3>Scores of images drawn on the way</h3>\n{_side_by_side(charts)}")
        if series:
            more = _side_by_side(
                chart(words(name).capitalize(), {name: series[name]})
                for name in sorted(series)[:_MORE_CURVES]
            )
            heading = "<summary>all other curves of this step</summary>"
            parts.append(f"<details>{heading}\n{more}</details>")
    return parts


def scored(name: str) -> str:
    """The title of a score: FID, not Fid."""
    found = name.removeprefix("scores/")
    return found.upper() if len(found) <= 4 else words(found).capitalize()


def _side_by_side(charts: Iterable[str]) -> str:
    return "\n".join(['<div class="charts">', *charts, "</div>"])


def usage(steps: Iterable[pathlib.Path]) -> list[str]:
    """How the codes are used, of each step that left a `usage.json`: see `evals.codes.usage`."""
    parts = []
    for step in steps:
        try:
            found = json.loads((step / "usage.json").read_text())
            values, count = int(found["values"]), int(found["count"])
            perplexity = [float(value) for value in found["perplexity"]]
            by_rank = [float(value) for value in found["by_rank"]]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if not perplexity or not by_rank or not all(map(finite, perplexity + by_rank)):
            continue
        mean = sum(perplexity) / len(perplexity)
        first = bars(
            "Values in use, by position",
            perplexity,
            under="position",
            highest=values,
            note=f"Each of the {number(len(perplexity))} positions of a code can take "
            f"{number(values)} values; over {number(count)} images the mean perplexity is "
            f"{number(mean)}, as if that many values were equally frequent. "
            f"A position near 1 says nothing, one near {number(values)} says most.",
        )
        second = bars(
            "How frequent the values are",
            by_rank[:_RANKS],
            under="value, commonest first",
            note=f"Share of the images that have a position's commonest value, its second "
            f"commonest and so on, averaged over positions. If all were equally frequent, "
            f"each would have {percent(1 / values)}.",
        )
        charts = _side_by_side([first, second])
        parts.append(f"<h2>Code usage: {text(words(step.name))}</h2>\n{charts}")
    return parts
