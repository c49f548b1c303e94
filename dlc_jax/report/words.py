"""Names and numbers as a person reads them."""

import html
import math
import re
from typing import Any


def text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def words(name: str) -> str:
    return re.sub(r"[_/]+", " ", name).strip()


def number(value: Any) -> str:
    if not finite(value):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}".replace(",", "\u202f")
    return f"{value:.4g}"


def percent(value: float) -> str:
    # No rounding up to a perfect score: 99.97 is shown as > 99.9.
    if 0.9995 <= value < 1:
        return "> 99.9 %"
    return f"{100 * value:.1f}".removesuffix(".0") + " %"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
