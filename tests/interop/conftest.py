"""Both sides of each other: ggml's client in a process of its own, ggml's server in one, and our server in this one."""

from __future__ import annotations

import math
import multiprocessing
import os
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest
import torch

from sdrpc.engine.device import LocalDevice
from sdrpc.engine.precision import EXACT, GGML, Precision
from sdrpc.server import Server
from tests.interop import worker
from tests.support import ggml
from tests.support.process import lasting_port

OLDER = [protocol for protocol in ggml.FOLDERS if protocol != ggml.NEWEST and ggml.FOLDERS[protocol].is_dir()]
"""Protocol versions of the other ggmls that have been built."""
collect_ignore = [] if OLDER else ["test_versions.py"]

SPAWN = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads, half alive
START_SECONDS = 120.0
BATCH = 64
"""Cases in one graph: enough that what a connection costs does not count, and no large loss when one of them fails."""
LOST = 5
"""Cases that may end the process before the rest is not tried any more: each takes seconds to find."""


class NativeClient:
    """A process with ggml's RPC client, which speaks ``protocol``. ggml ends it when a server misbehaves: then the next
    call gets a new one."""

    def __init__(self, log: Path, protocol: str = ggml.NEWEST) -> None:
        self._log, self._protocol = log, protocol
        self._pool = self._new()

    def _new(self) -> ProcessPoolExecutor:
        self._log.write_text("")
        pool = ProcessPoolExecutor(1, SPAWN, worker.start, (str(self._log),))
        with ggml.chosen(self._protocol):
            pool.submit(os.getpid).result()
        return pool

    def submit(self, name: str, endpoint: str, shared_memory: bool = False) -> Future[worker.Outcome]:
        return self._pool.submit(worker.run, name, endpoint, shared_memory)

    def run(self, name: str, endpoint: str, shared_memory: bool = False) -> worker.Outcome:
        """Compute a case or scenario here and there, and compare."""
        try:
            return self.submit(name, endpoint, shared_memory).result()
        except BrokenProcessPool:
            pytest.fail(f"{name}: {self.renew()}", pytrace=False)

    def run_all(self, names: Sequence[str], endpoint: str) -> list[worker.Outcome]:
        """Compute cases of operations, many in one graph. Those that end the process are found by halving."""
        outcomes: list[worker.Outcome] = []
        left, most, lost = list(names), BATCH, 0
        while left and lost < LOST:
            batch = left[:most]
            try:
                outcomes += self._pool.submit(worker.run_all, batch, endpoint).result()
                left = left[most:]
            except BrokenProcessPool:
                said = self.renew()
                if len(batch) == 1:
                    outcomes.append(worker.Outcome(math.inf, said))
                    left, most, lost = left[1:], BATCH, lost + 1
                else:
                    most = len(batch) // 2
        return outcomes + [worker.Outcome(math.inf, "not tried after so many others")] * len(left)

    def renew(self) -> str:
        """Start again; gives what ggml's client said before it gave up."""
        said = self._log.read_text()
        self.close()
        self._pool = self._new()
        return f"ggml's client gave up (the server's log may say why):\n{said}"

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class NativeServer:
    """A process with ggml's RPC server, of the version ``protocol``, that offers its CPU ``devices`` times. It serves
    one client at a time."""

    process: SpawnProcess

    def __init__(self, devices: int, protocol: str = ggml.NEWEST, cache: Path | None = None) -> None:
        self._devices, self._protocol = devices, protocol
        self._cache = None if cache is None else str(cache)
        self.endpoint = f"127.0.0.1:{lasting_port()}"
        self.start()

    def start(self) -> None:
        """Start it, unless it is running: ggml's server dies of graphs that its backend can't compute."""
        if not hasattr(self, "process") or not self.process.is_alive():
            arguments = (self.endpoint, self._devices, 1, self._cache)
            self.process = SPAWN.Process(target=ggml.serve, args=arguments, daemon=True)
            with ggml.chosen(self._protocol):
                self.process.start()
            self._wait()

    def _wait(self) -> None:
        host, port = self.endpoint.split(":")
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.is_alive():
            try:
                socket.create_connection((host, int(port))).close()
                return
            except ConnectionRefusedError:
                time.sleep(0.05)
        pytest.fail(f"ggml's RPC server does not answer at {self.endpoint}")

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@pytest.fixture(scope="session", autouse=True)
def real_ggml() -> None:
    """Without the libraries every test here is an error that says how to get them."""
    ggml.library()


@pytest.fixture(scope="session")
def native_client(real_ggml: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NativeClient]:
    client = NativeClient(tmp_path_factory.mktemp("ggml") / "client.log")
    yield client
    client.close()


@contextmanager
def serving(precision: Precision) -> Iterator[Server]:
    """Our server with two CPU devices."""
    devices = [LocalDevice(f"CPU{i}", torch.device("cpu"), precision, threads=1) for i in range(2)]
    with Server(devices) as server:
        yield server
    for device in devices:
        device.close()


@pytest.fixture(scope="session")
def our_server() -> Iterator[Server]:
    """It, exact."""
    with serving(EXACT) as server:
        yield server


@pytest.fixture(scope="session")
def rounding_server() -> Iterator[Server]:
    """It, in the precision that rounds what ggml's CPU backend rounds."""
    with serving(GGML) as server:
        yield server


@pytest.fixture(scope="session")
def shared_native_server(real_ggml: None) -> Iterator[NativeServer]:
    """ggml's server with two devices."""
    server = NativeServer(devices=2)
    yield server
    server.kill()


@pytest.fixture
def native_server(real_ggml: None) -> Iterator[NativeServer]:
    """ggml's server with two devices, for one test."""
    server = NativeServer(devices=2)
    yield server
    server.kill()
