"""What a process takes."""

from __future__ import annotations

import time
from typing import NamedTuple

import psutil

QUIET_SECONDS = 60.0


class Usage(NamedTuple):
    """``memory`` in MiB (resident, shared mappings included), open files, threads."""

    memory: int
    files: int
    threads: int

    def max(self, other: Usage) -> Usage:
        return Usage(*(max(pair) for pair in zip(self, other, strict=True)))

    def __str__(self) -> str:
        return f"{self.memory:,} MiB, {self.files} files, {self.threads} threads"


def usage(pid: int) -> Usage:
    process = psutil.Process(pid)
    with process.oneshot():
        return Usage(process.memory_info().rss >> 20, process.num_fds(), process.num_threads())


def quiet(pid: int) -> Usage:
    """What is left when everybody has gone: the least of some seconds."""
    until = time.monotonic() + QUIET_SECONDS
    least, unchanged = usage(pid), 0
    while unchanged < 20 and time.monotonic() < until:
        time.sleep(0.25)
        now = usage(pid)
        unchanged = unchanged + 1 if now.files >= least.files and now.threads >= least.threads else 0
        least = Usage(*(min(pair) for pair in zip(least, now, strict=True)))
    return least
