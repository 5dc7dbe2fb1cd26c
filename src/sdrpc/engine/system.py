"""What the operating system says of its memory and processor."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from pathlib import Path

from sdrpc.device import Memory


def host_memory() -> Memory:
    """Free and total bytes of the machine's memory, or of the control group's where that allows less."""
    if sys.platform == "win32":
        return _windows()
    info = Path("/proc/meminfo")
    if info.exists():
        lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
        total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
        limit, used = _cgroup("memory.max"), _cgroup("memory.current")
        if limit is not None and used is not None and limit < total:
            return Memory(min(free, max(limit - used, 0)), limit)
        return Memory(free, total)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Memory(total // 2, total)  # no portable way to ask; half is what a desktop has left


def _cgroup(name: str) -> int | None:
    try:
        text = Path("/sys/fs/cgroup", name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _windows() -> Memory:
    class Status(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_ulong), ("load", ctypes.c_ulong), ("total", ctypes.c_ulonglong),
            ("available", ctypes.c_ulonglong), ("rest", ctypes.c_ulonglong * 5),
        )  # fmt: skip

    status = Status(length=ctypes.sizeof(Status))
    ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined,unused-ignore]
    return Memory(int(status.available), int(status.total))


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
