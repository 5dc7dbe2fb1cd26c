"""A server asks of a device no more than its interface: one that computes nothing can be served."""

from __future__ import annotations

import logging

import pytest

from sdrpc.client import connect
from sdrpc.errors import OutOfMemory
from sdrpc.ggml.tensor import Graph, Tensor
from sdrpc.ggml.types import F32
from sdrpc.server import Limits, Server
from tests.server.conftest import eventually
from tests.support.null import NullDevice


def test_a_device_that_computes_nothing_is_served(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sdrpc")
    null = NullDevice()
    with Server([null]) as server:
        (remote,) = connect([server.endpoint])
        buffer = remote.allocate(1 << 30)
        remote.write(buffer, 5, bytes(range(100)))
        leaf = Tensor(F32, (4, 1, 1, 1), (4, 16, 16, 16), buffer=buffer.key)
        node = Tensor(F32, (4, 1, 1, 1), (4, 16, 16, 16), op="SQR", src=(leaf,), buffer=buffer.key, offset=64)
        program = remote.compile(Graph((node,)), {buffer.key: buffer})
        for _ in range(3):
            program.run()
        assert bytes(remote.read(buffer, 0, 1 << 20)) == bytes(1 << 20)
        remote.close()
        assert eventually(lambda: null.held == 0)
        assert [program.runs for program in null.programs] == [3]
    came = [line for line in caplog.messages if "came, a client of sdrpc" in line]
    left = [line for line in caplog.messages if "MiB held at most" in line]
    assert len(came) == len(left) == 1
    assert "1.0 MiB out, 1,024.0 MiB held at most" in left[0]


def test_a_client_gets_its_share_of_a_device_and_no_more() -> None:
    null = NullDevice(1000 << 20)
    limits = Limits(share=0.75, bytes_of_all=900 << 20)
    with Server([null], limits=limits) as server:
        (first,), (second,) = connect([server.endpoint]), connect([server.endpoint])
        assert first.memory() == (750 << 20, 750 << 20)
        with pytest.raises(OutOfMemory):
            first.allocate((750 << 20) + 1)
        kept = first.allocate(700 << 20)
        assert first.memory().free == 50 << 20
        assert second.memory().free == 200 << 20, "of all clients' 900 MiB"
        with pytest.raises(OutOfMemory):
            second.allocate(201 << 20)
        first.free(kept)
        assert first.memory().free == 750 << 20
        second.free(second.allocate(700 << 20))
        first.close()
        second.close()
