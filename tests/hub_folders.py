"""Networks of random weights as `dlc export torch` writes them, and PyTorch's code that reads them.

Nothing of a fresh network stays at zero, at one or alike: neither modulations nor LayerScale.
"""

import importlib
import pathlib
import sys

import jax
import numpy as np
import pytest

from dlc_jax.cli import export_torch
from dlc_jax.interop import hub_config, hub_names, slots

ROOT = pathlib.Path(__file__).resolve().parents[1]
USUAL = {"method": "heun", "steps": 4, "times": "uniform", "eta": 0.0, "guidance": 1.0}
USUAL |= {"interval": [0.0, 1.0], "channels": None, "base": ""}
LINEAR = {"name": "linear", "prediction": "v", "shift": 1.0}
NOISE = {"schedule": "linear", "eps": 1e-3, "largest": 20.0}


def modeling():
    """PyTorch's code, as a user imports it from an exported folder."""
    torch = pytest.importorskip("torch", reason="parity needs the extra torch")
    torch.set_num_threads(1)
    place = str(ROOT / "dlc_jax" / "interop" / "hub")
    if place not in sys.path:
        sys.path.append(place)
    return importlib.import_module("modeling_dlc")


def section(module) -> dict:
    """The fields of a linen module."""
    return {name: getattr(module, name) for name in type(module).__dataclass_fields__}


def flat(variables, unread=()) -> dict:
    params = slots.flat(variables["params"])
    return {path: np.asarray(x) for path, x in params.items() if not path.startswith(unread)}


def encoder(model, variables, size) -> export_torch.Part:
    params = flat(variables, hub_names.TRAINING["encoder"])
    fields = {"backbone": section(model.backbone), "simplicial": section(model.simplicial)}
    config = hub_config.encoder(fields, size, "float32")
    shapes = {path: array.shape for path, array in params.items()}
    return export_torch.Part(config, params, hub_names.encoder(shapes), hub_names.scales(shapes))


def prior(model, variables, noise=None) -> export_torch.Part:
    fields = {"model": section(model), "process": {"name": "masked", "noise": noise or NOISE}}
    config = hub_config.prior(fields, {"steps": None, "temperature": 1.0})
    return _ours(config, flat(variables))


def generator(model, variables, process=LINEAR, normalizer=None) -> export_torch.Part:
    fields = {"model": section(model), "process": process, "latents": normalizer is not None}
    outputs = model.out_channels or model.channels
    config = hub_config.generator(fields, outputs, USUAL, normalizer)
    return _ours(config, flat(variables, hub_names.TRAINING["generator"]))


def _ours(config, params):
    table = hub_names.network({path: array.shape for path, array in params.items()})
    return export_torch.Part(config, params, table, {})


def loaded(kind, place, part, dtype="float32"):
    """The network of PyTorch that a part of a folder becomes; `kind` as in DLCEncoder."""
    export_torch.write(place, part, dtype)
    return getattr(modeling(), kind).from_pretrained(place)


def close(found, expected, tolerance=1e-5):
    """Within a share of the largest expected number, which is returned."""
    found, expected = (np.asarray(jax.device_get(x), np.float64) for x in (found, expected))
    assert found.shape == expected.shape
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"{error:.1e}"
    return error
