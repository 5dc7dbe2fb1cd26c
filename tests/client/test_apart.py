"""Devices of one server over a connection each: none waits for what another one is asked."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch

from sdrpc.cli.devices import placed_devices
from sdrpc.client import RemoteDevice, connect
from sdrpc.device import Buffer, Bytes, Device
from sdrpc.engine import LocalDevice
from sdrpc.engine.precision import EXACT
from sdrpc.server import Limits, Server
from sdrpc.web.devices import Devices


class Slow(LocalDevice):
    """Answers when it may."""

    def __init__(self, name: str) -> None:
        super().__init__(name, torch.device("cpu"), EXACT, threads=1)
        self.asked, self.may = threading.Event(), threading.Event()

    def read(self, buffer: Buffer, offset: int, size: int) -> Bytes:
        self.asked.set()
        self.may.wait()
        return super().read(buffer, offset, size)


@contextmanager
def served(*devices: LocalDevice, limits: Limits | None = None) -> Iterator[str]:
    with ExitStack() as stack:
        for device in devices:
            stack.callback(device.close)
        yield stack.enter_context(Server(devices, limits=limits)).endpoint


@contextmanager
def connected(*endpoints: str) -> Iterator[list[RemoteDevice]]:
    devices = connect(endpoints, apart=True)
    try:
        yield devices
    finally:
        for device in devices:
            device.close()


def written(device: Device) -> Buffer:
    with device.turns:
        buffer = device.allocate(64)
        device.write(buffer, 0, bytes(range(64)))
        return buffer


def read(device: Device, buffer: Buffer) -> bytes:
    with device.turns:
        return bytes(device.read(buffer, 0, 64))


def test_one_device_is_used_while_another_is_waited_for() -> None:
    first, second = Slow("one"), Slow("two")
    second.may.set()
    with served(first, second) as endpoint, connected(endpoint) as (one, two):
        assert [one.name, two.name] == ["RPC0", "RPC1"]
        there, here = written(one), written(two)
        found: list[bytes] = []
        waiting = threading.Thread(target=lambda: found.append(read(one, there)))
        waiting.start()
        first.asked.wait()
        assert read(two, here) == bytes(range(64))
        assert not found
        first.may.set()
        waiting.join()
        assert found == [bytes(range(64))]
        one.close()
        assert read(two, here) == bytes(range(64)), "it has a connection of its own"


def test_what_goes_over_all_connections_to_a_server_is_told_together() -> None:
    with served(Slow("one"), Slow("two")) as endpoint, connected(endpoint) as devices:
        written(devices[1])
        (traffic,) = Devices(devices).traffic()
        assert traffic.sent == sum(device.traffic.sent for device in devices)
        assert traffic.received == sum(device.traffic.received for device in devices)


def test_a_server_that_has_no_place_for_another_connection(caplog: pytest.LogCaptureFixture) -> None:
    devices = [Slow("one"), Slow("two")]
    with (
        caplog.at_level(logging.INFO, "sdrpc.client"),
        served(*devices, limits=Limits(connections=1)) as endpoint,
        connected(endpoint) as (one, two),
    ):
        assert one.turns is two.turns
        assert written(two) is not written(one)
        assert "share a connection" in caplog.text


def test_a_server_without_a_place_says_nothing_of_the_next_one() -> None:
    with (
        served(Slow("one"), Slow("two"), limits=Limits(connections=1)) as full,
        served(Slow("three"), Slow("four")) as roomy,
        connected(full, roomy) as (one, two, three, four),
    ):
        assert one.turns is two.turns
        assert three.turns is not four.turns


@pytest.mark.parametrize(
    ("names", "several", "apart"),
    [
        ("RPC0|RPC1", True, True),
        ("RPC0|RPC1", False, False),
        ("RPC0&RPC1", True, False),
        ("RPC0", True, False),
        ("auto", True, False),
    ],
)
def test_devices_that_draw_beside_each_other_are_apart(names: str, several: bool, apart: bool) -> None:
    """Those that compute one after the other, or one picture together, copy among themselves."""
    with (
        served(Slow("one"), Slow("two")) as endpoint,
        placed_devices({"diffusion": (names,)}, [endpoint], "exact", 1, several=several) as (_, (one, two)),
    ):
        assert (one.turns is not two.turns) == apart
