"""Tensor data moves without copies."""

from __future__ import annotations

import mmap
import tracemalloc
from collections.abc import Callable

import numpy as np
from tests.support.sink import sink

from sdrpc.client import RemoteDevice, Timeouts, connect

SIZE = 200 << 20


def peak(work: Callable[[RemoteDevice], object]) -> int:
    """The largest amount of memory that Python (here and in the sink) took during ``work``, in bytes."""
    with sink() as endpoint:
        (device,) = connect([endpoint], Timeouts())
        device.memory()
        tracemalloc.start()
        work(device)
        device.memory()
        _, result = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        device.close()
    return result


def test_uploads_copy_nothing() -> None:
    """200 MiB of mapped memory, as a checkpoint is."""
    with mmap.mmap(-1, SIZE) as mapped, memoryview(mapped) as view:
        assert peak(lambda device: device.write(device.allocate(SIZE), 0, view)) < 1 << 20


def test_downloads_take_their_own_size() -> None:
    assert SIZE <= peak(lambda device: device.read(device.allocate(SIZE), 0, SIZE)) < SIZE + (1 << 20)


def test_reads_can_be_written_to() -> None:
    """The result is the caller's own memory."""
    with sink() as endpoint:
        (device,) = connect([endpoint], Timeouts())
        data = device.read(device.allocate(64), 0, 64)
        assert np.frombuffer(data, np.uint8).flags.writeable
        device.close()
