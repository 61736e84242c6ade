"""Import torchvision whether or not its compiled operators fit the installed torch.

A torchvision wheel built for CUDA beside a CPU-only torch fails at import because two operator schemas are missing.
Datasets, transforms and models need none of its compiled operators, so declaring the two schemas is enough for them.
"""
from __future__ import annotations

import sys
from types import ModuleType

import torch

_library: torch.library.Library | None = None  # kept alive: the schemas vanish with it


def load() -> ModuleType:
    """The torchvision module. Raises ``ImportError`` with an instruction when it is not installed."""
    global _library
    try:
        import torchvision
        return torchvision
    except ModuleNotFoundError as error:
        raise ImportError("torchvision is not installed; `pip install torchvision` or use npz: or shapes") from error
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    _library = torch.library.Library("torchvision", "DEF")
    for schema in ("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
                   "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"):
        _library.define(schema)
    import torchvision
    return torchvision
