"""A full config in words: every field with its value, type, default and documentation."""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from dlc_jax.recipe import fields
from dlc_jax.recipe.expansion import ROOT, kinds
from dlc_jax.recipe.fields import REQUIRED, Choice, Constructor, Either, Field, Sections
from dlc_jax.recipe.values import spelled

WIDTH = 100


def listing(config: Mapping[str, Any]) -> Iterator[str]:
    """Lines `name = value  # type, default: documentation`, with an empty one between sections.

    The default is left out where it is the value.

    Args:
      config: expanded, its sections in the order in which they are listed.
    """
    section = ""
    for name, kind, value, default, doc in described(config):
        above, section = section, name.rpartition(".")[0]
        if above != section:
            yield ""
        usual = "required" if default is REQUIRED else f"default {default!r}"
        about = f"{kind}: {doc}" if value == default else f"{kind}, {usual}: {doc}"
        line = f"{name} = {value!r}"
        if len(f"{line}  # {about}") <= WIDTH:
            yield f"{line}  # {about}"
        else:
            yield line
            marks = {"initial_indent": "    # ", "subsequent_indent": "    # "}
            yield from textwrap.wrap(about, WIDTH, break_on_hyphens=False, **marks)


def described(config: Mapping[str, Any]) -> Iterator[tuple[str, str, Any, Any, str]]:
    """(dotted name, type, value, default, documentation) of every field of an expanded config."""
    own = fields.fields(ROOT)
    for name, value in config.items():
        if name in own:
            yield from _described(own[name], value, name, own[name].default)
        else:
            yield (f"{name}.stage", "str", value["stage"], value["stage"], "kind of step")
            yield from _described(Field(name, kinds()[value["stage"]], {}, ""), value, name, {})


def _described(field: Field, value: Any, name: str, default: Any):
    """A field, or those of a section, the plain ones first."""
    kind = field.kind
    if isinstance(kind, Either) and isinstance(value, Mapping):  # an optional section
        kind = next(each for each in kind.kinds if isinstance(each, Constructor))
    changes = default if isinstance(default, dict) else {}
    if isinstance(kind, Choice):
        usual = changes.get("name", next(iter(kind.options)))
        yield (f"{name}.name", "str", value["name"], usual, f"one of {', '.join(kind.options)}")
        kind = kind.options[value["name"]]
    if isinstance(kind, Sections):
        inner = [Field(key, kind.of, {}, "") for key in value]
    elif isinstance(kind, Constructor):
        inner = fields.fields(kind).values()
    else:
        yield (name, spelled(kind), value, default, field.doc)
        return
    for each in sorted(inner, key=lambda each: isinstance(value[each.name], Mapping)):
        usual = changes.get(each.name, each.default)
        yield from _described(each, value[each.name], f"{name}.{each.name}", usual)
