"""Makes torchvision importable where its compiled operators do not load, as beside another torch.

Networks and transforms need none of them; only the import asks for the names of two.
"""

import torch


def declare() -> None:
    """Declares those operators, unless torchvision's own are there, or there is no torchvision."""
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        pass
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")
