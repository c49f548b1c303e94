"""Stand-ins for packages that a benchmark imports and does not use, where they do not import.

Import this before dlc_jax. So a machine needs jax, flax, optax, einops, jaxtyping. A recipe needs
nothing of ml_collections but a dict whose entries are attributes too; grain and array_record read
data, of which a benchmark makes its own; orbax saves.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types

READERS = ("grain", "array_record.python.array_record_module", "orbax.checkpoint")


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


def _lacks(module: str) -> bool:
    try:
        importlib.import_module(module)
    except Exception:  # absent, or of a version that does not go with the others
        package = module.partition(".")[0]
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            del sys.modules[name]
        return True
    return False


sys.meta_path.insert(0, _Finder([name.partition(".")[0] for name in READERS if _lacks(name)]))
if importlib.util.find_spec("ml_collections") is None:
    sys.modules["ml_collections"] = types.ModuleType("ml_collections")
    sys.modules["ml_collections"].ConfigDict = ConfigDict
