"""What a server refuses keeps its reason on the way: the type of the error, its numbers and its words."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace

import pytest
import torch

from sdrpc.client import RemoteDevice, connect, connection
from sdrpc.engine.device import LocalDevice
from sdrpc.engine.precision import EXACT
from sdrpc.errors import (
    ComputeError,
    ConnectionFailed,
    ConnectionLost,
    OutOfMemory,
    OverQuota,
    RemoteProtocolError,
    SdrpcError,
    ServerStopping,
)
from sdrpc.server import Limits, Server, listener
from sdrpc.wire.hello import Capability
from sdrpc.wire.messages import FreeBuffer
from tests.server.conftest import eventually
from tests.support.products import endless, products

MIB = 1 << 20
LIMITS = Limits(buffer_bytes=64 * MIB, connections=2, silent_seconds=1e6)


@contextmanager
def serving(limits: Limits = LIMITS, compute_limit: float | None = None) -> Iterator[Server]:
    device = LocalDevice("CPU", torch.device("cpu"), EXACT, threads=1, compute_limit=compute_limit)
    with Server([device], limits=limits) as server:
        yield server
    device.close()


@contextmanager
def connected(server: Server) -> Iterator[RemoteDevice]:
    (device,) = connect([server.endpoint])
    with closing(device):
        yield device


def test_a_buffer_for_which_there_is_no_room() -> None:
    """How much was asked, is free, and is other clients'; the connection goes on."""
    with serving() as server, connected(server) as one, connected(server) as other:
        other.allocate(10 * MIB)
        one.allocate(60 * MIB)
        with pytest.raises(OutOfMemory) as refused:
            one.allocate(5 * MIB)
        assert (refused.value.size, refused.value.free, refused.value.others) == (5 * MIB, 4 * MIB, 10 * MIB)
        assert str(refused.value) == (
            f"RPC0 ({server.endpoint}): no room for 5.0 MiB; 4.0 MiB are free; 10.0 MiB are other clients'; "
            "64.0 MiB are one client's share"
        )
        one.allocate(4 * MIB)


def test_more_buffers_than_one_client_may_have() -> None:
    with serving(replace(LIMITS, buffers=3)) as server, connected(server) as device:
        buffers = [device.allocate(1) for _ in range(3)]
        with pytest.raises(OverQuota, match="CPU: one client may have 3 buffers"):
            device.allocate(1)
        device.free(buffers[0])
        device.allocate(1)


def test_working_memory_that_is_not_there() -> None:
    with serving() as server, connected(server) as device:
        run = products(device, 2700, 2)  # 58 MB of buffers, 29 MB for what lies between
        with pytest.raises(OutOfMemory, match=r"RPC0 .* while it runs") as refused:
            run()
    assert refused.value.size > 20 * MIB
    assert refused.value.free is not None


def test_no_place_for_another_client() -> None:
    with (
        serving() as server,
        connected(server),
        connected(server),
        pytest.raises(OverQuota, match=f"{server.endpoint}: 2 clients are connected already"),
    ):
        connect([server.endpoint])


def test_a_computation_that_takes_too_long() -> None:
    with serving(compute_limit=0.05) as server, connected(server) as device:
        run = endless(device)
        with pytest.raises(ComputeError, match=rf"RPC0 \({server.endpoint}\): CPU: stopped at .*longer than 0.05 sec"):
            run()


def test_a_server_that_stops_says_so_to_who_waits_and_who_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdrpc.server.listener._JOIN_SECONDS", 60.0)  # on a busy machine a product takes over a second
    with serving() as server, connected(server) as idle, connected(server) as busy:
        run = endless(busy)
        threading.Timer(0.5, server.stop).start()
        with pytest.raises(ServerStopping, match=f"{server.endpoint}: this server is stopping"):
            run()
        with pytest.raises((ServerStopping, ConnectionLost)):
            idle.memory()


def test_who_asks_without_a_pause_is_told_as_well() -> None:
    """Also in the middle of an upload: what is on its way is not waited for."""
    with serving() as server, connected(server) as device:
        buffer = device.allocate(32 * MIB)
        asked: list[SdrpcError | None] = []
        begun = threading.Event()

        def upload() -> None:
            while not asked:
                if error := failure(lambda: device.write(buffer, 0, bytes(32 * MIB))):
                    asked.append(error)
                begun.set()

        uploading = threading.Thread(target=upload)
        uploading.start()
        assert begun.wait(240)
        server.stop()
        uploading.join(240)
        assert isinstance(asked[0], ServerStopping | ConnectionLost)


def test_grace_lets_finish_what_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that is idle is told, one at work gets its result before, and nobody new is let in."""
    monkeypatch.setattr(listener, "_QUIET_SECONDS", 4.0)  # on a busy machine a client at work may pause for long
    with serving() as server, connected(server) as idle, connected(server) as busy:
        run = products(busy, 512, 100)
        run()
        done: list[object] = []
        working = threading.Thread(target=lambda: done.extend(run() for _ in range(3)))
        working.start()
        server.stop(grace=240)
        assert eventually(lambda: isinstance(failure(lambda: connect([server.endpoint])), ConnectionFailed))
        working.join(240)
        assert len(done) == 3
        assert eventually(lambda: not server.clients), "both were quiet for long enough"
        assert isinstance(failure(idle.memory), ServerStopping | ConnectionLost)
        assert isinstance(failure(run), ServerStopping | ConnectionLost)


def failure(action: Callable[[], object]) -> SdrpcError | None:
    try:
        action()
    except SdrpcError as error:
        return error
    return None


def test_what_was_damaged_on_its_way_to_the_server() -> None:
    with serving() as server, connected(server) as device:
        device._server.connection.call(FreeBuffer(4711), "asking for trouble")
        with pytest.raises(RemoteProtocolError, match="could not understand us: buffer 0x1267 does not exist"):
            device.memory()


@pytest.mark.parametrize("theirs", [Capability.ERRORS, Capability.ERRORS | Capability.MANAGED])
def test_a_client_that_knows_no_kinds_gets_words(theirs: Capability, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "CAPABILITIES", theirs)
    with serving() as server, connected(server) as device:
        device.allocate(63 * MIB)
        with pytest.raises(OutOfMemory, match="has none left"):
            device.allocate(63 * MIB)
        device._server.connection.call(FreeBuffer(4711), "asking for trouble")
        with pytest.raises(SdrpcError, match=f"{server.endpoint}: buffer 0x1267 does not exist"):
            device.memory()
