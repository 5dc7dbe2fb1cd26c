"""Tensor data moves without copies."""

from __future__ import annotations

import mmap
import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from sdrpc.client import RemoteDevice, Timeouts, connect
from sdrpc.client.connection import _send_all
from tests.support.sink import sink

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


class Wire:
    """A socket that takes ``most`` bytes at a time."""

    def __init__(self, most: int) -> None:
        self.most, self.taken = most, bytearray()

    def sendmsg(self, buffers: Sequence[memoryview]) -> int:
        assert len(buffers) <= 64
        data = b"".join(buffers)[: self.most]
        self.taken += data
        return len(data)


class WireOfWindows:
    """A socket without sendmsg, that takes ``most`` bytes at a time."""

    def __init__(self, most: int) -> None:
        self.most, self.taken = most, bytearray()

    def send(self, data: memoryview) -> int:
        self.taken += data[: self.most]
        return min(len(data), self.most)


@pytest.mark.parametrize("wire", [Wire(1), Wire(7), Wire(1 << 20), WireOfWindows(3), WireOfWindows(1 << 20)])
def test_buffers_are_sent_in_order_and_whole(wire: Any) -> None:
    buffers = [
        b"",
        b"one",
        np.arange(100, dtype=np.float32).data,
        memoryview(b""),
        bytearray(b"x" * 99),
        *[b"ab"] * 200,
    ]
    _send_all(wire, buffers)
    assert bytes(wire.taken) == b"".join(bytes(buffer) for buffer in buffers)


def test_reads_can_be_written_to() -> None:
    """The result is the caller's own memory."""
    with sink() as endpoint:
        (device,) = connect([endpoint], Timeouts())
        data = device.read(device.allocate(64), 0, 64)
        assert np.frombuffer(data, np.uint8).flags.writeable
        device.close()
