"""What a recipe says about its steps: which of them reads which, and where on disk; and a recipe that a run wrote down, read back.

A section with a `stage` is a step. It names the steps that it reads in fields of its own: `encoder="encoder"`, `codes="codes"`. A step
with a `path` is not made here but stands there: one code store, of another run, feeds many.
"""

import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from dlc_jax.errors import UserError


def get_config(path: str) -> ConfigDict:
    """The recipe that is in a run's config.json: `--config=W/config.json` gets here, see command.py.

    Raises:
      OSError: it cannot be read.
      ValueError: it is no recipe.
    """
    try:
        found = json.loads(Path(path).read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("steps"), list):
        raise ValueError(f"{path} is no recipe: a run writes one as config.json")
    return ConfigDict(_python(found))


def check(config) -> None:
    """Refuses a step that is no section of the recipe.

    Raises:
      UserError: it is named.
    """
    parts = {name: part for name, part in config.items() if isinstance(part, ConfigDict)}
    sections = [name for name, part in parts.items() if "stage" in part]
    for name in config.steps:
        if name not in sections:
            raise UserError(f"config.steps names {name!r}, which is no section with a stage; there are {', '.join(sections)}")


def place(config, workdir: str | Path, name: str) -> Path:
    """The directory of step `name`: its `path` if the recipe gives one, else the one in the workdir."""
    return Path(config[name].path) if _elsewhere(config, name) else Path(workdir) / name


def trained(config, workdir: str | Path, name: str) -> Path:
    """The directory where step `name` was trained: of a run that takes its codes from another one, the encoder is in that other."""
    directory = place(config, workdir, name)
    if not directory.is_dir():
        for given in config:
            if _elsewhere(config, given) and name in _named(config, given):
                return Path(config[given].path).parent / name
    return directory


def codes_dtype(config, encoder: str) -> str:
    """The `dtype` that codes of step `encoder` are computed in; "" if the recipe is of before they had one, float32 without codes."""
    steps = (config[name] for name in config if _is_step(config, name))
    return next((step.get("dtype", "") for step in steps if step.stage == "codes" and step.encoder == encoder), "float32")


def upstream(config, name: str) -> tuple[str, ...]:
    """The steps whose results step `name` reads, also through others, in alphabetical order."""
    found: set[str] = set()
    waiting = {name}
    while waiting:
        step = waiting.pop()
        named = set() if _elsewhere(config, step) else _named(config, step)
        waiting |= named - found
        found |= named
    return tuple(sorted(found))


def unneeded(config) -> dict[str, str]:
    """{step: why} of those that need not be made here: what they would give is part of what stands elsewhere."""
    given = [name for name in config if _elsewhere(config, name)]
    return {step: f"{name} are those of {config[name].path}" for name in given for step in sorted(_named(config, name))}


def _named(config, name: str) -> set[str]:
    fields = {value for field, value in config[name].items() if field != "stage" and isinstance(value, str)}
    return {value for value in fields if _is_step(config, value)}


def _is_step(config, name: str) -> bool:
    return name in config and isinstance(config[name], ConfigDict) and "stage" in config[name]


def _elsewhere(config, name: str) -> bool:
    return _is_step(config, name) and "path" in config[name] and bool(config[name].path)


def _python(value: Any) -> Any:
    """As a recipe in Python has it: tuples for lists, and null for what any value may be set to."""
    if isinstance(value, dict):
        return {key: _python(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return tuple(_python(inner) for inner in value)
    return placeholder(object) if value is None else value
