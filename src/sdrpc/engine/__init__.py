"""ggml graphs as torch programs: the devices of this process."""

from .device import LocalDevice, LocalProgram, devices

__all__ = ["LocalDevice", "LocalProgram", "devices"]
