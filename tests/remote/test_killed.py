"""A server process that is killed while it computes: the error of what was asked, whatever is tidied up after it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import sdrpc
from sdrpc.client import connect, connection
from sdrpc.device import Device
from sdrpc.errors import ConnectionLost
from sdrpc.wire.hello import NATIVE, Capability
from tests.interop.tap import Tap
from tests.server.conftest import eventually
from tests.support.process import ServerProcess


class Long(torch.nn.Module):
    """So many products, one after the other, that it takes longer than killing a process."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1024, 1024))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(300):
            x = x @ self.weight
        return x


def compute(device: Device) -> None:
    module = sdrpc.offload(Long(), device, retry=0)
    try:
        module(torch.zeros(1024, 1024))
    finally:
        module.close()  # type: ignore[operator]


@pytest.mark.parametrize("protocol", ["5.1.0", "7.0.0"])
@pytest.mark.parametrize("capabilities", [connection.CAPABILITIES, NATIVE], ids=["sdrpc", "native"])
def test_while_it_computes(protocol: str, capabilities: Capability, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without answers to what is freed, with and without reasons of errors."""
    monkeypatch.setattr(connection, "CAPABILITIES", capabilities)
    with (
        ServerProcess("--device", "CPU", "--protocol", protocol) as server,
        Tap(f"127.0.0.1:{server.port}") as tap,
        ThreadPoolExecutor() as pool,
    ):
        (device,) = connect([tap.endpoint])

        def kill() -> None:
            eventually(lambda: tap.commands["GET_TENSOR"], 120)  # which waits for the graph before it
            server.process.kill()

        killed = pool.submit(kill)
        with pytest.raises(ConnectionLost) as raised:
            compute(device)
        killed.result()
        device.close()
    assert str(raised.value) == (
        f"{tap.endpoint}: the server hung up while reading 4,194,304 bytes on device 0 "
        "(after a graph was started on RPC0)"
    )
