"""Runs that are no workdirs: folders of `dlc export torch`, and the one that the package brings.

    run.json               the config of the run that was exported, without places of its machine
    <step>/config.json     of PyTorch's code; beside it the weights, model.safetensors

An encoder, a prior and a generator of pixels open from such a folder as from the run itself.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dlc_jax import remote
from dlc_jax.workdir.files import plain

RUN = "run.json"
DEMO = Path(__file__).resolve().parents[1] / "demo"
PLACES = ("path", "data_dir", "directory", "cache", "init_from")  # fields of one machine alone


def locate(place: str | Path) -> Path:
    """The folder of a run that is read: of a path, a URL, or of "demo", which the package brings.

    A folder here that is named demo comes first.

    Raises:
      StoreError: a store cannot be read.
    """
    here = remote.local(place)
    return DEMO if str(place) == "demo" and not here.exists() else here


def config_file(directory: Path) -> Path:
    """Where the config of a run or of an exported folder is."""
    exported = directory / RUN
    return exported if exported.is_file() else directory / "config.json"


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as others may read it: no field says where something was on the machine."""
    found = {}
    for name, value in plain(config).items():
        if isinstance(value, dict):
            value = portable(value)
        elif name in PLACES and isinstance(value, str):
            value = ""
        found[name] = value
    return found
