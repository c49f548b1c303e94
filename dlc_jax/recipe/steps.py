"""Which step of a config reads which, and where on disk each is.

A section with a `stage` is a step. It names the steps it reads in fields of its own:
`encoder="encoder"`, `codes="codes"`. A step with a `path` is not made here but stands there: one
code store, of another run, feeds many.
"""

from pathlib import Path

from ml_collections import ConfigDict

from dlc_jax import remote
from dlc_jax.errors import UserError


def check(config) -> None:
    """Refuses `steps` that are not sections with a stage.

    Raises:
      UserError: the first of them is named.
    """
    sections = [name for name in config if _is_step(config, name)]
    for name in config.steps:
        if name not in sections:
            raise UserError(
                f"config.steps names {name!r}, which is not a step; there are {', '.join(sections)}"
            )


def of_stage(config, stage: str) -> list[str]:
    """The steps of a kind."""
    return [name for name in config if _is_step(config, name) and config[name].stage == stage]


def place(config, workdir: str | Path, name: str) -> Path:
    """The directory of step `name`: its `path` if it has one, else the one in the workdir."""
    return remote.local(config[name].path) if _elsewhere(config, name) else Path(workdir) / name


def trained(config, workdir: str | Path, name: str) -> Path:
    """Where step `name` was trained: the encoder of another run's codes is in that run."""
    directory = place(config, workdir, name)
    if not directory.is_dir():
        for given in config:
            if _elsewhere(config, given) and name in _named(config, given):
                return _beside(config[given].path, name)
    return directory


def _beside(path: str, name: str) -> Path:
    """The folder `name` beside a path or URL."""
    above = path.rstrip("/").rpartition("/")[0]
    return remote.local(f"{above}/{name}") if remote.is_url(path) else Path(path).parent / name


def codes_dtype(config, encoder: str) -> str:
    """The `dtype` that the codes of step `encoder` are computed in; float32 without codes.

    "" is of a run from before there was that field.
    """
    steps = (config[name] for name in of_stage(config, "codes"))
    return next((step.dtype for step in steps if step.encoder == encoder), "float32")


def embedding(config, encoder: str) -> str:
    """Which embedding the codes step of `encoder` stores beside codes; "" for none."""
    steps = (config[name] for name in of_stage(config, "codes"))
    return next((step.embedding for step in steps if step.encoder == encoder), "")


def view(section) -> dict:
    """What the images that a codes step codes are beside `data`: their side, if it is given."""
    return {} if section.image is None else {"image": section.image}


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
    """{step: why} of those that need not be made here: what they would give stands elsewhere."""
    given = [name for name in config if _elsewhere(config, name)]
    return {
        step: f"{name} are those of {config[name].path}"
        for name in given
        for direct in _named(config, name)
        for step in sorted({direct, *upstream(config, direct)})
    }


def _named(config, name: str) -> set[str]:
    fields = config[name].items()
    values = {value for field, value in fields if field != "stage" and isinstance(value, str)}
    return {value for value in values if _is_step(config, value)}


def _is_step(config, name: str) -> bool:
    return name in config and isinstance(config[name], ConfigDict) and "stage" in config[name]


def _elsewhere(config, name: str) -> bool:
    return _is_step(config, name) and "path" in config[name] and bool(config[name].path)
