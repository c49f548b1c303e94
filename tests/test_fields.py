"""Fields as `recipe.fields` reads them from source are those of the constructors themselves."""

import collections.abc
import dataclasses
import functools
import inspect
import operator
import typing

import pytest

from dlc_jax import recipe
from dlc_jax.recipe import expansion, fields
from dlc_jax.recipe.fields import REQUIRED, Choice, Constructor, Either, Sections, Tuple


def constructors():
    """Every constructor that a section of a recipe can name."""
    waiting, found = [expansion.ROOT, *recipe.kinds().values()], []
    while waiting:
        kind = waiting.pop()
        match kind:
            case Choice(options=options):
                waiting += options.values()
            case Sections(of=of):
                waiting.append(of)
            case Either(kinds=kinds):
                waiting += kinds
            case Constructor() if kind not in found:
                found.append(kind)
                waiting += [field.kind for field in fields.fields(kind).values()]
    return sorted(found, key=str)


def real(kind):
    """{name: (annotation, default)} of the arguments that the class or function itself has."""
    made = kind.load()
    if dataclasses.is_dataclass(made):
        hints, own = typing.get_type_hints(made, include_extras=True), dataclasses.fields(made)
        own = [field for field in own if field.name not in ("parent", "name")]  # linen's own
        assert all(field.default_factory is dataclasses.MISSING for field in own)
        found = {field.name: (hints[field.name], field.default) for field in own}
    else:
        called = made.__init__ if inspect.isclass(made) else made
        hints = typing.get_type_hints(called, include_extras=True)
        own = inspect.signature(made).parameters.values()
        found = {each.name: (hints[each.name], each.default) for each in own if each.name in hints}
    missing = (dataclasses.MISSING, inspect.Parameter.empty)
    return {
        name: (hint, REQUIRED if any(default is each for each in missing) else default)
        for name, (hint, default) in found.items()
    }


def annotation(kind, hint):
    """The annotation of a kind of field; `hint` has what a kind does not say."""
    match kind:
        case Constructor():
            return kind.load()
        case Sections(of=of):
            return collections.abc.Mapping[str, of.load()]
        case Choice(options=options):
            own, choices = typing.get_args(hint)
            assert choices == {name: each.load() for name, each in options.items()}
            assert list(choices) == list(options)
            return typing.Annotated[own, choices]
        case Tuple(entries=entries, repeated=repeated):
            return tuple[*[annotation(each, None) for each in entries], *[...] * repeated]
        case Either(kinds=kinds):
            return functools.reduce(operator.or_, [annotation(each, None) for each in kinds])
    return kind


@pytest.mark.parametrize("kind", constructors(), ids=lambda kind: f"{kind.module}.{kind.name}")
def test_fields_are_those_of_the_constructor(kind):
    known, found = fields.fields(kind), real(kind)
    assert list(known) == list(found)
    for name, field in known.items():
        hint, default = found[name]
        assert annotation(field.kind, hint) == hint, name
        said = field.default
        if isinstance(said, dict) and default is not REQUIRED:  # what a section's default sets
            said = recipe.build(field.kind, expansion._section(field.kind, said, name))
        assert said == default and type(said) is type(default), name


@pytest.mark.parametrize("kind", constructors(), ids=lambda kind: f"{kind.module}.{kind.name}")
def test_every_field_has_a_line_of_documentation(kind):
    for name, field in fields.fields(kind).items():
        assert field.name == name and len(field.doc) > 5 and "\n" not in field.doc, name


def test_all_constructors_are_found():
    names = {kind.name for kind in constructors()}
    assert {"Recipe", "Section", "ViT", "DiT", "AdamW", "Guidance", "make_mesh", "Fit"} < names


MODULE = '''
"""A module of a test."""
from dlc_jax.parallel import mesh
from dlc_jax.parallel import make_mesh as build_mesh
class Thing:
    """A thing.

    Attributes:
      size: of it. Large.
      first, second: sides; in
        pixels.
    """
    size: int = 3
    first: float | None = None
    second: tuple[tuple[str, int], ...] = ((("a", 1)),)
    inner: build_mesh
    other: mesh.make_mesh
class Bare:
    count: SOMETHING
class Listed:
    names: list[str]
'''


@pytest.fixture
def module(monkeypatch):
    import ast

    tree = fields._tree
    given = {"thing": ast.parse(MODULE)}
    monkeypatch.setattr(fields, "_tree", lambda name: given.get(name) or tree(name))
    monkeypatch.setattr(fields, "fields", fields.fields.__wrapped__)
    return "thing"


def test_source_is_read_without_importing_it(module):
    found = fields.fields(Constructor(module, "Thing"))
    assert [field.doc for field in found.values()] == ["of it", "sides", "sides", "", ""]
    assert found["size"] == fields.Field("size", int, 3, "of it")
    assert found["first"].kind == Either((float, None)) and found["first"].default is None
    assert found["second"].kind == Tuple((Tuple((str, int), False),), True)
    mesh = Constructor("dlc_jax.parallel.mesh", "make_mesh")
    assert found["inner"].kind == found["other"].kind == mesh


@pytest.mark.parametrize("name, words", [("Bare", "SOMETHING"), ("Listed", r"list\[str\]")])
def test_an_annotation_that_no_recipe_can_hold_is_named(module, name, words):
    with pytest.raises(ValueError, match=f"thing.{name}.* is not a field of a recipe: .*{words}"):
        fields.fields(Constructor(module, name))
