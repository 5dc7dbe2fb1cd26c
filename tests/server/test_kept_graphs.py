"""Graphs by number (protocol 8.0): which of them a server has, what they take, and what a flood of numbers does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from sdrpc.errors import OutOfMemory, RemoteProtocolError
from sdrpc.ggml.dialect import Dialect, dialects, newest
from sdrpc.server import Limits, Server
from sdrpc.server.packed_graphs import PackedGraphs
from sdrpc.server.quotas import Buffers
from sdrpc.server.session import Session
from sdrpc.wire import messages
from sdrpc.wire.hello import Capability
from sdrpc.wire.kept_graphs import MOST, KeptGraphs
from tests.server.conftest import CountingDevice, Scene
from tests.server.test_hostile_graphs import Make, sum_of
from tests.support.client import RawClient
from tests.support.null import NullDevice

LAST = 2**64 - 1
BY_NUMBER = dialects()["8.0.0"]


class Client:
    """One that has a session with a device that computes nothing, and no socket between."""

    def __init__(self, dialect: Dialect = BY_NUMBER, limits: Limits | None = None, buffers: Buffers | None = None):
        self.device = NullDevice()
        self.session = Session([self.device, NullDevice()], limits or Limits(), str, buffers=buffers)
        self.session.versions = (dialect,)
        self.raw = RawClient.__new__(RawClient)
        self.raw.dialect, self.raw.name_length = dialect, 64
        self.buffer = self.allocate()

    def allocate(self) -> tuple[int, int]:
        handle = self.session.answer(messages.AllocBuffer(0, 1 << 20)).remote_ptr
        return handle, self.session.answer(messages.BufferGetBase(handle)).base_ptr

    def payload(self, number: int, uid: int) -> bytes:
        """One node, whose place tells graph ``number`` from others."""
        x, y = (self.raw.record(self.buffer, at=at, id=i) for i, at in ((1, 0), (2, 64 * (1 + number))))
        y = y._replace(op=self.raw.dialect.op_numbers["SQRT"], src=(1, *[0] * 9), flags=16)
        return self.raw.graph([2], [x, y], uid=uid)

    def compute(self, number: int, uid: int) -> None:
        self.session.answer(messages.GraphCompute(self.payload(number, uid)))

    def again(self, uid: int, device: int = 0) -> None:
        self.session.answer(messages.GraphRecompute(device, uid))

    @property
    def ran(self) -> Sequence[int]:
        """How often each compiled graph ran, by what tells it from others."""
        return [
            program.graph.nodes[0].offset // 64 - 1 for program in self.device.programs for _ in range(program.runs)
        ]


def test_any_of_a_thousand_graphs_runs_again() -> None:
    client = Client()
    for number in range(MOST):
        client.compute(number, LAST - number)
    for number in (0, MOST - 1, 500):
        before = client.ran.count(number)
        client.again(LAST - number)
        assert client.ran.count(number) == before + 1


def test_only_so_many_tensors_are_kept_ready() -> None:
    """A compiled graph takes memory for each: here of two, and three graphs may be kept; the last one always is."""
    client = Client(limits=Limits(ready_tensors=6))
    for number in (0, 1, 2, 0, 3, 0, 2, 1):
        client.compute(number, 1 + number)
    made = [program.graph.nodes[0].offset // 64 - 1 for program in client.device.programs]
    assert made == [0, 1, 2, 3, 1]
    client = Client(limits=Limits(ready_tensors=1))
    for number in (0, 0, 1, 1, 0):
        client.compute(number, 1 + number)
    assert len(client.device.programs) == 3


@pytest.mark.parametrize("version", ["5.0.1", "8.0.0"])
def test_the_graph_that_came_last_is_known_by_comparing_it(version: str) -> None:
    client = Client(dialects()[version])
    for number in (0, 0, 1, 1, 0, 2, 2, 0):
        client.compute(number, 1)
        assert client.ran.count(number) > 0
    assert sorted(client.ran) == [0, 0, 0, 0, 1, 1, 2, 2]
    assert len(client.device.programs) == 3


def test_the_bytes_of_the_graph_that_came_last_are_counted_and_given_back() -> None:
    buffers = Buffers(Limits())
    client = Client(dialects()["5.0.1"], buffers=buffers)
    held = buffers.held
    for number in (0, 1, 0, 0):
        client.compute(number, 1)
        assert 0 < buffers.held - held < len(client.payload(number, 1))
    client.session.close()
    assert buffers.held == 0


def test_one_more_and_both_sides_begin_anew() -> None:
    client = Client()
    for number in range(MOST + 1):
        client.compute(number, 1 + number)
    client.again(MOST + 1)
    with pytest.raises(RemoteProtocolError, match="device 0 has no graph 1024"):
        client.again(MOST)


def test_a_number_that_comes_again_means_the_new_graph() -> None:
    client = Client()
    client.compute(3, 7)
    client.compute(4, 7)
    client.again(7)
    assert sorted(client.ran) == [3, 4, 4]


def test_number_0_is_never_kept() -> None:
    client = Client()
    client.compute(1, 0)
    with pytest.raises(RemoteProtocolError, match="device 0 has no graph 0"):
        client.again(0)


def test_devices_count_on_their_own() -> None:
    client = Client()
    client.compute(1, 5)
    with pytest.raises(RemoteProtocolError, match="device 1 has no graph 5"):
        client.again(5, device=1)


def test_the_same_graph_by_many_numbers_is_compiled_and_held_once() -> None:
    client = Client()
    for uid in range(1, 300):
        client.compute(1, uid)
    assert len(client.device.programs) == 1
    held = client.session._graphs._packed.held
    client.compute(1, 300)
    assert client.session._graphs._packed.held == held
    client.again(17)
    assert len(client.ran) == 301


def test_freed_memory_takes_its_graphs_along_and_no_others() -> None:
    client = Client()
    client.compute(1, 1)
    first, client.buffer = client.buffer, client.allocate()
    client.compute(2, 2)
    client.session.answer(messages.FreeBuffer(first[0]))
    client.again(2)
    with pytest.raises(RemoteProtocolError, match="device 0 has no graph 1, or not its buffers any more"):
        client.again(1)


def test_graphs_that_are_lost_still_count() -> None:
    """As they do for the client, which does not know which of its graphs a freed buffer has cost."""
    client = Client()
    client.compute(0, 1)
    first, client.buffer = client.buffer, client.allocate()
    client.session.answer(messages.FreeBuffer(first[0]))
    for number in range(1, MOST + 1):
        client.compute(number, 1 + number)
    client.again(MOST + 1)
    with pytest.raises(RemoteProtocolError, match="device 0 has no graph 1024"):
        client.again(MOST)


def test_what_graphs_take_is_bounded_and_the_oldest_lose() -> None:
    size = len(Client().payload(1, 1))
    client = Client(limits=Limits(graph_bytes=20 * size, graphs=4))
    for number in range(MOST):
        client.compute(number, 1 + number)
        assert client.session._graphs._packed.held <= 20 * size
    client.again(MOST)
    client.again(MOST - 10)
    with pytest.raises(RemoteProtocolError, match=r"the graph is forgotten, .* fill the 0\.0 MiB for graphs"):
        client.again(1)


def test_what_graphs_take_is_counted_for_the_client_and_for_all() -> None:
    limits = Limits(buffer_bytes=(1 << 20) + 4096, bytes_of_all=(1 << 20) + 2048, share=1.0)
    buffers = Buffers(limits)
    client = Client(limits=limits, buffers=buffers)
    client.compute(1, 1)
    held = client.session._graphs._packed.held
    assert 0 < held < 1024
    assert buffers.held == (1 << 20) + held
    assert client.session.most_held >= (1 << 20) + held
    with pytest.raises(OutOfMemory):
        client.session.answer(messages.AllocBuffer(0, 2049 - held))
    for number in range(64):
        client.compute(number, 2 + number)
        assert buffers.held <= limits.bytes_of_all
    client.session.close()
    assert (buffers.held, buffers.count) == (0, 0)


def test_a_graph_that_is_larger_than_all_room_is_not_kept() -> None:
    packed = PackedGraphs(100, lambda _: True, lambda _: None)
    noise = np.random.default_rng(1).bytes(1000)
    packed.put(b"a", bytes(1000))
    packed.put(b"b", noise)
    assert packed.get(b"a") == bytes(1000)
    assert packed.get(b"b") is None


@pytest.mark.parametrize("version", ["3.6.0", "5.0.1", "7.0.0"])
def test_before_8_0_the_last_graph_runs_again(version: str) -> None:
    client = Client(dialects()[version])
    for number in (1, 2, 1, 2):
        client.compute(number, 0)
    client.again(0)
    assert sorted(client.ran) == [1, 1, 2, 2, 2]
    assert client.session._graphs._packed.held == 0


def test_a_flood_of_numbers(caplog: pytest.LogCaptureFixture, device: CountingDevice) -> None:
    """Over a socket: the server computes all of them, holds what it may, and goes on."""
    with Server([device], limits=Limits(graph_bytes=1 << 16)) as server, Scene(server, caplog) as scene:
        client = scene.client(Capability.ERRORS)
        make = Make(client)
        node = sum_of(make)
        for uid in range(1, 3000):
            make.compute(node, uid=uid * 0x9E3779B97F4A7C15 % 2**64 or 1)
        client.ask(messages.DeviceCount())
        client.post(messages.GraphRecompute(0, 4711))
        scene.ends(client, "device 0 has no graph 4711")


def test_the_set_is_counted_as_ggml_counts_it() -> None:
    kept: KeptGraphs[str] = KeptGraphs()
    for uid in range(MOST):
        assert kept.put(0, uid, "a") == []
    assert kept.put(1, 0, "b") == []
    assert kept.drop(lambda value: value == "a") == ["a"] * MOST
    assert kept.get(0, 5) is None
    assert kept.put(0, 5, "c") == [], "full: also one that was there begins anew"
    assert list(kept) == ["c", "b"]
    assert kept.put(0, 5, "d") == ["c"]
    assert newest().has_graph_uids
