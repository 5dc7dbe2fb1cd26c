"""What the operating system is asked for."""

from __future__ import annotations

import platform
import subprocess
import sys

from sdrpc.engine.system import host_memory, processor

RESIDENT = """
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from sdrpc.engine.system import keep_freed_memory
keep_freed_memory()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
def used(count):
    numbers = np.ones(count), np.ones(count)
threads = ThreadPoolExecutor(1)
threads.submit(used, 1).result()
before = resident()
threads.submit(used, 5 << 20).result()
print(resident() - before)
used(7 << 20)
print(resident() - before)
"""
"""Two blocks of 40 MiB in a thread, of which a heap of its own would hold one and give another heap back; then two of
56 MiB."""


def test_freed_memory_is_kept_where_the_allocator_can() -> None:
    if platform.libc_ver()[0] != "glibc":
        return
    done = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True)
    in_a_thread, in_all = (int(line) for line in done.stdout.split())
    assert in_a_thread > 60 << 20
    assert in_all > 90 << 20


def test_memory_and_processor() -> None:
    free, total = host_memory()
    assert 0 < free <= total
    assert processor()
