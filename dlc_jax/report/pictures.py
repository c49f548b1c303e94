"""Pictures inside the page: as they are while they are small, smaller and as JPEG when they are not, so that the page stays one file."""

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
    """The pictures of all steps, of at most `room` bytes; first what was made at the end, then what was drawn on the way.

    Each step's directory has `pictures/*.png`, and the sentences below them in
    `pictures/captions.json`, {file: sentence}, in whose order they come.
    """
    ends, ways = [], []
    for step in steps:
        captions = _captions(step / "pictures" / "captions.json")
        listed = {name: place for place, name in enumerate(captions)}
        paths = sorted(
            (step / "pictures").glob("*.png"),
            key=lambda path: (listed.get(path.name, len(listed)), natural(path.name)),
        )
        series = len(paths) > 1 and len({re.sub(r"\d+", "#", path.name) for path in paths}) == 1
        paths = sorted(paths, key=lambda path: natural(path.name)) if series else paths
        (ways if series else ends).append((step, paths, captions))
    parts = []
    for found, title in ((ends, "Pictures"), (ways, "Learning to draw")):
        for step, paths, captions in found:
            figures, left_out = [], []
            for path in shown(paths):
                picture = embedded(path)
                if picture is None:
                    continue
                source, (width, height) = picture
                caption = text(captions.get(path.name) or words(path.stem).capitalize() + ".")
                figure = (
                    f'<figure><img src="{source}" width="{width}" height="{height}" alt="{caption}">'
                    f"<figcaption>{caption}</figcaption></figure>"
                )
                if len(figure.encode()) > room:
                    left_out.append(path.name)
                    continue
                room -= len(figure.encode())
                figures.append(figure)
            if left_out:
                names = ", ".join(left_out[:10]) + (
                    f" and {len(left_out) - 10} more" if len(left_out) > 10 else ""
                )
                figures.append(
                    f'<p class="note">Too large for this file, see the workdir: {text(names)}.</p>'
                )
            if figures:
                parts += [
                    f"<h2>{title}: {text(words(step.name))}</h2>",
                    '<div class="pictures">',
                    *figures,
                    "</div>",
                ]
    return parts


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
        series.setdefault(re.sub(r"\d+", "#", path.name), []).append(path)
    for name, members in series.items():
        if len(members) > _SERIES:
            members = sorted(members, key=lambda path: natural(path.name))
            series[name] = [
                members[round(i * (len(members) - 1) / (_SERIES - 1))] for i in range(_SERIES)
            ]
    return [path for members in series.values() for path in members]


def natural(name: str) -> list:
    """For sorting: step_9 before step_10."""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]


def _captions(path: pathlib.Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return (
        {name: str(sentence) for name, sentence in found.items()} if isinstance(found, dict) else {}
    )
