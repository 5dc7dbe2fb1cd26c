"""Memory that is touched by another thread while something comes to it."""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from sdrpc.client import Keychain, connect
from sdrpc.engine import fresh_memory
from sdrpc.engine.device import LocalDevice
from sdrpc.engine.fresh_memory import LEAST, MOST, made_ready
from sdrpc.engine.precision import EXACT
from sdrpc.server import Door, Keys, Policy, Server
from sdrpc.server.key_ring import KeyRing


class Asked:
    """The system's madvise, and the bytes that it was asked for."""

    def __init__(self, madvise: Callable[[int, int, int], int]) -> None:
        self.madvise, self.bytes = madvise, 0

    def __call__(self, address: int, size: int, advice: int) -> int:
        self.bytes += size
        return self.madvise(address, size, advice)


def populates(madvise: Callable[[int, int, int], int]) -> bool:
    with closing(mmap.mmap(-1, mmap.PAGESIZE)) as mapped:
        page = ctypes.c_char.from_buffer(mapped)
        done = madvise(ctypes.addressof(page), mmap.PAGESIZE, fresh_memory._POPULATE_WRITE) == 0
        del page
    return done


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    madvise = fresh_memory._madvise()
    if madvise is None or not populates(madvise):
        pytest.skip("MADV_POPULATE_WRITE is Linux's, since 5.14")
    asked = Asked(madvise)
    monkeypatch.setattr(fresh_memory, "_madvise", lambda: asked)
    return asked


def test_what_is_there_stays_and_what_comes_is_there(asked: Asked) -> None:
    """The last page, which is not whole, comes by itself."""
    size = 2 * LEAST + 100
    with closing(mmap.mmap(-1, size)) as mapped:
        memory = memoryview(mapped)[:size]
        memory[:4] = memory[LEAST : LEAST + 4] = b"here"
        with made_ready(memory):
            memory[-4:] = memory[4:8] = b"came"
        expected = np.zeros(size, np.uint8)
        expected[:8] = memoryview(b"herecame")
        expected[LEAST : LEAST + 4], expected[-4:] = memoryview(b"here"), memoryview(b"came")
        np.testing.assert_array_equal(np.frombuffer(memory, np.uint8), expected)
        memory.release()
    assert asked.bytes == 2 * LEAST


@pytest.mark.parametrize("size", [LEAST - 1, MOST + 1])
def test_little_and_what_is_only_announced_is_left(size: int, asked: Asked) -> None:
    with closing(mmap.mmap(-1, size)) as mapped, memoryview(mapped) as memory, made_ready(memory):
        pass
    assert not asked.bytes


def test_without_a_thread(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with made_ready(memoryview(bytearray(LEAST))) as nothing:
        assert nothing is None
    assert not asked.bytes


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="MADV_POPULATE_WRITE is Linux's")
def test_an_older_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """It knows no such advice: memory comes when it is touched."""
    madvise = fresh_memory._madvise()
    assert madvise is not None
    monkeypatch.setattr(fresh_memory, "_POPULATE_WRITE", 12345)
    memory = memoryview(bytearray(2 * LEAST))
    asked = Asked(madvise)
    monkeypatch.setattr(fresh_memory, "_madvise", lambda: asked)
    with made_ready(memory):
        memory[:4] = b"came"
    assert asked.bytes == LEAST, "it is not asked again"
    assert bytes(memory[:4]) == b"came"


def test_an_upload_through_tls(asked: Asked, tmp_path: Path) -> None:
    ring = KeyRing(tmp_path / "keys.json")
    door = Door(Policy(local=False), Keys(ring, tmp_path / "server.pem"))
    data = np.random.default_rng(0).bytes(3 * LEAST + 5)
    keychain = Keychain([(None, ring.add("laptop").key)], tmp_path / "client.json")
    cpu = LocalDevice("CPU", torch.device("cpu"), EXACT, threads=1)
    with closing(cpu), Server([cpu], door=door) as server:
        (device,) = connect([server.endpoint], keychain=keychain)
        with closing(device):
            buffer = device.allocate(len(data))
            device.write(buffer, 0, data)
            assert bytes(device.read(buffer, 0, len(data))) == data
    assert asked.bytes >= 3 * LEAST - 2 * mmap.PAGESIZE
