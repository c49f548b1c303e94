"""The page: one file with all it needs, no network, script or server. It reads well on a phone."""

import contextlib
import json
import os
import pathlib
from typing import Any

from dlc_jax.errors import UserError
from dlc_jax.report import curves, pictures, tables
from dlc_jax.report.words import text

LIMIT = 8_000_000  # bytes of the whole file
# a run's usual order; other steps follow
_STEPS = ("encoder", "codes", "probe", "prior", "generator", "samples")

_STYLE = """
:root { color-scheme: light dark; }
:root { --paper: #fff; --ink: #1c1c1e; --faint: #6b6b70; --rule: #d8d8dc; }
:root { --a: #1f6fd1; --b: #c2571a; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #161618; --ink: #ececee; --faint: #a0a0a6; --rule: #3a3a3e; }
  :root { --a: #6cb0ff; --b: #ff9d5c; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 52rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.2; }
h2 { margin: 2.4rem 0 .4rem; font-size: 1.25rem; line-height: 1.25; }
h3 { margin: 1.1rem 0 .3rem; font-size: 1.05rem; }
p.note, figcaption, summary { color: var(--faint); }
summary { padding: .4rem 0; cursor: pointer; }
figcaption { margin-top: .3rem; font-size: .9rem; line-height: 1.4; }
p.note { margin: 0 0 .5rem; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .4rem; border-bottom: 1px solid var(--rule); text-align: right; }
th { font-weight: normal; }
th:first-child, td:first-child { text-align: left; }
td.number, thead th { white-space: nowrap; }
thead th { color: var(--faint); font-size: .85rem; }
figure { margin: .8rem 0 1.4rem; }
figure h3 { margin-top: 0; }
.charts, .pictures { display: grid; gap: 0 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 23rem), 1fr)); }
img { display: block; max-width: 100%; height: auto; }
svg { display: block; width: 100%; max-width: 34rem; height: auto; }
svg text { fill: var(--faint); font: 15px system-ui, sans-serif; }
svg .rule { stroke: var(--rule); }
svg polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .s0 { stroke: var(--a); }
svg .s1 { stroke: var(--b); stroke-dasharray: 8 4; }
svg polyline.s1 { stroke-width: 3.5; }
svg circle.s0 { fill: var(--a); }
svg circle.s1 { fill: var(--b); }
svg .bars { fill: var(--a); }
svg text.l0 { fill: var(--a); }
svg text.l1 { fill: var(--b); }
pre { overflow-x: auto; white-space: pre-wrap; font-size: .85rem; }
"""


def write(workdir: str | os.PathLike, path: str | os.PathLike | None = None) -> pathlib.Path:
    """Writes the report of a workdir; what is missing or unreadable is left out.

    It shows `config.json`, `results.json` and, of each step's directory, `metrics.jsonl` (an object
    per line with `step`) and `pictures/*.png` with `pictures/captions.json` ({file: sentence}).

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
        raise UserError(f"no workdir at {workdir}: give the directory of a run")
    path = workdir / "report.html" if path is None else pathlib.Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(_page(workdir), encoding="utf-8")
        os.replace(partial, path)  # a reader never finds half a report
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"cannot write the report {path}: {reason}; give another path or make room"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
    return path


def _page(workdir: pathlib.Path) -> str:
    config, results = _json(workdir / "config.json"), _json(workdir / "results.json")
    results = results if isinstance(results, dict) else {}
    title = f"dlc_jax: {workdir.resolve().name}"
    steps = _steps(workdir, config)
    before = [f"<h1>{text(title)}</h1>", tables.summary(results)]
    after = [
        *curves.usage(steps),
        *curves.curves(steps),
        *tables.tables(results),
        tables.timings(results),
        tables.versions(results),
    ]
    if config is not None:
        listed = text(json.dumps(config, indent=2, ensure_ascii=False)[:200_000])
        fields = f"<summary>every field of this run</summary><pre>{listed}</pre>"
        after.append(f"<h2>Config</h2>\n<details>{fields}</details>")
    frame = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n",
        "\n</body>\n</html>\n",
    )
    headings = 10_000  # bytes that those of the pictures take at most
    used = len("\n".join([*frame, *before, *after]).encode()) + headings
    shown = pictures.sections(steps, room=LIMIT - used)
    content = "\n".join(part for part in [*before, *shown, *after] if part)
    return frame[0] + content + frame[1]


def _steps(workdir: pathlib.Path, config: Any) -> list[pathlib.Path]:
    """Directories of steps: usual ones that the recipe does not name, the recipe's, then others."""
    try:
        order = list(config["steps"])
    except (KeyError, TypeError):
        order = []
    order = [*(name for name in _STEPS if name not in order), *order]
    place = {name: index for index, name in reversed(list(enumerate(order)))}
    traces = ("metrics.jsonl", "pictures", "usage.json")
    found = [path for path in workdir.iterdir() if any((path / name).exists() for name in traces)]
    return sorted(found, key=lambda path: (place.get(path.name, len(order)), path.name))


def _json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
