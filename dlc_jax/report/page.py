"""The page: one file with all it needs, no network, no script and no server; it reads on a phone."""

import base64
import contextlib
import importlib.metadata
import io
import json
import os
import pathlib
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from PIL import Image

from dlc_jax.errors import UserError
from dlc_jax.report.chart import chart
from dlc_jax.report.words import duration, finite, number, percent, text, words

LIMIT = 8_000_000  # bytes of the whole file
_RESERVE = 2_000_000  # of them, for all that is not a picture
_STEPS = ("encoder", "codes", "prior", "generator")  # the order of a run whose config names none; other steps follow by name
_SERIES = 6  # pictures shown of a numbered series, such as sample grids over training time

# What each group of results is, in the order of the table; other groups follow by name.
_GROUPS = {
    "judge": "The judge reads the factors off an image. Here it is tested itself, on images whose answer is known.",
    "probe": "A linear reading of the codes, on images not seen in training: what the codes know.",
    "probe_knn": "The same, by the vote of the nearest training codes.",
    "probe_held_out": "The same, on images of combinations of factors that training never saw.",
    "reconstruction": "Image → code → new image, unseen images of combinations that training saw: what the new image kept.",
    "reconstruction_held_out": "Image → code → new image, for combinations of factors that training never saw.",
    "unconditional": "Sampled codes → new images. Entropies are relative to all values being equally frequent.",
    "composition": "Codes mixed position by position from two images that differ in every factor: what is theirs in the new one.",
    "composition_of_three": "The same with three images, which differ in every factor with values enough.",
    "without_codes": "The same generator, trained with the same budget but without codes.",
    "seconds": "Time taken by each step.",
}
_RATES = ("judge", "probe", "reconstruction", "unconditional", "composition", "without_codes")  # groups that begin so
_NOT_A_RATE = re.compile(r"count|values|distance|rms|threshold|nats|bits|guidance|scale|steps|seed|seconds|temperature|loss")

_CURVES = {  # the first chart shows two series; a missing one is left out
    "Loss": ("loss", "validation/loss"),
    "Learning rate": ("learning_rate",),
    "Images per second": ("images_per_second",),
    "Share of time waiting for data": ("data_wait",),
}
_NO_CURVE = {"step", "time", "seconds", "wall_time", "epoch"}
_MORE_CURVES = 24  # charts of a step's other metrics, at most

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1c1e; --faint: #6b6b70; --rule: #d8d8dc; --a: #1f6fd1; --b: #c2571a; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #161618; --ink: #ececee; --faint: #a0a0a6; --rule: #3a3a3e; --a: #6cb0ff; --b: #ff9d5c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 52rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.2; }
h2 { margin-top: 2.2rem; font-size: 1.25rem; } h3 { margin-bottom: .3rem; font-size: 1.05rem; }
p.note, figcaption, summary { color: var(--faint); }
p.note { margin: 0 0 .5rem; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .4rem; border-bottom: 1px solid var(--rule); text-align: right; font-weight: normal; }
th:first-child, td:first-child { text-align: left; }
thead th { color: var(--faint); font-size: .85rem; }
figure { margin: 1rem 0 1.5rem; }
img { display: block; max-width: 100%; height: auto; image-rendering: pixelated; }
svg { display: block; width: 100%; max-width: 34rem; height: auto; }
svg text { fill: var(--faint); font: 15px system-ui, sans-serif; }
svg .rule { stroke: var(--rule); } svg polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .s0 { stroke: var(--a); } svg .s1 { stroke: var(--b); stroke-dasharray: 7 4; }
svg circle.s0 { fill: var(--a); } svg circle.s1 { fill: var(--b); }
svg text.l0 { fill: var(--a); } svg text.l1 { fill: var(--b); }
pre { overflow-x: auto; white-space: pre-wrap; font-size: .85rem; }
"""


def write(workdir: str | os.PathLike, path: str | os.PathLike | None = None) -> pathlib.Path:
    """Writes the report of a workdir; what is missing or unreadable is left out.

    It shows `config.json`, `results.json` and, of each step's directory, `metrics.jsonl` (an object per line with `step`) and
    `pictures/*.png` with `pictures/captions.json` ({file: sentence}).

    Args:
      workdir: the run's directory.
      path: the file to write; None is `report.html` in the workdir.

    Returns:
      The path written.

    Raises:
      UserError: there is no such workdir, or the file cannot be written.
    """
    workdir = pathlib.Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"no workdir at {workdir}: a report is written of a directory that a run made")
    path = workdir / "report.html" if path is None else pathlib.Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(_page(workdir), encoding="utf-8")
        os.replace(partial, path)  # a reader never finds half a report
    except OSError as error:
        raise UserError(f"cannot write the report {path}: {error.strerror or error}; give another path or make room") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return path


def _page(workdir: pathlib.Path) -> str:
    config, results = _json(workdir / "config.json"), _json(workdir / "results.json")
    results = results if isinstance(results, dict) else {}
    title = f"dlc_jax: {workdir.resolve().name}"
    steps = _steps(workdir, config)
    body = [
        f"<h1>{text(title)}</h1>",
        _summary(results),
        *_pictures(steps),
        *_tables(results),
        *_curves(steps),
        _versions(results),
    ]
    if config is not None:
        shown = text(json.dumps(config, indent=2, ensure_ascii=False)[:200_000])
        body.append(f"<h2>Config</h2>\n<details><summary>every field of this run</summary><pre>{shown}</pre></details>")
    content = "\n".join(part for part in body if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{content}\n</body>\n</html>\n"
    )


# ---- what is in the workdir


def _steps(workdir: pathlib.Path, config: Any) -> list[pathlib.Path]:
    try:
        order = list(config["steps"])
    except (KeyError, TypeError):
        order = list(_STEPS)
    found = [path for path in workdir.iterdir() if (path / "metrics.jsonl").is_file() or (path / "pictures").is_dir()]
    return sorted(found, key=lambda path: (order.index(path.name) if path.name in order else len(order), path.name))


def _json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_metrics(path: pathlib.Path) -> dict[str, list[tuple[float, float]]]:
    """Returns name -> [(step, value)], sorted; of a step written twice, as after a resume, the later line counts."""
    rows: dict[float, dict] = {}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a run was killed while it wrote this line
        if isinstance(row, dict) and finite(row.get("step")):
            rows.setdefault(row["step"], {}).update(row)
    series: dict[str, list[tuple[float, float]]] = {}
    for step in sorted(rows):
        for name, value in rows[step].items():
            if name not in _NO_CURVE and finite(value) and abs(value) < 1e100:  # beyond, no axis can be drawn
                series.setdefault(name, []).append((step, value))
    return series


def _is_rate(key: str, value: Any) -> bool:
    name = key.partition("/")[2]
    return key.startswith(_RATES) and isinstance(value, float) and 0 <= value <= 1 and not _NOT_A_RATE.search(name)


def _value(key: str, value: Any) -> str:
    if _is_rate(key, value):
        return percent(value)
    if finite(value) and (key.startswith("seconds/") or "seconds" in key.rpartition("/")[2]):
        return duration(value)
    if finite(value) and key.endswith("_gb"):
        return f"{value:.2f} GB"
    return number(value)


# ---- the parts of the page


def _summary(results: Mapping[str, Any]) -> str:
    """One paragraph of the headline numbers, of those there are."""

    def rates(prefix: str, suffix: str = "") -> str:
        found = []
        for key, value in results.items():
            match = re.fullmatch(f"{prefix}/(?!chance_|all$|valid$)([a-z_]+){suffix}", key)
            if match and _is_rate(key, value):
                found.append(f"{words(match[1])} {percent(value)}")
        return ", ".join(found)

    sentences = []
    if kept := rates("reconstruction"):
        sentences.append(f"Images that training never saw, turned into a code and back into an image, kept: {kept}.")
    if kept := rates("reconstruction_held_out"):
        sentences.append(f"For combinations of factors that training never saw: {kept}.")
    if _is_rate("unconditional/valid", valid := results.get("unconditional/valid")):
        count = results.get("unconditional/count")
        of = f"Of {number(count)} samples" if finite(count) else "Of the samples"
        sentences.append(f"{of} drawn without any condition, {percent(valid)} are valid.")
    if kept := rates("composition", "_from_parents"):
        sentences.append(f"Images composed of two others have from one of them: {kept}.")
    if _is_rate("composition/both_parents", both := results.get("composition/both_parents")):
        sentences.append(f"In {percent(both)} of the compositions both parents show.")
    if finite(total := results.get("seconds/total")):
        sentences.append(f"The whole run took {duration(total)}.")
    return f"<p>{text(' '.join(sentences))}</p>" if sentences else ""


def _tables(results: Mapping[str, Any]) -> list[str]:
    groups: dict[str, list[str]] = {}
    for key in results:
        if not isinstance(results[key], (dict, list)):
            groups.setdefault(key.partition("/")[0] if "/" in key else "", []).append(key)
    order = [*(name for name in _GROUPS if name in groups), *sorted(name for name in groups if name and name not in _GROUPS)]
    parts = ["<h2>Results</h2>"] if groups else []
    for group in [*order, *([""] if "" in groups else [])]:
        parts.append(_table(group, groups[group], results))
    return parts


def _table(group: str, keys: Sequence[str], results: Mapping[str, Any]) -> str:
    """One group's table: measure, value, and where known the chance level and the count behind the rate."""
    rows = []
    for key in keys:
        parent, _, name = key.rpartition("/")
        beside = f"{parent}/" if parent else ""
        chance, count = results.get(f"{beside}chance_{name}"), _count(beside, name, results)
        if name.endswith("count") or (name.startswith("chance_") and beside + name.removeprefix("chance_") in results):
            continue  # shown in its row
        if not _is_rate(key, results[key]):
            chance = count = None
        label = words(key.removeprefix(f"{group}/") if group else key)
        level = percent(chance) if finite(chance) else ""
        rows.append((label, _value(key, results[key]), level, number(count) if finite(count) else ""))
    if not rows:  # a group of nothing but a count
        rows = [(words(key.partition("/")[2]), number(results[key]), "", "") for key in keys]
    used = [True, True, any(row[2] for row in rows), any(row[3] for row in rows)]
    head = [cell for cell, use in zip(("measure", "value", "by chance", "images"), used) if use]
    lines = [f"<h3>{text(words(group).capitalize() or 'Other')}</h3>"]
    if group in _GROUPS:
        lines.append(f'<p class="note">{text(_GROUPS[group])}</p>')
    lines.append("<table><thead><tr>" + "".join(f"<th>{text(cell)}</th>" for cell in head) + "</tr></thead><tbody>")
    for row in rows:
        lines.append("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell, use in zip(row, used) if use) + "</tr>")
    return "\n".join([*lines, "</tbody></table>"])


def _count(beside: str, name: str, results: Mapping[str, Any]) -> Any:
    """Of `judge/seen_shape` the `judge/seen_shape_count`, `judge/seen_count` or `judge/count`, whichever there is first."""
    parts = name.split("_")
    names = [f"{beside}{'_'.join(parts[:size])}_count" for size in range(len(parts), 0, -1)]
    return next((results[key] for key in [*names, f"{beside}count"] if key in results), None)


def _pictures(steps: Iterable[pathlib.Path]) -> list[str]:
    parts, room = [], LIMIT - _RESERVE
    for step in reversed(list(steps)):  # the last step's pictures are the ones to see first
        captions = _json(step / "pictures" / "captions.json")
        captions = captions if isinstance(captions, dict) else {}
        figures, left_out = [], []
        for path in _shown(sorted((step / "pictures").glob("*.png"), key=_natural)):
            picture = _png(path)
            if picture is None:
                continue
            data, (width, height) = picture
            if 4 * len(data) // 3 > room:
                left_out.append(path.name)
                continue
            room -= 4 * len(data) // 3 + 400
            caption = text(captions.get(path.name) or words(path.stem).capitalize() + ".")
            source = base64.b64encode(data).decode("ascii")
            figures.append(
                f'<figure><img src="data:image/png;base64,{source}" width="{width}" height="{height}" alt="{caption}">'
                f"<figcaption>{caption}</figcaption></figure>"
            )
        if left_out:
            figures.append(f'<p class="note">Too large for this file, see the workdir: {text(", ".join(left_out))}.</p>')
        if figures:
            parts += [f"<h2>Pictures: {text(words(step.name))}</h2>", *figures]
    return parts


def _natural(path: pathlib.Path) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _shown(paths: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """Thins out numbered series, `samples_100.png` and so on, to a few over their whole length."""
    series: dict[str, list[pathlib.Path]] = {}
    for path in paths:
        series.setdefault(re.sub(r"\d+", "#", path.name), []).append(path)
    for name, members in series.items():
        if len(members) > _SERIES:
            series[name] = [members[round(i * (len(members) - 1) / (_SERIES - 1))] for i in range(_SERIES)]
    return [path for members in series.values() for path in members]


def _png(path: pathlib.Path) -> tuple[bytes, tuple[int, int]] | None:
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.load()  # the whole of it: a run may have been killed while it wrote
            return data, image.size
    except Exception:  # whatever a damaged file makes Pillow raise, the report is written without it
        return None


def _curves(steps: Iterable[pathlib.Path]) -> list[str]:
    parts = []
    for step in steps:
        series = read_metrics(step / "metrics.jsonl")
        if not series:
            continue
        parts.append(f"<h2>Curves: {text(words(step.name))}</h2>")
        for title, names in _CURVES.items():
            if lines := {name: series.pop(name) for name in names if name in series}:
                parts.append(chart(title, lines))
        if series:
            charts = [chart(words(name).capitalize(), {name: series[name]}) for name in sorted(series)[:_MORE_CURVES]]
            parts.append("<details><summary>all other curves of this step</summary>\n" + "\n".join(charts) + "\n</details>")
    return parts


def _versions(results: Mapping[str, Any]) -> str:
    rows = [("python", platform.python_version())]
    for name in ("dlc_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy"):
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            pass
    if commit := results.get("commit") or _commit():
        rows.insert(0, ("commit", commit))
    cells = "\n".join(f"<tr><td>{text(name)}</td><td>{text(version)}</td></tr>" for name, version in rows)
    return f"<h2>Versions</h2>\n<table><tbody>\n{cells}\n</tbody></table>"


def _commit() -> str | None:
    """Returns the commit this file is of, and whether the tree was changed since; None where it was not run from a checkout."""

    def git(*arguments: str) -> str:
        call = ["git", "-C", str(pathlib.Path(__file__).parent), *arguments]
        return subprocess.run(call, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", pathlib.Path(__file__).name)  # else the checkout around us may be another project's
        return git("rev-parse", "HEAD") + (" with local changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
