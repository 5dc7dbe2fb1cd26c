"""What the operating system is asked for."""

from __future__ import annotations

import errno
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from sdrpc.engine import system
from sdrpc.engine.system import host_memory, processor, shared_resident

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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere no file is read")
def test_memory_is_known_where_no_file_can_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """When clients had all descriptors that there are, others were thrown out for a fault in the server."""

    def none_is_left(*_: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    total, shared = host_memory().total, shared_resident()
    monkeypatch.setattr(os, "open", none_is_left)
    monkeypatch.setattr(Path, "read_text", none_is_left)
    assert host_memory().total == total
    assert (shared_resident() is None) == (shared is None)


V1 = {
    "memory.limit_in_bytes": "{limit}",
    "memory.usage_in_bytes": "{used}",
    "memory.stat": "total_inactive_file {cached}",
}
V2 = {"memory.max": "{limit}", "memory.current": "{used}", "memory.stat": "anon 5\ninactive_file {cached}"}


@pytest.mark.parametrize(("files", "names"), [(V1, system._V1), (V2, system._V2)], ids=["v1", "v2"])
def test_the_limit_of_a_container_is_the_machines_memory(
    files: dict[str, str], names: system._Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of this group and of one above it, whichever leaves less; pages of files that can be given up are free."""
    inner, outer = tmp_path / "outer" / "inner", tmp_path / "outer"
    inner.mkdir(parents=True)

    def write(folder: Path, limit: object, used: int, cached: int = 0) -> None:
        for name, text in files.items():
            (folder / name).write_text(text.format(limit=limit, used=used, cached=cached) + "\n")

    monkeypatch.setattr(system, "_groups", lambda: ((inner, names), (outer, names)))
    unlimited = "max" if names is system._V2 else 2**63 - 4096
    machine = host_memory().total
    write(inner, unlimited, 1 << 20)
    write(outer, unlimited, 1 << 20)
    assert host_memory().total == machine > 1 << 30
    write(inner, 64 << 20, 60 << 20, 20 << 20)
    assert host_memory() == (24 << 20, 64 << 20)
    write(outer, 32 << 20, 30 << 20, 8 << 20)
    assert host_memory() == (10 << 20, 32 << 20)
    write(outer, 32 << 20, 40 << 20)
    assert host_memory().free == 0
