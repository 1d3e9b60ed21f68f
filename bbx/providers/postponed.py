"""Import torchvision without the compiler: it asks `torch._dynamo` for one function that it may never call.

That one line of torchvision/ops/roi_align.py imports 1,100 modules and doubles the time that torch takes to start.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

_UTILS = "torch._dynamo.utils"


class _Postponed(ModuleType):
    """In the place of `torch._dynamo.utils`, which is imported as soon as anybody wants more than that function."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what the import system asks every module
            raise AttributeError(name)
        return _is_compile_supported if name == "is_compile_supported" else getattr(_real(), name)


def _real() -> Any:
    if isinstance(sys.modules.get(_UTILS), _Postponed):
        del sys.modules[_UTILS]
    return import_module(_UTILS)


def _is_compile_supported(device_type: Any) -> Any:
    return _real().is_compile_supported(device_type)


def import_torchvision() -> None:
    """`import torchvision`, in a tenth of the time; as ever where `torch._dynamo` or torchvision is there already."""
    if not {"torch._dynamo", _UTILS, "torchvision"} & sys.modules.keys():
        stand_in = sys.modules[_UTILS] = _Postponed(_UTILS)
        try:
            import_module("torchvision")
        finally:
            if sys.modules.get(_UTILS) is stand_in:
                del sys.modules[_UTILS]
