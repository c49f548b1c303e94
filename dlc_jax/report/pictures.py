"""Pictures inside the page: bit for bit if they are small, otherwise scaled down and as JPEG."""

import base64
import io
import json
import pathlib
import re
from collections.abc import Iterable, Sequence

from PIL import Image

from dlc_jax.report.words import text, words

_SERIES = 6  # pictures shown of a numbered series, such as sample grids over training time
_SMALL = 400_000  # bytes: a PNG up to here is shown bit for bit
_WIDEST, _HIGHEST = 1400, 2800  # pixels of what is larger; the page is 832 wide
_QUALITY = 85


def sections(steps: Iterable[pathlib.Path], *, room: int) -> list[str]:
    """The pictures of all steps, of at most `room` bytes: final ones first, series after them.

    Each step's directory has `pictures/*.png`. The sentences below them are in
    `pictures/captions.json`, {file: sentence}, and give the order.
    """
    final, series = [], []
    for step in steps:
        captions = _captions(step / "pictures" / "captions.json")
        place = {name: index for index, name in enumerate(captions)}
        paths = sorted((step / "pictures").glob("*.png"), key=lambda path: natural(path.name))
        is_series = len(paths) > 1 and len({_pattern(path) for path in paths}) == 1
        if not is_series:
            paths.sort(key=lambda path: place.get(path.name, len(place)))
        (series if is_series else final).append((step, paths, captions))
    parts = []
    for found, title in ((final, "Pictures"), (series, "Learning to draw")):
        for step, paths, captions in found:
            figures, left_out = [], []
            for path in shown(paths):
                figure = _figure(path, captions.get(path.name))
                if not figure:
                    continue
                if len(figure.encode()) > room:
                    left_out.append(path.name)
                else:
                    room -= len(figure.encode())
                    figures.append(figure)
            if left_out:
                more = f" and {len(left_out) - 10} more" if len(left_out) > 10 else ""
                names = text(", ".join(left_out[:10]) + more)
                note = f"Too large for this file, see the workdir: {names}."
                figures.append(f'<p class="note">{note}</p>')
            if figures:
                heading = f"<h2>{title}: {text(words(step.name))}</h2>"
                parts += [heading, '<div class="pictures">', *figures, "</div>"]
    return parts


def _figure(path: pathlib.Path, caption: str | None) -> str:
    """The picture with its sentence; "" if it is damaged."""
    picture = embedded(path)
    if picture is None:
        return ""
    source, (width, height) = picture
    caption = text(caption or words(path.stem).capitalize() + ".")
    image = f'<img src="{source}" width="{width}" height="{height}" alt="{caption}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _pattern(path: pathlib.Path) -> str:
    """The file's name without its numbers: equal for all pictures of a series."""
    return re.sub(r"\d+", "#", path.name)


def embedded(path: pathlib.Path) -> tuple[str, tuple[int, int]] | None:
    """(data URL, (width, height)) of a PNG; None if it is damaged."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.load()  # the whole of it: a run may have been killed while it wrote
            size, kind = image.size, "png"
            if len(data) > _SMALL:
                image = image.convert("RGB")
                image.thumbnail((_WIDEST, _HIGHEST), Image.Resampling.LANCZOS)
                file = io.BytesIO()
                image.save(file, format="JPEG", quality=_QUALITY, optimize=True)
                data, size, kind = file.getvalue(), image.size, "jpeg"
    except Exception:
        # whatever a damaged file makes Pillow raise, the report is written without it
        return None
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}", size


def shown(paths: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """Thins out numbered series, `samples_100.png` and so on, to a few over their whole length."""
    series: dict[str, list[pathlib.Path]] = {}
    for path in paths:
        series.setdefault(_pattern(path), []).append(path)
    for name, members in series.items():
        if len(members) > _SERIES:
            members = sorted(members, key=lambda path: natural(path.name))
            apart = (len(members) - 1) / (_SERIES - 1)
            series[name] = [members[round(i * apart)] for i in range(_SERIES)]
    return [path for members in series.values() for path in members]


def natural(name: str) -> list:
    """For sorting: step_9 before step_10."""
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _captions(path: pathlib.Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found = found if isinstance(found, dict) else {}
    return {name: str(sentence) for name, sentence in found.items()}
