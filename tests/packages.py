"""Packages that only parity tests need."""

import importlib
import types

import pytest


def import_or_skip(name: str) -> types.ModuleType:
    """The module; skips the test, or the file at its top, where its package is absent.

    torchvision, which many of them import, may be built for another torch. Its compiled operators
    then do not load, and the import fails at the names of two. No network or transform needs them:
    they are declared.
    """
    pytest.importorskip("torch", reason="parity needs the extra torch")
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pass
    except RuntimeError:
        import torch

        for operator in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{operator}", "(Tensor a, Tensor b, float c) -> Tensor"
            )
    return pytest.importorskip(name, reason=f"parity with {name}, which is not installed")
