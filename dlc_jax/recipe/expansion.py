"""A recipe's own lines to the full, typed, locked config: every field of every constructor.

    expand({"data.name": "shapes", "*.optimizer.warmup": 100, "encoder.train.steps": 320})

Names are those of the command line, `--config.encoder.train.steps=320`; see `lines` for patterns.
A section other than the recipe's own (`agenda.Recipe`) is a step: its `stage`, by default its name,
says of which kind.
"""

import difflib
import fnmatch
import functools
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from dlc_jax.errors import UserError
from dlc_jax.recipe import fields, former, lines
from dlc_jax.recipe.fields import REQUIRED, Choice, Constructor, Either, Field, Sections
from dlc_jax.recipe.values import accepted, spelled

ROOT = Constructor("dlc_jax.agenda", "Recipe")


def expand(given: Mapping[str, Any]) -> ConfigDict:
    """The full config of a recipe's lines.

    Args:
      given: {dotted name: value}, or nested; a `Text` is read as its field needs it.

    Raises:
      UserError: an unknown field (with the nearest name), a value of another type, or a field
        without a default that is not given.
    """
    return ConfigDict(expanded(given)).lock()


def expanded(given: Mapping[str, Any]) -> dict[str, Any]:
    """As `expand`, with the recipe's own fields first and then its steps in their order."""
    found = lines.resolved(lines.flat(given))
    plain = {name: value for name, value in found.items() if "*" not in name}
    if len(plain) < len(found):
        names, plain = lines.flat(_full(lines.nested(plain))), {}
        for name, value in found.items():
            matched = fnmatch.filter(names, name) if "*" in name else [name]
            if not matched:
                raise UserError(f"{name!r} matches no field")
            plain = lines.later(plain, dict.fromkeys(matched, value))
    return _full(lines.nested(plain))


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
            config[name] = _step(name, section)
        else:
            config[name] = section
    return config


def changed(config: Mapping[str, Any], flags: Mapping[str, Any]) -> ConfigDict:
    """An expanded config with some fields set.

    Raises:
      UserError: as `expand`.
    """
    given = lines.later(lines.flat(config.to_dict()), flags)
    return ConfigDict(present(lines.nested(given))).lock()


def complete(cls: type, given: Mapping[str, Any]) -> dict:
    """A section of an earlier version with the fields that are new, at their defaults.

    A new field's default means what was before it, so what depends on the section is unchanged.
    """
    return _section(fields.of_class(cls), given, cls.__name__)


@functools.cache
def kinds() -> dict[str, Constructor]:
    """{kind of step: constructor of its section}."""
    return {
        kind: Constructor(make.module, "Section")
        for kind, make in fields.constant("dlc_jax.stages", "STAGES").items()
    }


def _full(tree: Mapping[str, Any]) -> dict[str, Any]:
    own, config = fields.fields(ROOT), {}
    for name, field in own.items():
        if name in tree or not isinstance(field.kind, Either):  # one that is optional
            config[name] = _expanded(field, tree, name)
    # A part of the usual steps is still of the whole recipe: the workdir remembers all of it, and
    # `dlc sample` finds there how to sample.
    steps, usual = config["steps"], own["steps"].default
    waiting = [*(usual if set(steps) <= set(usual) else steps), *(n for n in tree if n not in own)]
    while waiting:
        name = waiting.pop(0)
        if name not in config:
            config[name] = _step(name, tree.get(name, {}))
            waiting += _reads(config[name])
    return config


def _reads(section: Mapping[str, Any]) -> list[str]:
    """The steps that a section reads: fields that by default name one."""
    known = fields.fields(kinds()[section["stage"]])
    readers = [name for name, field in known.items() if str(field.default) in kinds()]
    return [section[name] for name in readers if section[name]]


def _step(name: str, given: Any) -> dict:
    """The section of a step."""
    stages, stage = kinds(), name
    if isinstance(given, Mapping) and "stage" in given:
        stage = str(given["stage"])
        given = {key: value for key, value in given.items() if key != "stage"}
    if stage in stages:
        return {"stage": stage, **_section(stages[stage], given, name)}
    if stage != name:
        raise UserError(f"{name}.stage={stage!r} is unknown{_nearest(stage, stages)}")
    known = [*fields.fields(ROOT), *stages]
    raise UserError(f"unknown field {name!r}{_nearest(name, known)}")


def _expanded(field: Field, given: Mapping[str, Any], name: str) -> Any:
    """The value of one field; `given` is the section it is in."""
    value, kind = given.get(field.name, field.default), field.kind
    if isinstance(kind, Either) and any(isinstance(each, Constructor) for each in kind.kinds):
        if value is None:
            return None
        kind = next(each for each in kind.kinds if isinstance(each, Constructor))
    if isinstance(kind, Constructor | Choice | Sections):
        value = given.get(field.name, {})
        if isinstance(field.default, dict) and isinstance(value, Mapping):
            value = lines.nested(lines.later(lines.flat(field.default), lines.flat(value)))
        return _section(kind, value, name)
    if value is REQUIRED:
        raise UserError(f"{name} is not set; give --config.{name}={spelled(kind)}")
    return accepted(kind, value, name)


def _section(kind: Any, given: Any, name: str) -> dict:
    """A section; a plain value for it is short for its `path`, --config.codes=W/codes."""
    given = dict(given) if isinstance(given, Mapping) else {"": given}
    if given.get("", REQUIRED) is None:  # takes back what is not there
        del given[""]
    if isinstance(kind, Sections) and "" not in given:
        return {
            str(key): _section(kind.of, value, f"{name}.{key}")
            for key, value in (given or {"all": {}}).items()
        }
    found = {}
    if isinstance(kind, Choice) and "" not in given:
        before = list(given)[: list(given).index("name")] if "name" in given else []
        chosen = accepted(str, given.pop("name", next(iter(kind.options))), f"{name}.name")
        if chosen not in kind.options:
            raise UserError(f"{name}.name={chosen!r} is unknown{_nearest(chosen, kind.options)}")
        options, kind, found = kind.options, kind.options[chosen], {"name": chosen}
        # A name takes back what earlier lines say of the fields that another choice has.
        others = set().union(*(fields.fields(each) for each in options.values()))
        for key in (others - fields.fields(kind).keys()).intersection(before):
            del given[key]
    known = fields.fields(kind) if isinstance(kind, Constructor) else {}
    if "" in given and "path" not in known:
        value = str(given[""])
        raise UserError(f"{name} is a section, not {value!r}: set its fields, --config.{name}.NAME")
    given |= {"path": given.pop("")} if "" in given else {}
    for key in given:
        if key not in known:
            near = _nearest(key, [*found, *known], f"{name}.")
            raise UserError(f"unknown field {f'{name}.{key}'!r}{near}")
    return found | {key: _expanded(field, given, f"{name}.{key}") for key, field in known.items()}


def _nearest(name: str, known: Iterable[str], above: str = "") -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {f'{above}{near[0]}'!r}?" if near else f"; there are {', '.join(known)}"
