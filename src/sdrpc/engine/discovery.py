"""Which devices torch finds on this machine."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .system import processor

CPU_CACHE = 448 * 2**20
"""Bytes of converted weights that the CPU keeps unless told otherwise: memory is other programs' as well there, and
converting float16 again takes a twentieth of a step. It is enough for SD 1.5 in float16 to be computed with in bfloat16
where it lies (:mod:`sdrpc.engine.forms`)."""


class Found(NamedTuple):
    """A device as users call it, as torch calls it, and the hardware's name."""

    name: str
    device: torch.device
    description: str


def found() -> list[Found]:
    """Every accelerator that torch finds, then the CPU."""
    kind = "ROCm" if torch.version.hip else "CUDA"
    cuda = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    xpu = range(torch.xpu.device_count() if torch.xpu.is_available() else 0)
    devices = [Found(f"{kind}{i}", torch.device("cuda", i), torch.cuda.get_device_name(i)) for i in cuda]
    devices += [Found(f"XPU{i}", torch.device("xpu", i), torch.xpu.get_device_name(i)) for i in xpu]
    if torch.backends.mps.is_available():
        devices.append(Found("MPS", torch.device("mps"), processor()))
    devices.append(Found("CPU", torch.device("cpu"), processor()))
    return devices


def default_cache(device: torch.device) -> int:
    """Bytes for converted weights: a little of the CPU's memory; an accelerator's is there to be used."""
    if device.type not in ("cuda", "xpu"):
        return CPU_CACHE
    _, total = (torch.cuda if device.type == "cuda" else torch.xpu).mem_get_info(device)
    return int(total) // 4
