"""The thread that computes for a device: clients take turns, and nothing of a task stays behind."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sdrpc.device import Client
from sdrpc.engine import LocalDevice, leaving
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


LEFT = """
import torch
from sdrpc.device import NOBODY
from sdrpc.engine import leaving, worker

def compute():
    for _ in range(500):
        torch.ones(300, 300) @ torch.ones(300, 300)
    print("back")

leaving.SECONDS = 240.0
at_work = worker.Worker("test", lambda: None)
at_work.submit(NOBODY, compute)
"""


def test_python_ends_when_a_worker_is_back() -> None:
    """Torch calls abort() when it comes back to a Python that is gone."""
    done = subprocess.run([sys.executable, "-c", LEFT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "back\n", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no processes without a program of their own")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_child_does_not_end_what_its_parent_has_at_work() -> None:
    """It would stop what is being compiled, and wait for locks that threads have which it has not."""

    class AtWork:
        closed = False

        def close(self, _: float) -> bool:
            self.closed = True
            return True

    at_work = AtWork()
    leaving.ends_before_python(at_work)
    if not (child := os.fork()):
        leaving._leave()
        os._exit(at_work.closed)
    assert os.waitpid(child, 0)[1] == 0


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


def test_a_thread_that_could_not_begin_begins_with_the_next_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was never tried again, and all clients waited for ever."""
    worker = Worker("test", lambda: None)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_room)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            worker.submit(A, lambda: 1)
        device = LocalDevice("CPU", torch.device("cpu"), EXACT, threads=1)
        with pytest.raises(ComputeError, match="CPU: beginning: can't start new thread"):
            device.begin_serving()
    assert worker.submit(A, lambda: 1).result(240.0) == 1
    worker.close()
    device.close()


def no_room(_: object) -> None:
    raise RuntimeError("can't start new thread")


def test_what_goes_wrong_around_tasks_ends_no_thread() -> None:
    tries = iter([OSError("no such device"), None])

    def prepare() -> None:
        if error := next(tries):
            raise error

    def spent(_: float) -> None:
        raise MemoryError

    worker = Worker("test", prepare)
    with pytest.raises(OSError, match="no such device"):
        worker.submit(A, lambda: 1).result(240.0)
    assert worker.submit(Client(("b", ""), spent), lambda: 2).result(240.0) == 2
    assert worker.submit(A, lambda: 3).result(240.0) == 3
    worker.close()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere OpenMP is not found")
def test_threads_of_clients_have_none_of_their_own() -> None:
    """Each had as many as there are cores, and where the system gives no more of them, OpenMP ends the process."""
    device = LocalDevice("CPU", torch.device("cpu"), EXACT, threads=1)
    buffer = device.allocate(4 << 20)
    usual, of_process = torch.get_num_threads(), Path("/proc/self/task")
    torch.set_num_threads(4)
    begun: list[set[Path]] = []

    def client() -> None:
        device.serve_here()
        before = set(of_process.iterdir())
        device.fill(buffer, 0, 4 << 20, 7)
        device.copy(buffer, 0, buffer, 2 << 20, 2 << 20)
        begun.append(set(of_process.iterdir()) - before)  # others of this process may end meanwhile

    try:
        thread = threading.Thread(target=client)
        thread.start()
        thread.join()
        assert (begun, torch.get_num_threads()) == ([set()], 4)
        assert bytes(device.read(buffer, (4 << 20) - 1, 1)) == b"\7"
    finally:
        torch.set_num_threads(usual)
        device.close()


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
