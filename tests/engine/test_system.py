"""What the operating system is asked for."""

from __future__ import annotations

import platform
import subprocess
import sys

from sdrpc.engine.system import host_memory, processor

RESIDENT = """
import numpy as np
from sdrpc.engine.system import keep_freed_memory
keep_freed_memory()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
before = resident()
numbers = np.ones(1 << 23)
del numbers
print(resident() - before)
"""


def test_freed_memory_is_kept_where_the_allocator_can() -> None:
    if platform.libc_ver()[0] != "glibc":
        return
    done = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 1 << 25  # of 64 MiB that were freed


def test_memory_and_processor() -> None:
    free, total = host_memory()
    assert 0 < free <= total
    assert processor()
