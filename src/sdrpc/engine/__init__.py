"""ggml graphs as torch programs: the devices of this process. Torch is imported when they are asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .device import LocalDevice as LocalDevice
    from .device import LocalProgram as LocalProgram
    from .discovery import devices as devices

__all__ = ["LocalDevice", "LocalProgram", "devices"]

_MODULES = {"LocalDevice": "device", "LocalProgram": "device", "devices": "discovery"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
