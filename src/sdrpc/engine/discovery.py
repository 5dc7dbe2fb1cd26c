"""The devices that torch finds on this machine."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch

from sdrpc.errors import InvalidValue

from .compilation import Compiler, missing
from .device import LocalDevice
from .precision import choose
from .system import processor
from .weights import CPU_CACHE

log = logging.getLogger(__name__)

MAX_THREADS = 1024
"""Of a CPU. With many more the system gives none, and torch ends the process."""


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


def devices(
    precision: str = "auto",
    threads: int | None = None,
    *,
    compute_limit: float | None = None,
    dequant_cache: int | None = None,
    compile: str = "auto",
) -> list[LocalDevice]:
    """Every accelerator that torch finds, then the CPU.

    ``precision``: exact, fast, ggml, or auto: fast where the hardware has narrow arithmetic. ``threads``: of the
    CPU (default: torch's). ``dequant_cache``: bytes per device (default: 448 MiB, or a quarter of an
    accelerator's memory). ``compile``: of programs that repeat in *fast* precision; auto: on GPUs, where there is a
    compiler; off. Raises :class:`sdrpc.errors.UsageError` for another precision, and more than :data:`MAX_THREADS`.
    """
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise InvalidValue("threads", threads, f"it can be 1 … {MAX_THREADS}")
    compiler = Compiler() if compile == "auto" else None
    return [
        LocalDevice(
            name,
            device,
            choose(precision, device),
            description=description,
            threads=threads if device.type == "cpu" else None,
            compute_limit=compute_limit,
            dequant_cache=default_cache(device) if dequant_cache is None else dequant_cache,
            compiler=compiler if _compiles(device, precision) else None,
        )
        for name, device, description in found()
    ]


def _compiles(device: torch.device, precision: str) -> bool:
    """Whether programs are compiled on ``device`` unless somebody says otherwise; what is missing for that is logged.
    A CPU gains little by it."""
    if device.type != "cuda" or choose(precision, device).narrow is None:
        return False
    if lacking := missing(device):
        log.warning("%s: programs are not compiled, which would make them faster: %s", device, lacking)
    return not lacking
