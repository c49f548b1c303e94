"""Stand-ins for packages that a benchmark imports and does not use, where a machine lacks them.

Import this before dlc_jax. A recipe needs nothing of ml_collections but a dict whose entries are
attributes too; grain and array_record read data, of which a benchmark makes its own.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types

READERS = ("grain", "array_record", "orbax")


class ConfigDict(dict):
    """A dict of dicts, whose entries are attributes too; never changed, so never locked."""

    def __init__(self, given):
        super().__init__({name: _nested(value) for name, value in given.items()})

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def lock(self):
        return self

    def to_dict(self):
        return {
            name: value.to_dict() if isinstance(value, ConfigDict) else value
            for name, value in self.items()
        }


def _nested(value):
    return ConfigDict(value) if isinstance(value, dict) else value


class _Anything(types.ModuleType):
    """A module in which every name is a class of its own: a base class, an annotation."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, type(name, (), {}))
        return getattr(self, name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names):
        self._names = names

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in self._names:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Anything(spec.name)

    def exec_module(self, module):
        pass


missing = [name for name in READERS if importlib.util.find_spec(name) is None]
sys.meta_path.append(_Finder(missing))
if importlib.util.find_spec("ml_collections") is None:
    sys.modules["ml_collections"] = types.ModuleType("ml_collections")
    sys.modules["ml_collections"].ConfigDict = ConfigDict
