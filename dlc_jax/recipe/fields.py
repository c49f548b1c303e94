"""What can be set: the fields of a constructor, read from its source without running it.

A section of a recipe holds the keyword arguments of one constructor, a class or a function. Its
annotated arguments are the fields; its defaults and the first sentences of its docstring's list are
theirs. Reading needs no import, so a mistake in a recipe is refused before jax is loaded.
`build` then calls the constructors.

An annotation is int, float, str, bool, None, a union or a tuple of these, another constructor (a
section within the section), `Mapping[str, CONSTRUCTOR]` (sections by any names), or
`Annotated[..., CHOICES]` (a section whose `name` chooses among {name: constructor}).
"""

import ast
import dataclasses
import functools
import importlib
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REQUIRED = object()  # the default of a field that has none
SCALARS = {"int": int, "float": float, "str": str, "bool": bool, "None": None}


@dataclasses.dataclass(frozen=True)
class Constructor:
    """A class or function, by the module and the name it is defined under."""

    module: str
    name: str

    def load(self):
        """The class or function itself."""
        return getattr(importlib.import_module(self.module), self.name)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of several constructors, by name; the first is the default."""

    options: Mapping[str, Constructor]


@dataclasses.dataclass(frozen=True)
class Sections:
    """Sections of one constructor by any names; where none is named, one called `all`."""

    of: Constructor


@dataclasses.dataclass(frozen=True)
class Tuple:
    """Entries of these kinds; with `repeated`, any number of the first kind."""

    entries: tuple
    repeated: bool


@dataclasses.dataclass(frozen=True)
class Either:
    """One of several kinds."""

    kinds: tuple


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of a section.

    Attributes:
      name: of the argument.
      kind: int, float, str, bool, None, or one of the classes above.
      default: REQUIRED without one; of a section, what it changes in its constructor's defaults.
      doc: one sentence.
    """

    name: str
    kind: Any
    default: Any
    doc: str


@functools.cache
def fields(constructor: Constructor) -> dict[str, Field]:
    """{name: Field} of a constructor's annotated arguments, in their order.

    Raises:
      ValueError: an annotation of a form that no recipe can hold.
    """
    node, docs = _defined(constructor.module, constructor.name), {}
    if isinstance(node, ast.ClassDef):
        init = next((each for each in node.body if getattr(each, "name", "") == "__init__"), None)
        docs = _documented(ast.get_docstring(node))
        if init is None:
            arguments = [
                (each.target.id, each.annotation, each.value)
                for each in node.body
                if isinstance(each, ast.AnnAssign)
            ]
            return _listed(constructor, arguments, docs)
        node = init
    docs |= _documented(ast.get_docstring(node))
    spec = node.args
    required = [None] * (len(spec.args) - len(spec.defaults))
    arguments = [
        (each.arg, each.annotation, default)
        for each, default in [
            *zip(spec.args, [*required, *spec.defaults], strict=True),
            *zip(spec.kwonlyargs, spec.kw_defaults, strict=True),
        ]
        if each.annotation is not None
    ]
    return _listed(constructor, arguments, docs)


def of_class(cls: type) -> Constructor:
    """The constructor that a class is."""
    return Constructor(cls.__module__, cls.__qualname__)


def constant(module: str, name: str) -> Any:
    """What a module assigns to a name: literals, and constructors or modules by name.

    A class that the module imports is a Constructor, a module that it imports its dotted name.
    """
    value = _assigned(module).get(name)
    if value is None:
        raise ValueError(f"{module} assigns nothing to {name}")
    return _value(module, value)


def build(kind: Any, value: Any) -> Any:
    """The object that a section describes, its inner sections first.

    Args:
      kind: a class, a Constructor or another kind of field; of {name: class} the section's `name`
        chooses.
      value: the expanded section, or a plain value.
    """
    if isinstance(kind, Mapping):
        kind = Choice({name: of_class(each) for name, each in kind.items()})
    kind = of_class(kind) if isinstance(kind, type) and kind not in SCALARS.values() else kind
    match kind:
        case Constructor():
            inner = {name: build(each.kind, value[name]) for name, each in fields(kind).items()}
            return kind.load()(**inner)
        case Choice():
            chosen = kind.options[value["name"]]
            return build(chosen, value)
        case Sections():
            return {name: build(kind.of, value[name]) for name in value}
        case Either() if value is not None:
            return build(next(each for each in kind.kinds if each is not None), value)
    return value


def _listed(constructor, arguments, docs):
    found = {}
    for name, annotation, default in arguments:
        try:
            kind = _kind(constructor.module, annotation)
            value = REQUIRED if default is None else _default(constructor.module, kind, default)
        except ValueError as error:
            where = f"{constructor.module}.{constructor.name}.{name}"
            raise ValueError(f"{where} is not a field of a recipe: {error}") from error
        found[name] = Field(name, kind, value, docs.get(name, ""))
    return found


def _kind(module: str, node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=None):
            return None
        case ast.Name(id=name) if name in SCALARS:
            return SCALARS[name]
        case ast.BinOp(op=ast.BitOr()):
            sides = [_kind(module, side) for side in (node.left, node.right)]
            parts = [side.kinds if isinstance(side, Either) else (side,) for side in sides]
            return Either((*parts[0], *parts[1]))
        case ast.Subscript(value=ast.Name(id="tuple")):
            entries = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            repeated = isinstance(entries[-1], ast.Constant) and entries[-1].value is ...
            entries = entries[:-1] if repeated else entries
            return Tuple(tuple(_kind(module, each) for each in entries), repeated)
        case ast.Subscript(value=ast.Name(id="Mapping"), slice=ast.Tuple(elts=[_, of])):
            return Sections(_kind(module, of))
        case ast.Subscript(value=ast.Name(id="Annotated"), slice=ast.Tuple(elts=[_, choices])):
            return Choice(_value(module, choices))
        case ast.Name() | ast.Attribute():
            found = _value(module, node)
            if isinstance(found, Constructor):
                return found
    raise ValueError(f"its annotation {ast.unparse(node)} is not a type that can be set")


def _default(module: str, kind: Any, node: ast.expr) -> Any:
    """A literal, or for a section what is given to its constructor."""
    if isinstance(kind, Constructor | Choice) and isinstance(node, ast.Call):
        given = {each.arg: each.value for each in node.keywords}
        called = _value(module, node.func)
        inner = fields(called)
        changes = {name: _default(module, inner[name].kind, value) for name, value in given.items()}
        if isinstance(kind, Choice):
            changes["name"] = next(key for key, each in kind.options.items() if each == called)
        return changes
    return _value(module, node)


def _value(module: str, node: ast.expr) -> Any:
    match node:
        case ast.Dict():
            keys = [_value(module, key) for key in node.keys]
            return dict(zip(keys, (_value(module, each) for each in node.values), strict=True))
        case ast.Name(id=name):
            return _named(module, name)
        case ast.Attribute(value=inner, attr=name):
            found = _value(module, inner)
            if isinstance(found, str):
                return _named(found, name)
        case _:
            return ast.literal_eval(node)
    raise ValueError(f"{ast.unparse(node)} is not a literal")


def _named(module: str, name: str) -> Any:
    """What a name means in a module: a Constructor, the dotted name of a module, or a literal."""
    tree = _tree(module)
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return Constructor(module, name)
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    inner = f"{node.module}.{alias.name}"
                    if _path(inner) is not None:
                        return inner
                    return _named(node.module, alias.name)
    if name in (assigned := _assigned(module)):
        return _value(module, assigned[name])
    raise ValueError(f"{name} is not defined in {module}")


def _assigned(module: str) -> dict[str, ast.expr]:
    return {
        target.id: node.value
        for node in _tree(module).body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _defined(module: str, name: str):
    for node in _tree(module).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node
    raise ValueError(f"{module} defines no {name}")


@functools.cache
def _tree(module: str) -> ast.Module:
    path = _path(module)
    if path is None:
        raise ValueError(f"{module} is not a module of this package")
    return ast.parse(path.read_text())


@functools.cache
def _path(module: str) -> Path | None:
    """The file of a module of this package: found beside this one, so nothing is imported."""
    if not module.startswith("dlc_jax."):
        found = importlib.util.find_spec(module) if "." not in module else None
        return Path(found.origin) if found and found.origin else None
    place = Path(__file__).parents[1].joinpath(*module.split(".")[1:])
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if path.is_file():
            return path
    return None


def _documented(docstring: str | None) -> dict[str, str]:
    """{name: first sentence} of the lists `Args:` and `Attributes:` of a docstring."""
    found, lines = {}, (docstring or "").splitlines()
    sections = re.compile(r"(Args|Attributes\b.*):$")
    inside, name = False, ""
    for line in lines:
        if not line.startswith(" ") and line.strip():
            inside, name = bool(sections.match(line.strip())), ""
        elif inside and (match := re.match(r"  ([\w, ]+): (.*)", line)):
            name = match[1]
            found[name] = match[2]
        elif inside and name and line.startswith("    "):
            found[name] += f" {line.strip()}"
    split = {}
    for names, text in found.items():
        sentence = re.split(r"(?<=[^.])[.;](?:\s|$)", text, maxsplit=1)[0]
        split.update({name.strip(): sentence.strip() for name in names.split(",")})
    return split
