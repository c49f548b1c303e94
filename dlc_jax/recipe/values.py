"""A value as a field holds it: of the field's type, from Python or from the command line's text."""

import ast
import contextlib
from collections.abc import Mapping
from typing import Any

from dlc_jax.errors import UserError
from dlc_jax.recipe.fields import Either, Tuple


class Text(str):
    """A value as the command line gives it; its meaning depends on the field."""


def accepted(kind: Any, value: Any, name: str) -> Any:
    """A value as a field of this kind holds it: 1 as 1.0, 1e6 as a whole number, text as it reads.

    Raises:
      UserError: it is of another type.
    """
    if isinstance(value, Mapping):
        raise UserError(f"{name} is not a section; it is of type {spelled(kind)}")
    try:
        return _accepted(kind, value)
    except ValueError:
        shown = str(value) if isinstance(value, Text) else value
        raise UserError(f"{name}={shown!r} is not of type {spelled(kind)}") from None


def _accepted(kind: Any, value: Any) -> Any:
    """Raises ValueError for a value of another type."""
    if isinstance(kind, Either):
        if isinstance(value, Text) and value == "None" and None in kind.kinds:
            return None  # not the text
        for each in kind.kinds:
            with contextlib.suppress(ValueError):
                return _accepted(each, value)
    elif isinstance(value, Text):
        return _accepted(kind, _read(kind, value))
    elif isinstance(kind, Tuple) and isinstance(value, list | tuple):
        kinds = kind.entries * len(value) if kind.repeated else kind.entries
        return tuple(_accepted(each, inner) for each, inner in zip(kinds, value, strict=True))
    elif kind is float and type(value) is int:
        return float(value)
    elif kind is int and type(value) is float and value.is_integer():
        return int(value)
    elif value is None if kind is None else type(value) is kind:
        return value
    raise ValueError


def _read(kind: Any, text: Text) -> Any:
    """The text as a literal of Python, or as text where it is none or the field is one of text.

    Tuples of any length may be written without parentheses, `a,b`.
    """
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = str(text)
    if kind is str and not isinstance(value, str):
        return str(text)
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), value)
    if isinstance(kind, Tuple) and kind.repeated and not isinstance(value, list | tuple):
        return tuple(Text(part.strip()) for part in text.split(",") if part.strip())
    return value


def spelled(kind: Any) -> str:
    """A kind of field in words, as an annotation has it."""
    match kind:
        case None:
            return "None"
        case Tuple(entries=entries, repeated=repeated):
            return f"tuple[{', '.join([*map(spelled, entries), *(['...'] if repeated else [])])}]"
        case Either(kinds=each):
            return " | ".join(map(spelled, each))
        case type():
            return kind.__name__
    return "a section"
