"""A server of this process with a client at work on it, and what must hold after another client misbehaved."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from threading import Lock

import pytest
import torch

from sdrpc.device import Buffer
from sdrpc.engine.device import LocalDevice
from sdrpc.engine.memory import LocalBuffer
from sdrpc.engine.precision import Precision
from sdrpc.server import Server
from sdrpc.wire.hello import NATIVE, Capability
from tests.support.client import SECONDS, Adder, RawClient


class CountingDevice(LocalDevice):
    """The CPU, which counts the bytes that clients hold."""

    def __init__(self, name: str = "CPU", compute_limit: float | None = None) -> None:
        super().__init__(name, torch.device("cpu"), Precision("exact"), threads=1, compute_limit=compute_limit)
        self.held = 0
        self._counting = Lock()

    def allocate(self, size: int) -> LocalBuffer:
        buffer = super().allocate(size)
        with self._counting:
            self.held += size
        return buffer

    def free(self, buffer: Buffer) -> None:
        super().free(buffer)
        with self._counting:
            self.held -= buffer.size


def eventually(condition: Callable[[], object], seconds: float = SECONDS) -> bool:
    """Whether ``condition`` becomes true in that time."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.005)
    return True


class Scene:
    """A server, and a client of it that computes all the time: whatever others do, it gets right results."""

    def __init__(self, server: Server, caplog: pytest.LogCaptureFixture | None = None) -> None:
        self.server, self.caplog = server, caplog
        self.devices = [device for device in server.devices if isinstance(device, CountingDevice)]
        self.clients: list[RawClient] = []
        self.works = Adder(RawClient(server.port, server.dialect))
        self.works()
        self.held = self._held()

    def _held(self) -> int:
        return sum(device.held for device in self.devices)

    def client(self, capabilities: Capability | None = NATIVE, name_length: int = 64) -> RawClient:
        client = RawClient(self.server.port, self.server.dialect, name_length, capabilities)
        self.clients.append(client)
        return client

    def dismiss(self) -> None:
        """Close all clients but the one at work."""
        while self.clients:
            self.clients.pop().close()

    def log_of(self, client: RawClient) -> list[str]:
        """The warnings that name ``client``."""
        assert self.caplog is not None
        records = [r for r in self.caplog.records if r.levelno >= logging.WARNING]
        return [line for line in (r.getMessage() for r in records) if line.startswith(client.name + ":")]

    def logs(self, client: RawClient, reason: str) -> str:
        """The one line that was logged about the end of ``client``, which says ``reason`` (a pattern)."""
        assert eventually(lambda: self.log_of(client)), "nothing was logged"
        (line,) = self.log_of(client)
        assert re.search(reason, line), line
        assert "fault" not in line
        return line

    def ends(self, client: RawClient, reason: str) -> None:
        """``client`` was thrown out, for ``reason`` (a pattern), which is logged once and told if it can be; the rest
        of the world goes on, and its memory is back."""
        said = client.ended()
        line = self.logs(client, reason)
        if client.errors:
            assert said
            assert line.endswith(said)
        else:
            assert said == ""
        client.close()
        self.goes_on()

    def goes_on(self) -> None:
        """The other client gets right results, and nobody else holds memory."""
        self.works()
        assert eventually(lambda: self._held() == self.held), f"{self._held() - self.held} bytes are still held"

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *_: object) -> None:
        self.dismiss()
        self.works.client.close()


@pytest.fixture(scope="session")
def device() -> Iterator[CountingDevice]:
    device = CountingDevice()
    yield device
    device.close()


@pytest.fixture(scope="module")
def shared(device: CountingDevice) -> Iterator[Scene]:
    """One scene for many tests: attacks must not spoil it for each other."""
    second = CountingDevice("CPU1")
    with Server([device, second]) as server, Scene(server) as scene:
        yield scene
    second.close()


@pytest.fixture
def scene(shared: Scene, caplog: pytest.LogCaptureFixture) -> Iterator[Scene]:
    shared.caplog = caplog
    yield shared
    shared.dismiss()


@pytest.fixture(params=[NATIVE, Capability.ERRORS], ids=["native", "sdrpc"])
def flavour(request: pytest.FixtureRequest) -> Capability:
    """A client that knows nothing of error replies, and one that does."""
    capability: Capability = request.param
    return capability
