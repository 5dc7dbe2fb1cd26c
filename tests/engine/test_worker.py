"""The thread that computes for a device: clients take turns, and nothing of a task stays behind."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from concurrent.futures import Future
from functools import partial
from typing import Any

import pytest
import torch

from sdrpc.device import Client
from sdrpc.engine import LocalDevice
from sdrpc.engine.precision import EXACT
from sdrpc.engine.worker import Worker
from sdrpc.errors import ComputeError
from sdrpc.ggml.tensor import Graph, Tensor
from sdrpc.ggml.types import F32, TYPES

A, B, C = (Client((owner, "")) for owner in "abc")


def test_clients_take_turns() -> None:
    order: list[str] = []
    begin = threading.Event()
    worker = Worker("test", lambda: None)
    futures: list[Future[Any]] = [worker.submit(A, begin.wait)]
    futures += [worker.submit(A, partial(order.append, f"a{i}")) for i in range(3)]
    futures += [worker.submit(B, partial(order.append, f"b{i}")) for i in range(2)]
    futures += [worker.submit(C, partial(order.append, "c0"))]
    begin.set()
    for future in futures:
        future.result()
    assert order[:2] == ["b0", "c0"], "a had its turn"
    assert [name for name in order if name[0] == "a"] == ["a0", "a1", "a2"]
    assert worker.close(240.0)
    with pytest.raises(RuntimeError, match="closed"):
        worker.submit(A, begin.wait)


def test_a_client_is_told_what_it_had() -> None:
    spent: list[float] = []
    worker = Worker("test", lambda: None)
    client = Client(("a", ""), spent.append)
    worker.submit(client, partial(time.sleep, 0.05)).result()
    assert len(spent) == 1
    assert spent[0] >= 0.05
    with pytest.raises(ZeroDivisionError):
        worker.submit(client, lambda: 1 // 0).result()
    assert len(spent) == 2
    worker.close()


def test_a_worker_that_does_not_end_in_time_says_so() -> None:
    begin = threading.Event()
    worker = Worker("test", lambda: None)
    worker.submit(A, begin.wait)
    assert not worker.close(0.01)
    begin.set()
    assert worker.close(240.0)


def test_errors_reach_who_waits() -> None:
    worker = Worker("test", lambda: None)
    with pytest.raises(ZeroDivisionError):
        worker.submit(A, lambda: 1 // 0).result()
    assert worker.submit(A, lambda: 1).result() == 1
    worker.close()


def test_a_failed_run_leaves_nothing_behind_without_the_cycle_collector() -> None:
    device = LocalDevice("CPU", torch.device("cpu"), EXACT, threads=1)
    buffer = device.allocate(1 << 20)
    table = Tensor(F32, (4, 3, 1, 1), (4, 16, 48, 48), buffer=buffer.key)
    rows = Tensor(TYPES["I32"], (2, 1, 1, 1), (4, 8, 8, 8), buffer=buffer.key, offset=4096)
    node = Tensor(F32, (4, 2, 1, 1), (4, 16, 32, 32), op="GET_ROWS", src=(table, rows), buffer=buffer.key, offset=8192)
    device.write(buffer, 4096, bytes([99, 0, 0, 0, 0, 0, 0, 0]))
    memory = weakref.ref(buffer.storage.data)
    gc.disable()
    try:
        with pytest.raises(ComputeError, match="rows 0 … 99 of 3"):
            device.compile(Graph((node,)), {buffer.key: buffer}).run()
        device.free(buffer)
        del buffer
        assert memory() is None
    finally:
        gc.enable()
        device.close()
