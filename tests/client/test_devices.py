"""Remote devices against a server that does what native ones do, over real sockets, in every dialect."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from sdrpc import client
from sdrpc.client import RemoteDevice, Timeouts, connect, remote
from sdrpc.device import Memory, Span
from sdrpc.errors import (
    ComputeError,
    ConnectionFailed,
    ConnectionLost,
    GraphError,
    LocalProtocolError,
    OutOfMemory,
    RemoteError,
    UnsupportedOperation,
    UsageError,
    VersionMismatch,
)
from sdrpc.ggml.build import leaf, node
from sdrpc.ggml.dialect import Dialect, dialects
from sdrpc.ggml.tensor import OUTPUT, Graph
from sdrpc.ggml.types import F32
from sdrpc.targets import PORTABLE, SDRPC
from sdrpc.wire.framing import encode_error
from sdrpc.wire.graphs import Received
from sdrpc.wire.hello import NATIVE, Capability
from sdrpc.wire.kept_graphs import MOST
from sdrpc.wire.messages import Command, CopyTensor, CopyTensorReply, GraphRecompute
from tests.support.scripted import HANG_UP, Proxy, Scripted, base, raw
from tests.wire.examples import DIALECTS

every_dialect = pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.version)
OURS = Capability.ERRORS | Capability.MANAGED
PATIENT = Timeouts(connect=60.0, answer=60.0)


@contextmanager
def connected(server: Scripted, **options: object) -> Iterator[RemoteDevice]:
    with server.listening():
        device, *_ = connect([server.endpoint], PATIENT, **options)  # type: ignore[arg-type]
        try:
            yield device
        finally:
            device.close()


def doubling(server: Scripted, received: Received) -> None:
    """Computes graphs of one ADD of a tensor to itself."""
    (out,) = received.graph.nodes
    (source, _) = out.src
    assert source is not None
    values = np.frombuffer(server.memory[source.buffer], np.float32, source.elements, source.offset)
    server.memory[out.buffer][out.offset : out.offset + out.nbytes] = (values * 2).tobytes()


def add(key: int, target: int = 64) -> Graph:
    """Eight floats at 0, doubled, at ``target``."""
    x = replace(leaf(F32, 8), buffer=key)
    return Graph((replace(node("ADD", x, x), buffer=key, offset=target, flags=OUTPUT),))


def test_public_names() -> None:
    assert sorted(client.__all__) == client.__all__
    assert all(hasattr(client, name) for name in client.__all__)


@every_dialect
@pytest.mark.parametrize("name_length", [64, 160])
def test_a_session(dialect: Dialect, name_length: int) -> None:
    server = Scripted(dialect, name_length, on_graph=doubling)
    with connected(server) as device:
        assert device.name == "RPC0"
        assert device.description == f"{server.endpoint}, device 0 (ggml, RPC protocol {dialect.version})"
        assert device.target.name == PORTABLE.name
        assert device.alignment == 32
        assert device.memory() == Memory(1 << 30, 2 << 30)
        buffer = device.allocate(1024)
        values = np.arange(8, dtype=np.float32)
        device.write(buffer, 0, memoryview(values))
        program = device.compile(add(buffer.key), {buffer.key: buffer})
        program.run()
        assert np.array_equal(np.frombuffer(device.read(buffer, 64, 32), np.float32), values * 2)
        program.run()
        device.free(buffer)
    assert server.commands()[-5:] == ["SET_TENSOR", "GRAPH_COMPUTE", "GET_TENSOR", "GRAPH_RECOMPUTE", "FREE_BUFFER"]


@every_dialect
def test_version_and_name_length_are_found_out(dialect: Dialect) -> None:
    """The newer HELLO, then the older one; GET_ALLOC_SIZE with names of 64, 128, 160 bytes: a connection each."""
    greetings = 1 if dialect.hello_request_bytes else 2
    for tries, name_length in enumerate((64, 128, 160), start=1):
        server = Scripted(dialect, name_length)
        with connected(server) as device:
            assert server.greetings == greetings * tries
            assert device.description.endswith(f"RPC protocol {dialect.version})")
            assert server.commands().count("GET_ALLOC_SIZE") == 1


def test_an_unusual_name_length_has_to_be_told() -> None:
    server = Scripted(name_length=96)
    with server.listening(), pytest.raises(ConnectionFailed, match="names of 64, 128, 160 bytes; if it was built"):
        connect([server.endpoint], PATIENT)
    with connected(Scripted(name_length=96), name_length=96) as device:
        device.write(device.allocate(4), 0, b"abcd")
    with pytest.raises(UsageError, match="a name length of 97"):
        connect([], PATIENT, name_length=97)


def test_our_servers_are_asked_nothing_about_names() -> None:
    server = Scripted(name_length=None, capabilities=OURS)
    with connected(server) as device:
        assert device.target.name == SDRPC.name
        assert "(sdrpc, " in device.description
        assert "GET_ALLOC_SIZE" not in server.commands()


def test_a_server_of_ours_without_managed_graphs() -> None:
    with connected(Scripted(name_length=None, capabilities=Capability.ERRORS)) as device:
        assert device.target.name == PORTABLE.name


def test_names_count_across_servers() -> None:
    first, second = Scripted(devices=2), Scripted(devices=3)
    with first.listening(), second.listening():
        devices = connect([second.endpoint, first.endpoint], PATIENT)
        assert [device.name for device in devices] == ["RPC0", "RPC1", "RPC2", "RPC3", "RPC4"]
        assert devices[3].description.startswith(f"{first.endpoint}, device 0 ")
        buffers = [device.allocate(64) for device in devices]
        assert len({buffer.key for buffer in buffers}) == 5
        assert [message.device for command, message in first.log if command is Command.ALLOC_BUFFER] == [0, 1]
        with pytest.raises(LocalProtocolError, match="no buffer of this server"):
            devices[0].write(buffers[3], 0, b"x")
        for device in devices:
            device.close()


def test_the_connection_ends_with_the_last_device() -> None:
    with Scripted(devices=2).listening() as server:
        first, second = connect([server.endpoint], PATIENT)
        first.close()
        first.close()
        assert second.memory()
        second.close()
        with pytest.raises(ConnectionLost, match="the connection was closed"):
            second.memory()


def test_the_same_server_twice() -> None:
    with pytest.raises(UsageError, match=r"127\.0\.0\.1:50052 is given twice"):
        connect(["127.0.0.1", "127.0.0.1:50052"])


def test_a_server_that_is_not_there_is_named_and_the_others_are_left() -> None:
    with Scripted().listening() as server, Scripted().listening() as gone:
        endpoint = gone.endpoint
    with Scripted().listening() as server:
        with pytest.raises(ConnectionFailed, match=f"{endpoint}: nobody answers") as raised:
            connect([server.endpoint, endpoint], PATIENT)
        assert raised.value.endpoint == endpoint
        connect([server.endpoint], PATIENT)[0].close()  # a server for one client at a time is free again


def test_names_that_are_no_hosts() -> None:
    with pytest.raises(ConnectionFailed, match="nobody answers"):
        connect(["x" * 300 + ":50052"], PATIENT)


def test_large_data_goes_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PART", 1000)
    server = Scripted()
    with connected(server) as device:
        buffer = device.allocate(4096)
        data = np.random.default_rng(0).integers(0, 256, 3001, np.uint8)
        device.write(buffer, 7, memoryview(data))
        assert bytes(device.read(buffer, 7, 3001)) == data.tobytes()
        sent = [message for command, message in server.log if command is Command.SET_TENSOR]
        assert [len(message.data) for message in sent] == [1000, 1000, 1000, 1]
        assert [message.tensor.ne for message in sent] == [(1000, 1, 1, 1)] * 3 + [(1, 1, 1, 1)]
        assert [message.tensor.data - base(1) for message in sent] == [7, 1007, 2007, 3007]


def test_what_is_read_later_and_what_is_written_before_may_be_large() -> None:
    """The server does not read while it gives an answer that nobody receives."""
    size = 64 << 20
    with connected(Scripted()) as device:
        buffer = device.allocate(size)
        later = device.read_later(buffer, 0, size)
        device.write(buffer, 0, b"\1" * size)
        assert not any(later.wait()[:: 1 << 12]), "as it was when it was asked for"
        assert bytes(device.read(buffer, size - 1, 1)) == b"\1"


def test_what_a_lost_connection_was_asked_never_comes() -> None:
    """Whoever has the device again meanwhile: what waits for it must not take memory that nothing came to for it."""
    with connected(Scripted()) as device:
        later = device.read_later(device.allocate(64), 0, 64)
        device._server.connection.close()
        device.reopen()
        for _ in range(2):
            with pytest.raises(ConnectionLost, match="the connection was lost meanwhile"):
                later.wait()


def test_each_two_devices_are_asked_whether_they_copy() -> None:
    def among_gpus(message: CopyTensor) -> CopyTensorReply:
        return CopyTensorReply(int(message.dst.buffer < 3))

    server = Scripted(devices=3, answers={Command.COPY_TENSOR: among_gpus})
    with server.listening():
        devices = connect([server.endpoint], PATIENT)
        a, b, c = ((device, device.allocate(64)) for device in devices)
        for _ in range(2):
            for (one, source), (other, target), copied in ((a, b, True), (b, c, False), (b, a, True)):
                assert one.copy_to(Span(one, source, 0, 64), Span(other, target, 0, 64)) == copied
        assert not any(devices[0].read(a[1], 0, 64))
        for device in devices:
            device.close()
    assert server.commands().count("COPY_TENSOR") == 5


def test_memory_of_any_shape_is_written() -> None:
    with connected(Scripted()) as device:
        buffer = device.allocate(64)
        array = np.arange(16, dtype=np.float32).reshape(4, 4)
        device.write(buffer, 0, array.data)
        assert bytes(device.read(buffer, 0, 64)) == array.tobytes()
        device.write(buffer, 3, bytearray(b"xy"))
        assert bytes(device.read(buffer, 3, 2)) == b"xy"


def test_nothing_is_sent_for_nothing() -> None:
    server = Scripted()
    with connected(server) as device:
        buffer = device.allocate(0)
        before = len(server.log)
        device.write(buffer, 0, b"")
        device.write(buffer, 0, np.empty((0, 4), np.float32).data)
        assert bytes(device.read(buffer, 0, 0)) == b""
        assert len(server.log) == before


@pytest.mark.parametrize(("offset", "size"), [(-1, 1), (0, 65), (64, 1), (65, 0), (0, -1)])
def test_ranges(offset: int, size: int) -> None:
    with connected(Scripted()) as device:
        buffer = device.allocate(64)
        with pytest.raises(LocalProtocolError, match="RPC0: bytes"):
            device.read(buffer, offset, size)
        if size > 0:
            with pytest.raises(LocalProtocolError, match="RPC0: bytes"):
                device.write(buffer, offset, bytes(size))
        device.free(buffer)
        with pytest.raises(LocalProtocolError, match="or was freed"):
            device.read(buffer, 0, 1)
        with pytest.raises(LocalProtocolError, match="or was freed"):
            device.free(buffer)


def test_out_of_memory() -> None:
    server = Scripted(answers={Command.ALLOC_BUFFER: raw(bytes(16))})
    with connected(server) as device:
        with pytest.raises(OutOfMemory, match=r"RPC0: no room for 1\.0 MiB; the server at .* has none left") as raised:
            device.allocate(1 << 20)
        assert (raised.value.device, raised.value.size) == ("RPC0", 1 << 20)
        assert device.memory()
        with pytest.raises(OutOfMemory, match=r"limited to 1,024\.0 MiB"):
            device.allocate((1 << 30) + 1)
        with pytest.raises(LocalProtocolError):
            device.allocate(-1)
        assert server.commands().count("ALLOC_BUFFER") == 1


AGAIN = {
    "7.0.0": ("COMPUTE", "RECOMPUTE", "RECOMPUTE", "COMPUTE", "COMPUTE", "RECOMPUTE"),  # the last one is kept
    "8.0.0": ("COMPUTE", "RECOMPUTE", "COMPUTE", "COMPUTE", "RECOMPUTE", "RECOMPUTE"),  # each is, by its number
}


@pytest.mark.parametrize("version", AGAIN)
def test_a_graph_is_sent_again_only_when_it_must_be(version: str) -> None:
    server = Scripted(dialects()[version], on_graph=doubling)
    with connected(server) as device:
        buffer = device.allocate(1024)
        one, two = (device.compile(add(buffer.key, at), {buffer.key: buffer}) for at in (64, 128))
        like_one = device.compile(add(buffer.key, 64), {buffer.key: buffer})
        other = device.allocate(64)
        started = len(server.log)
        for program in (one, one, like_one, two, one, one):
            program.run()
        device.read(buffer, 0, 1)
        assert server.commands()[started:-1] == [f"GRAPH_{command}" for command in AGAIN[version]]
        device.free(other)  # servers forget their graphs when a buffer goes
        one.run()
        device.read(buffer, 0, 1)
        assert server.commands()[-2:] == ["GRAPH_COMPUTE", "GET_TENSOR"]


def test_both_sides_count_graphs_alike() -> None:
    """When a native server has as many graphs as it keeps, it forgets all. Those whose buffers were freed count too."""
    server = Scripted(on_graph=doubling)
    with connected(server) as device:
        buffer, other = device.allocate(1024), device.allocate(64)
        programs = [device.compile(add(buffer.key, 64), {buffer.key: buffer}) for _ in range(MOST + 1)]
        for position, program in enumerate(programs[:-1]):
            program.run()
            if position % 64 == 0:
                device.memory()  # it keeps up
        programs[0].run()
        device.memory()
        assert server.commands().count("GRAPH_RECOMPUTE") == 1
        device.free(other)
        programs[1].run()  # the server has as many as it keeps: it begins anew
        programs[2].run()
        programs[1].run()
        device.memory()
        ran = [name for name in server.commands() if name.startswith("GRAPH")]
        assert ran[-3:] == ["GRAPH_COMPUTE", "GRAPH_COMPUTE", "GRAPH_RECOMPUTE"]
        assert server.kept == {programs[1].uid, programs[2].uid}


def test_each_device_has_its_own_last_graph() -> None:
    server = Scripted(dialects()["7.0.0"], devices=2, on_graph=doubling)
    with server.listening():
        devices = connect([server.endpoint], PATIENT)
        programs = []
        for device in devices:
            buffer = device.allocate(256)
            programs.append(device.compile(add(buffer.key), {buffer.key: buffer}))
        for program in programs * 2:
            program.run()
        devices[0].memory()
        assert [message for command, message in server.log if command is Command.GRAPH_RECOMPUTE] == [
            GraphRecompute(0),
            GraphRecompute(1),
        ]
        for device in devices:
            device.close()


def test_programs_end_with_their_buffers() -> None:
    with connected(Scripted(on_graph=doubling)) as device:
        buffer = device.allocate(256)
        program = device.compile(add(buffer.key), {buffer.key: buffer})
        device.free(buffer)
        with pytest.raises(LocalProtocolError, match="a buffer of the program was freed"):
            program.run()


def test_graphs_are_checked_before_they_are_sent() -> None:
    server = Scripted()
    with connected(server) as device:
        buffer = device.allocate(64)
        for graph in (add(buffer.key), add(buffer.key + 1000), Graph((replace(add(0).nodes[0], buffer=0),))):
            with pytest.raises(GraphError):
                device.compile(graph, {buffer.key: buffer})
        x = replace(leaf(F32, 4), buffer=buffer.key)
        odd = Graph((replace(node("SQR", x), op="FLASH_ATTN_BACK", buffer=buffer.key, offset=32),))
        with pytest.raises(UnsupportedOperation, match="FLASH_ATTN_BACK"):
            device.compile(odd, {buffer.key: buffer})
        assert not server.commands()[-1].startswith("GRAPH")


def test_a_managed_graph() -> None:
    server = Scripted(name_length=None, capabilities=OURS)
    with connected(server) as device:
        buffer = device.allocate(256)
        x = replace(leaf(F32, 8), buffer=buffer.key)
        inner = node("SQR", x)
        out = replace(node("ADD", inner, x), buffer=buffer.key, offset=64, flags=OUTPUT)
        device.compile(Graph((inner, out)), {buffer.key: buffer}).run()
        device.read(buffer, 64, 32)
        assert "GRAPH_COMPUTE" in server.commands()


def test_a_reason_for_a_failed_graph() -> None:
    """It shows at the next answer, and ends the connection: what comes after is told why."""
    server = Scripted(name_length=None, capabilities=OURS, answers={Command.GRAPH_COMPUTE: encode_error("ADD: no")})
    with connected(server) as device:
        buffer = device.allocate(256)
        program = device.compile(add(buffer.key), {buffer.key: buffer})
        program.run()
        with pytest.raises(ComputeError, match=r"RPC0 \(.*\): ADD: no") as raised:
            device.read(buffer, 64, 32)
        assert isinstance(raised.value.__cause__, RemoteError)
        with pytest.raises(ConnectionLost, match="ADD: no"):
            program.run()


def test_a_reason_for_a_refusal() -> None:
    server = Scripted(name_length=None, capabilities=OURS, answers={Command.GET_DEVICE_MEMORY: encode_error("not now")})
    with connected(server) as device, pytest.raises(RemoteError, match=f"{server.endpoint}: not now") as raised:
        device.memory()
    assert (raised.value.endpoint, raised.value.reason) == (server.endpoint, "not now")


def test_a_reason_that_comes_while_we_are_sending() -> None:
    """The server says why and hangs up in the middle of an upload."""

    answers = {Command.SET_TENSOR: HANG_UP}
    server = Scripted(name_length=None, capabilities=OURS, answers=answers, last_words=encode_error("too much"))
    with connected(server) as device:
        buffer = device.allocate(64 << 20)
        with pytest.raises(RemoteError, match="too much"):
            device.write(buffer, 0, bytes(64 << 20))


def test_a_native_server_that_dies_of_a_graph() -> None:
    with connected(Scripted(answers={Command.GRAPH_COMPUTE: HANG_UP})) as device:
        buffer = device.allocate(256)
        device.compile(add(buffer.key), {buffer.key: buffer}).run()
        with pytest.raises(ConnectionLost, match=r"hung up while reading 32 bytes .*after a graph was started on RPC0"):
            device.read(buffer, 64, 32)


@every_dialect
def test_freeing_what_a_lost_connection_held_is_no_error(dialect: Dialect) -> None:
    """The server has freed it already; so the error that the connection was lost by is what a caller sees."""
    with connected(Scripted(dialect, answers={Command.GRAPH_COMPUTE: HANG_UP})) as device:
        buffer = device.allocate(256)
        device.compile(add(buffer.key), {buffer.key: buffer}).run()
        with pytest.raises(ConnectionLost, match="hung up while reading 32 bytes"):
            device.read(buffer, 64, 32)
        device.free(buffer)
        with pytest.raises(LocalProtocolError, match="was freed"):
            device.free(buffer)


@every_dialect
def test_a_server_that_dies_of_freeing_is_missed_by_what_comes_next(dialect: Dialect) -> None:
    with connected(Scripted(dialect, answers={Command.FREE_BUFFER: HANG_UP})) as device:
        device.free(device.allocate(256))
        with pytest.raises(ConnectionLost, match="hung up while asking for its memory"):
            device.memory()


def test_native_buffers_may_share_an_address() -> None:
    """Vulkan's all begin at 0x1000."""
    with connected(Scripted(answers={Command.BUFFER_GET_BASE: raw((0x1000).to_bytes(8, "little"))})) as device:
        assert device.allocate(64).base == device.allocate(64).base


def test_versions() -> None:
    for reply, theirs in ((bytes([9, 0, 0]), "9.0.0"), (bytes([6, 1, 0]), "6.1.0"), (bytes([0, 0, 0]), "0.0.0")):
        server = Scripted(hello=raw(reply + bytes(25)))
        with server.listening(), pytest.raises(VersionMismatch, match=f"speaks RPC protocol {theirs}") as raised:
            connect([server.endpoint], PATIENT)
        assert raised.value.endpoint == server.endpoint


def test_a_newer_patch_is_its_older_sibling() -> None:
    server = Scripted(dialects()["7.0.0"], hello=raw(bytes([7, 0, 9]) + bytes(25)))
    with connected(server) as device:
        assert device.description.endswith("RPC protocol 7.0.9)")


def test_through_a_proxy() -> None:
    with Scripted().listening() as server, Proxy(server.port).listening() as proxy:
        (device,) = connect([proxy.endpoint], PATIENT)
        buffer = device.allocate(1 << 20)
        device.write(buffer, 0, bytes(range(256)) * 4096)
        assert bytes(device.read(buffer, 0, 512)) == bytes(range(256)) * 2
        device.close()
    assert proxy.passed["up"] > 1 << 20
    assert server.capabilities == NATIVE


def test_a_reason_changes_nothing_of_a_terminal_but_its_line() -> None:
    reason = "x\x1b]0;owned\x07\x1b[2J\nerror: not ours\r\u202e"
    server = Scripted(name_length=None, capabilities=OURS, answers={Command.GET_DEVICE_MEMORY: encode_error(reason)})
    with server.listening():
        (device,) = connect([server.endpoint])
        with pytest.raises(RemoteError) as refused:
            device.memory()
        device.close()
    assert str(refused.value).isprintable()
    assert "error: not ours" in str(refused.value)
