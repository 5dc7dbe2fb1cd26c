"""What the operating system says of its memory and processor."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from sdrpc.device import Memory

_NO_LIMIT = 1 << 62
"""cgroup v1 says no limit as the largest multiple of a page below 2⁶³."""


def host_memory() -> Memory:
    """Free and total bytes of the machine's memory, or of the control group's where that allows less."""
    if sys.platform == "win32":
        return _windows()
    try:
        told = _told(Path("/proc/meminfo"))
    except OSError:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return Memory(total // 2, total)  # no portable way to ask; half is what a desktop has left
    lines = dict(line.split(":", 1) for line in told.splitlines() if ":" in line)
    total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    for limit, used in _limits():
        total, free = min(total, limit), min(free, max(limit - used, 0))
    return Memory(free, total)


_MOST = 1 << 16
"""Bytes of a file of the kernel's; they have a few thousand."""


def _told(path: Path) -> str:
    """What one of the kernel's files says now. It is asked again and again, and stays open: when clients have all
    descriptors that there are, none is left for it. Raises :class:`OSError`."""
    return os.pread(_opened(path, os.getpid()), _MOST, 0).decode()


@cache
def _opened(path: Path, _process: int) -> int:
    """A descriptor of ``path`` for this process: what is below /proc/self is another one's after a fork."""
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


class _Files(NamedTuple):
    """What one version of control groups calls its facts about memory."""

    limit: str
    used: str
    cached: str
    """The line of memory.stat that counts pages of files that the kernel gives up when it needs memory."""


_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Files("memory.max", "memory.current", "inactive_file")


def _limits() -> Iterator[tuple[int, int]]:
    """Limit and use of this process's control group and of all groups above it that have a limit."""
    for folder, files in _groups():
        limit, used = _number(folder / files.limit), _number(folder / files.used)
        if limit is not None and used is not None and limit < _NO_LIMIT:
            yield limit, used - _cached(folder, files.cached)


@cache
def _groups() -> tuple[tuple[Path, _Files], ...]:
    """The folders of this process's control groups, for either version of them. In a container the group may not be
    visible under its own path: the root is it then."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return ()
    found: list[tuple[Path, _Files]] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            roots, files = [Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")], _V2
        elif "memory" in controllers.split(","):
            roots, files = [Path("/sys/fs/cgroup/memory")], _V1
        else:
            continue
        for root in roots:
            group = root / path.lstrip("/")
            found += [(each, files) for each in (group, *group.parents) if each.is_relative_to(root)]
    return tuple((folder, files) for folder, files in found if (folder / files.limit).exists())


def _number(path: Path) -> int | None:
    try:
        text = _told(path).strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _cached(folder: Path, name: str) -> int:
    try:
        lines = _told(folder / "memory.stat").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(name + " ")), 0)


def shared_resident() -> int | None:
    """Bytes of this process's shared anonymous memory, which buffers are made of, that were touched; None where the
    system does not say."""
    try:
        lines = _told(Path("/proc/self/status")).splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssShmem:")), None)


def _windows() -> Memory:
    class Status(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_ulong), ("load", ctypes.c_ulong), ("total", ctypes.c_ulonglong),
            ("available", ctypes.c_ulonglong), ("rest", ctypes.c_ulonglong * 5),
        )  # fmt: skip

    status = Status(length=ctypes.sizeof(Status))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined,unused-ignore]
    return Memory(int(status.available), int(status.total))


DRIVERS = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/nvhost-gpu", "/dev/dxg", "/dev/kfd", "/dev/dri")
"""What Linux has where torch can find a GPU: NVIDIA's driver (on Tegra, on Windows' Linux), AMD's, and anybody's."""


def accelerator_possible() -> bool:
    """Whether torch may find another device here than the CPU. Told in no time, which torch itself takes seconds for;
    False only when it is sure."""
    try:
        build = version("torch").partition("+")[2]
    except PackageNotFoundError:
        return True
    if sys.platform == "darwin":
        return platform.machine() == "arm64"
    return build != "cpu" and (sys.platform != "linux" or any(Path(driver).exists() for driver in DRIVERS))


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine() or "CPU"


def processor_features() -> frozenset[str]:
    """The features that the processor names (Linux only): ``avx512_bf16``, ``amx_bf16``, …"""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.split(":", 1)[1].split())
    return frozenset()


@cache
def _openmp() -> Callable[[int], object]:
    """OpenMP's omp_set_num_threads, which is for the calling thread."""
    try:
        found: Callable[[int], object] = ctypes.CDLL(None).omp_set_num_threads
    except (AttributeError, OSError, TypeError):
        return lambda _: None
    return found


def compute_alone() -> None:
    """Have torch's kernels for the CPU use no other thread than this one for what this one computes.

    OpenMP has as many more for each thread that begins something. Those of many clients would be thousands, and where
    the system has no room for another one, it ends the process. Does nothing where OpenMP's library can't be found.
    """
    import torch

    torch.get_num_threads()  # which sets the usual number where nobody has yet
    _openmp()(1)


_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
"""Parameters of glibc's mallopt (malloc.h)."""


def keep_freed_memory() -> None:
    """Let this process's allocator keep what is freed, up to 2 GiB, for the next operation. Does nothing but on glibc.

    By default glibc gives each large block back to the kernel and gets zeroed pages for the next one. A program makes
    and drops such blocks in every step: for convolutions of deep layers, page by page, that took most of the time
    (1280 channels of 4×4 in float32: 35 ms instead of 9). It must be one heap for all threads, since glibc gives those
    of single threads back whatever it is told: a UNet of 16×16 places took 1.3 s for that instead of 0.8. For a whole
    process to decide, before it starts threads, so commands call it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_M_ARENA_MAX, 1)
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Give what :func:`keep_freed_memory` kept back to the system. Does nothing but on glibc."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return
