"""Our client at our server, in every protocol version: as the two find each other, and in the form of native ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from sdrpc.client import RemoteDevice, connect, connection
from sdrpc.ggml.build import leaf, node
from sdrpc.ggml.dialect import Dialect, dialects
from sdrpc.ggml.tensor import OUTPUT, Graph
from sdrpc.ggml.types import F32
from sdrpc.server import Server
from sdrpc.targets import PORTABLE, SDRPC
from sdrpc.wire.hello import NATIVE
from tests.server.conftest import CountingDevice, eventually
from tests.support.process import ServerProcess

every_dialect = pytest.mark.parametrize("dialect", dialects().values(), ids=lambda dialect: dialect.version)


@pytest.fixture(scope="module")
def cpu() -> Iterator[CountingDevice]:
    device = CountingDevice()
    yield device
    device.close()


def works(device: RemoteDevice) -> None:
    """Every command that a picture needs: memory, weights, a graph and the same graph again, a result."""
    assert 0 < device.memory().free <= device.memory().total
    buffer = device.allocate(1024)
    x = replace(leaf(F32, 8), buffer=buffer.key)
    product = replace(node("MUL", x, x), buffer=buffer.key, offset=256)
    sum_ = replace(node("ADD", product, x), buffer=buffer.key, offset=512, flags=OUTPUT)
    program = device.compile(Graph((product, sum_)), {buffer.key: buffer})
    for first in (0, 100):
        values = np.arange(first, first + 8, dtype=np.float32)
        device.write(buffer, 0, values.data)
        program.run()
        result = np.frombuffer(device.read(buffer, 512, 32), np.float32)
        assert np.array_equal(result, values * values + values)
    device.free(buffer)


@every_dialect
def test_between_ours(dialect: Dialect, cpu: CountingDevice) -> None:
    """Before 4.0 the greeting has no room for what only ours can do."""
    with Server([cpu], dialect) as server:
        (device,) = connect([f"127.0.0.1:{server.port}"])
        assert device.target.name == (SDRPC if dialect.hello_request_bytes else PORTABLE).name
        assert device.description.endswith(f"RPC protocol {dialect.version})")
        works(device)
        assert eventually(lambda: cpu.held == 0)
        device.close()


@every_dialect
@pytest.mark.parametrize("name_length", [64, 160])
def test_in_the_form_of_native_ones(
    dialect: Dialect, name_length: int, cpu: CountingDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "CAPABILITIES", NATIVE)
    with Server([cpu], dialect) as server:
        (device,) = connect([f"127.0.0.1:{server.port}"], name_length=name_length)
        assert device.target.name == PORTABLE.name
        works(device)
        assert eventually(lambda: cpu.held == 0)
        device.close()


def test_a_server_that_is_told_to_speak_6_0() -> None:
    """A process. What was freed without an answer makes room for the next."""
    with ServerProcess("--protocol", "6.0.0", "--device", "CPU") as server:
        (device,) = connect([f"127.0.0.1:{server.port}"])
        assert device.description.endswith("(sdrpc, RPC protocol 6.0.0)")
        for _ in range(3):
            works(device)
        device.close()
    assert "Starting RPC server v6.0.0\n" in server.output
