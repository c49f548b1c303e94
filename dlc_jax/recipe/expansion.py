"""A recipe's own lines to the full, typed, locked config: every field of every constructor.

    expand({"data.name": "shapes", "*.optimizer.warmup": 100, "encoder.train.steps": 320})

Names are those of the command line, `--config.encoder.train.steps=320`. What comes later counts:

    "*.train.steps": 24         every field of a name that matches
    "encoder.crops": None       takes back the lines of a section; "*" those of all
    "other.like": "generator"   gives a step the lines of another, but for its own

A section other than the recipe's own (`agenda.Recipe`) is a step: its `stage`, by default its name,
says of which kind.
"""

import ast
import difflib
import fnmatch
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from dlc_jax.errors import UserError
from dlc_jax.recipe import fields, former
from dlc_jax.recipe.fields import REQUIRED, Choice, Constructor, Either, Field, Sections, Tuple

ROOT = Constructor("dlc_jax.agenda", "Recipe")
NAME = Field("name", str, REQUIRED, "which one")


class Text(str):
    """A value as the command line gives it; its meaning depends on the field."""


def expand(given: Mapping[str, Any]) -> ConfigDict:
    """The full config of a recipe's lines.

    Args:
      given: {dotted name: value}, or nested; a `Text` is read as its field needs it.

    Raises:
      UserError: an unknown field (the nearest name is told), a value of another type, or a field
        without a default that is not given.
    """
    lines = _resolved(flat(given))
    plain = {name: value for name, value in lines.items() if "*" not in name}
    if len(plain) < len(lines):
        names, plain = flat(_full(nested(plain))), {}
        for name, value in lines.items():
            matched = [each for each in names if fnmatch.fnmatchcase(each, name)]
            if "*" in name and not matched:
                raise UserError(f"{name!r} matches no field")
            plain = later(plain, dict.fromkeys(matched if "*" in name else [name], value))
    return ConfigDict(_full(nested(plain))).lock()


def present(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A config of this or an earlier version with every field of this one.

    Fields that are new have their defaults, which mean what was before them.

    Raises:
      UserError: as `expand`.
    """
    own, config = fields.fields(ROOT), {}
    for name, section in former.config(saved).items():
        if name in own:
            config[name] = _expanded(own[name], {name: section}, name)
        elif isinstance(section, Mapping) and section.get("stage") in kinds():
            config[name] = step(name, section)
        else:
            config[name] = section
    return config


def changed(config: Mapping[str, Any], flags: Mapping[str, Any]) -> ConfigDict:
    """An expanded config with some fields set.

    Raises:
      UserError: as `expand`.
    """
    lines = later(flat(config.to_dict()), flags)
    return ConfigDict(present(nested(lines))).lock()


def later(lines: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Lines with more after them: what is set again moves to the end."""
    return {name: value for name, value in lines.items() if name not in more} | dict(more)


def _resolved(given: Mapping[str, Any]) -> dict[str, Any]:
    """Lines without `like` and without those that were taken back."""
    lines: dict[str, Any] = {}
    for name, value in given.items():
        below = {key for key in lines if key.startswith(f"{name}.") or name == "*"}
        if value is None and below:
            lines = {key: each for key, each in lines.items() if key not in below}
        else:
            lines = later(lines, {name: value})
    alike = {name: str(value) for name, value in lines.items() if name.endswith(".like")}
    for name, other in alike.items():
        step, copied = name.removesuffix(".like"), {}
        for key, value in lines.items():  # each copy beside its original: what is later counts
            copied[key] = value
            target = f"{step}.{key.removeprefix(f'{other}.')}"
            if key.startswith(f"{other}.") and target not in lines:
                copied[target] = value
        copied[f"{step}.stage"] = other
        lines = {key: value for key, value in copied.items() if key != name}
    return lines


def _full(tree: Mapping[str, Any]) -> dict[str, Any]:
    own, config = fields.fields(ROOT), {}
    for name, field in own.items():
        if isinstance(field.kind, Either) and name not in tree:
            continue  # an optional section
        config[name] = _expanded(field, tree, name)
    waiting = [*config["steps"], *(key for key in tree if key not in own)]
    while waiting:
        name = waiting.pop(0)
        if name not in config:
            config[name] = step(name, tree.get(name, {}))
            waiting += _named(config[name])
    return config


def _named(section: Mapping[str, Any]) -> list[str]:
    """The steps that a section reads: fields that by default name one."""
    known = fields.fields(kinds()[section["stage"]])
    readers = [name for name, field in known.items() if str(field.default) in kinds()]
    return [section[name] for name in readers if section[name]]


def step(name: str, given: Any) -> dict:
    """The section of a step."""
    stages = kinds()
    if isinstance(given, Mapping):
        stage = str(given.get("stage", name))
    else:
        stage, given = name, _path_of(name, given, stages.get(name))
    if stage not in stages:
        what = f"{name}.stage={stage!r}" if "stage" in given else f"{name!r}"
        known = [*fields.fields(ROOT), *stages]
        raise UserError(
            f"unknown field {what}{_nearest(stage, known)}; kinds of steps: {', '.join(stages)}"
        )
    inner = {key: value for key, value in given.items() if key != "stage"}
    return {"stage": stage, **_section(stages[stage], inner, name)}


@functools.cache
def kinds() -> dict[str, Constructor]:
    """{kind of step: constructor of its section}."""
    return {
        kind: Constructor(make.module, "Section")
        for kind, make in fields.constant("dlc_jax.stages", "STAGES").items()
    }


def nested(given: Mapping[str, Any]) -> dict:
    """A tree of dicts from dotted names."""
    tree: dict = {}
    for name, value in given.items():
        *path, last = str(name).split(".")
        inner = tree
        for part in path:
            if not isinstance(inner.setdefault(part, {}), dict):
                inner[part] = {"": inner[part]}  # a section that has a value: told later
            inner = inner[part]
        inner[last] = value
    return tree


def flat(tree: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """{dotted name: value} of a tree; an empty section is a value."""
    found = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{above}{name}.")
        else:
            found[f"{above}{name}"] = value
    return found


def described(config: Mapping[str, Any]) -> Iterator[tuple[str, str, Any, Any, str]]:
    """(dotted name, type, value, default, documentation) of every field of an expanded config."""
    own = fields.fields(ROOT)
    for name, value in config.items():
        if name in own:
            yield from _described(own[name], value, name, own[name].default)
        else:
            yield (f"{name}.stage", "str", value["stage"], value["stage"], "kind of step")
            inner = {key: each for key, each in value.items() if key != "stage"}
            yield from _described(Field(name, kinds()[value["stage"]], {}, ""), inner, name, {})


def complete(cls: type, given: Mapping[str, Any]) -> dict:
    """A section of an earlier version with the fields that are new, at their defaults.

    A new field's default means what was before it, so what depends on the section is unchanged.
    """
    return _section(fields.of_class(cls), dict(given), cls.__name__)


def _described(field: Field, value: Any, name: str, default: Any):
    kind = _constructor(field.kind, value)
    if isinstance(kind, Sections) and isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _described(Field(key, kind.of, {}, ""), inner, f"{name}.{key}", {})
    elif isinstance(kind, Constructor) and isinstance(value, Mapping):
        changes = default if isinstance(default, dict) else {}
        if isinstance(field.kind, Choice):
            usual = changes.get("name", next(iter(field.kind.options)))
            said = f"one of {', '.join(field.kind.options)}"
            yield (f"{name}.name", "str", value["name"], usual, said)
        for inner in fields.fields(kind).values():
            usual = changes.get(inner.name, inner.default)
            yield from _described(inner, value[inner.name], f"{name}.{inner.name}", usual)
    else:
        yield (name, spelled(field.kind), value, default, field.doc)


def _constructor(kind: Any, value: Any) -> Any:
    """The kind of section that a value is of."""
    if isinstance(kind, Choice):
        return kind.options[value["name"]]
    if isinstance(kind, Either):
        return next((each for each in kind.kinds if isinstance(each, Constructor)), kind)
    return kind


def _expanded(field: Field, given: Mapping[str, Any], name: str) -> Any:
    """The value of one field; `given` is the section it is in."""
    value = given.get(field.name, REQUIRED)
    kind = field.kind
    if isinstance(kind, Either) and any(isinstance(each, Constructor) for each in kind.kinds):
        if value is REQUIRED or value is None:
            return None
        kind = next(each for each in kind.kinds if isinstance(each, Constructor))
    if isinstance(kind, Constructor | Choice | Sections):
        changes = field.default if isinstance(field.default, dict) else {}
        if value is REQUIRED:
            value = {}
        if not isinstance(value, Mapping):
            value = _path_of(name, value, kind)
        return _section(kind, nested(flat(changes) | flat(value)), name)
    if value is REQUIRED:
        if field.default is REQUIRED:
            raise UserError(f"{name} is not set; give --config.{name}={spelled(kind)}")
        value = field.default
    return accepted(kind, value, name)


def _section(kind: Any, given: Mapping[str, Any], name: str) -> dict:
    found = {}
    if isinstance(kind, Sections):
        given = given or {"all": {}}
        return {
            str(key): _expanded(Field(key, kind.of, {}, ""), given, f"{name}.{key}")
            for key in given
        }
    if isinstance(kind, Choice):
        chosen = accepted(str, given.get("name", next(iter(kind.options))), f"{name}.name")
        if chosen not in kind.options:
            raise UserError(f"{name}.name={chosen!r} is unknown; known: {', '.join(kind.options)}")
        given = {key: value for key, value in given.items() if key != "name"}
        kind, found = kind.options[chosen], {"name": chosen}
    known = fields.fields(kind)
    for key in given:
        if key not in known:
            raise UserError(f"unknown field {f'{name}.{key}'!r}{_nearest(key, known, f'{name}.')}")
    return found | {key: _expanded(field, given, f"{name}.{key}") for key, field in known.items()}


def accepted(kind: Any, value: Any, name: str) -> Any:
    """A value as a field of this kind holds it.

    Raises:
      UserError: it is of another type.
    """
    found = _accepted(kind, value)
    if found is REQUIRED:
        shown = (
            dict(value)
            if isinstance(value, Mapping)
            else str(value)
            if isinstance(value, Text)
            else value
        )
        raise UserError(f"{name}={shown!r} is not of type {spelled(kind)}")
    return found


def _accepted(kind: Any, value: Any) -> Any:
    """REQUIRED stands for no."""
    if isinstance(kind, Either):
        return next(
            (it for each in kind.kinds if (it := _accepted(each, value)) is not REQUIRED), REQUIRED
        )
    if isinstance(value, Text):
        return _read(kind, value)
    if isinstance(kind, Tuple):
        if not isinstance(value, list | tuple):
            return REQUIRED
        wanted = kind.entries * len(value) if kind.repeated else kind.entries
        found = [_accepted(each, inner) for each, inner in zip(wanted, value)]
        right = len(wanted) == len(value) and not any(each is REQUIRED for each in found)
        return tuple(found) if right else REQUIRED
    if kind is float and type(value) in (int, float):
        return float(value)
    if kind is int and type(value) is float and value.is_integer():
        return int(value)
    right = value is None if kind is None else type(value) is kind
    return value if right else REQUIRED


def _read(kind: Any, text: Text) -> Any:
    """What the command line gives for a field of this kind."""
    try:
        value = ast.literal_eval(str(text))
    except (ValueError, SyntaxError):
        value = REQUIRED
    if kind is str:
        return value if isinstance(value, str) else str(text)
    if kind is bool:
        return {"true": True, "false": False}.get(
            text.lower(), value if type(value) is bool else REQUIRED
        )
    if isinstance(kind, Tuple) and kind.repeated and not isinstance(value, list | tuple):
        value = tuple(Text(part.strip()) for part in text.split(",") if part.strip())
    elif isinstance(kind, Tuple) and value is REQUIRED:
        return REQUIRED
    return REQUIRED if value is REQUIRED else _accepted(kind, value)


def _path_of(name: str, value: Any, kind: Any) -> dict:
    """--config.codes=W/codes is short for --config.codes.path=W/codes."""
    if isinstance(kind, Constructor) and "path" in fields.fields(kind):
        return {"path": value}
    raise UserError(
        f"{name} is a section, not {str(value)!r}: set its fields, --config.{name}.NAME=VALUE"
    )


def _nearest(name: str, known, above: str = "") -> str:
    near = difflib.get_close_matches(str(name), [str(each) for each in known], n=1, cutoff=0.5)
    return f"; did you mean {f'{above}{near[0]}'!r}?" if near else f"; there are {', '.join(known)}"


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
