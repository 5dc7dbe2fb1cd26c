"""What clients that behave get: every dialect, every length of names, many at once; and those that are killed."""

from __future__ import annotations

import logging
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from struct import pack, unpack

import numpy as np
import pytest

from sdrpc.client.connection import CAPABILITIES
from sdrpc.content import PIECE
from sdrpc.device import Buffer, Bytes, ServedDevice
from sdrpc.engine.device import LocalDevice
from sdrpc.errors import DeviceError
from sdrpc.ggml import params, validate
from sdrpc.ggml.dialect import Dialect, dialects
from sdrpc.server import Limits, Server, stream
from sdrpc.server.handler import AT_ONCE
from sdrpc.sockets import prepare
from sdrpc.wire import graphs, messages
from sdrpc.wire.framing import REPLY_HEADER
from sdrpc.wire.hello import NATIVE, Capability
from sdrpc.wire.messages import Command
from sdrpc.wire.records import Record
from tests.server.conftest import CountingDevice, Scene, eventually
from tests.support.client import Adder, RawClient, busy
from tests.support.victim import STEPS
from tests.wire.examples import record

EVERY = list(dialects().values())


@pytest.mark.parametrize("capabilities", [NATIVE, Capability.ERRORS | Capability.MANAGED], ids=["native", "sdrpc"])
@pytest.mark.parametrize("name_length", [64, 128, 160])
@pytest.mark.parametrize("dialect", EVERY, ids=lambda dialect: dialect.version)
def test_an_exchange_in_every_dialect(
    device: CountingDevice, dialect: Dialect, name_length: int, capabilities: Capability
) -> None:
    """Nobody tells the server how long the names are; the first message with a tensor is a SET_TENSOR."""
    before = device.held
    with Server([device], dialect) as server:
        with RawClient(server.port, dialect, name_length, capabilities) as client:
            assert client.hello.version == dialect.triple
            assert client.hello.capabilities == (capabilities if dialect.hello_request_bytes else NATIVE)
            add = Adder(client)
            for _ in range(3):
                add()
            client.ask(messages.InitTensor(add.a))
            client.ask(messages.BufferClear(add.buffer[0], 1))
            if dialect.has_memset_tensor:
                client.ask(messages.MemsetTensor(add.a, 0, 4, 2))
                assert client.get(add.a, 8) == b"\2" * 4 + b"\1" * 4
            assert client.ask(messages.CopyTensor(add.a, add.b)).result == 1
            client.ask(messages.FreeBuffer(add.buffer[0]))
            assert client.ask(messages.DeviceCount()).device_count == 1
        assert device.held == before


def test_a_client_of_6_0_in_bytes_written_by_hand(device: CountingDevice) -> None:
    """No real one was met: buffer commands have no answer any more, and SET_TENSOR has no cache flag yet."""
    with Server([device], dialects()["6.0.0"]) as server, RawClient(server.port, capabilities=None) as client:

        def told(command: int, payload: bytes) -> bytes:
            client.command(command, payload)
            (size,) = unpack("<Q", client.receive(8))
            return client.receive(size)

        assert told(14, bytes(24)) == bytes([6, 0, 0, 0]) + bytes(24)
        handle, size = unpack("<QQ", told(0, pack("<IQ", 0, 64)))
        assert size >= 64
        (address,) = unpack("<Q", told(3, pack("<Q", handle)))
        tensor = record(client.record((handle, address), (8,), id=1, nb=(4, 32, 32, 32)), 64)
        client.command(5, pack("<QB", handle, 7))
        client.command(12, tensor)
        client.command(6, tensor + pack("<Q", 8) + b"by hand!")
        client.command(17, tensor + pack("<QQB", 0, 4, 9))
        assert told(8, tensor + pack("<QQ", 0, 32)) == b"\t" * 4 + b"\7" * 4 + b"by hand!" + b"\7" * 16
        client.command(4, pack("<Q", handle))
        assert told(15, b"") == pack("<I", 1)


@pytest.mark.parametrize("dialect", EVERY, ids=lambda dialect: dialect.version)
def test_memset_is_a_command_only_where_the_dialect_has_it(
    device: CountingDevice, dialect: Dialect, caplog: pytest.LogCaptureFixture
) -> None:
    if dialect.has_memset_tensor:
        return
    with Server([device], dialect) as server, Scene(server, caplog) as scene:
        client = scene.client()
        client.command(Command.MEMSET_TENSOR, bytes(296 + 17))
        scene.ends(client, rf"protocol {dialect.triple[0]}\.\d\.\d has no command 17")


def test_a_client_of_a_later_protocol_at_an_old_server(
    device: CountingDevice, caplog: pytest.LogCaptureFixture
) -> None:
    with Server([device], dialects()["3.6.1"]) as server, Scene(server, caplog) as scene:
        client = scene.client(capabilities=None)
        client.command(Command.HELLO, bytes(24))
        scene.ends(client, r"one of the protocols 4\.0\.0 to 8\.0\.0, this server 3\.6\.1; .* --protocol 8\.0\.0")


def test_a_client_that_did_not_like_our_version(scene: Scene) -> None:
    with scene.client() as client:
        pass
    assert "left right after the greeting" in scene.logs(client, "--protocol")
    scene.goes_on()


OTHER_PATCHES = [("3.6.0", "3.6.1"), ("4.0.0", "4.0.3"), ("4.0.1", "4.0.3"), ("4.0.2", "4.0.3")]


@pytest.mark.parametrize(("theirs", "ours"), OTHER_PATCHES)
def test_clients_that_number_operations_as_another_patch_of_the_version(
    device: CountingDevice, theirs: str, ours: str
) -> None:
    """UNARY has another number in each of these patches, and GLU too."""
    with Server([device], dialects()[ours]) as server, RawClient(server.port, dialects()[theirs]) as client:
        buffer = client.buffer(4096)
        x = client.record(buffer, (8,), id=1)
        relu = client.record(buffer, (8,), id=2, at=256, op="UNARY", params=params.Unary("RELU"), src=(1,))
        glu = client.record(buffer, (4,), id=3, at=512, op="GLU", params=params.Glu("REGLU"), src=(2,))
        client.set(x, np.arange(-2, 6, dtype="f4"))
        for _ in range(2):
            client.compute([2, 3], [x, relu, glu])
            assert np.frombuffer(client.get(glu, 16), "f4").tolist() == [0 * 2, 0 * 3, 0 * 4, 1 * 5]


def test_several_clients_compute_at_once(scene: Scene) -> None:
    faults: list[BaseException] = []

    def work() -> None:
        try:
            with RawClient(scene.server.port) as client:
                add = Adder(client)
                for _ in range(20):
                    add()
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    scene.goes_on()


def test_a_graph_is_decoded_once_and_known_again_by_its_bytes(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    decode = graphs.decode_graph
    monkeypatch.setattr(
        graphs, "decode_graph", lambda payload, *rest: decoded.append(payload) or decode(payload, *rest)
    )
    with scene.client() as client:
        add = Adder(client)
        payload = client.graph([3], [add.a, add.b, add.sum])
        for _ in range(5):
            client.command(Command.GRAPH_COMPUTE, payload)
        client.get(add.sum, 4)
    assert len(decoded) == 1
    scene.goes_on()


def test_a_graph_that_runs_again_is_not_looked_at_again(
    device: CountingDevice, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GRAPH_RECOMPUTE: nothing is decoded, checked, compiled or bound."""
    counted: Counter[str] = Counter()

    def count(owner: object, name: str) -> None:
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **named: (counted.update([name]), plain(*args, **named))[1])

    for owner, name in ((graphs, "decode_graph"), (validate, "check"), (device, "compile")):
        count(owner, name)
    with scene.client() as client:
        add = Adder(client, elements=33)
        add()
        first = Counter(counted)
        assert first["decode_graph"] == first["compile"] == 1
        for _ in range(4):
            add()
    assert counted == first


def test_data_beyond_every_buffer_of_the_socket(scene: Scene) -> None:
    """Up and down again in one message each, with odd sizes around what is read ahead."""
    rng = np.random.default_rng(0)
    with scene.client() as client:
        size = (24 << 20) + 4
        tensor = client.record(client.buffer(size), (size // 4,))
        data = rng.bytes(size)
        client.set(tensor, data)
        assert client.get(tensor, size) == data
        for part in (1, (1 << 16) - 306, (1 << 16) - 305, 1 << 16, (1 << 16) + 1, 1 << 20):
            piece = rng.bytes(part)
            client.set(tensor, piece, offset=3)
            assert client.get(tensor, part, offset=3) == piece
    scene.goes_on()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_hosts(device: CountingDevice, host: str) -> None:
    with Server([device], host=host) as server, RawClient(server.port, host=host) as client:
        assert not server.exposed
        assert server.endpoint == f"[::1]:{server.port}" if host == "::1" else f"{host}:{server.port}"
        Adder(client)()


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_server_that_other_machines_can_reach_knows_it(device: CountingDevice, host: str) -> None:
    with Server([device], host=host) as server:
        assert server.exposed


def test_the_port_is_free_again_at_once(device: CountingDevice) -> None:
    with Server([device]) as server:
        port = server.port
        with RawClient(port) as client:
            Adder(client)()
            server.stop()
            assert client.ended() == ""
    with Server([device], port=port), RawClient(port) as client:
        Adder(client)()


def test_stopping_ends_what_is_computed(device: CountingDevice) -> None:
    before = device.held
    with Server([device]) as server:
        client = RawClient(server.port)
        busy(client)
        assert eventually(lambda: device.held > before)
    client.close()
    assert eventually(lambda: device.held == before)


@pytest.mark.parametrize("step", STEPS)
def test_a_client_that_is_killed(scene: Scene, step: str, caplog: pytest.LogCaptureFixture) -> None:
    """In the middle of an upload, and of a computation, which ends long before it would be done."""
    caplog.set_level(logging.INFO, "sdrpc")
    command = [sys.executable, "-m", "tests.support.victim", str(scene.server.port), step]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as victim:
        assert victim.stdout is not None
        name = victim.stdout.readline().strip()
        assert name
        victim.send_signal(signal.SIGKILL)
    why = {"upload": "while SET_TENSOR", "compute": "its client is gone"}[step]

    def told() -> list[logging.LogRecord]:
        return [
            each for each in caplog.records if each.getMessage().startswith(f"{name}:") and why in each.getMessage()
        ]

    assert eventually(told)
    assert step != "compute" or {each.levelno for each in told()} == {logging.INFO}, "a client may leave when it likes"
    scene.goes_on()


@pytest.fixture
def many_sockets() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4096)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_sockets")
def test_t9_a_thousand_connections_at_once(device: CountingDevice, caplog: pytest.LogCaptureFixture) -> None:
    limits = Limits(connections=64, hello_seconds=5.0, silent_seconds=60.0)
    with Server([device], limits=limits) as server, Scene(server, caplog) as scene:
        flood = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(1000)]
        assert eventually(
            lambda: len([r for r in caplog.records if "refused" in r.getMessage()]) == 1001 - limits.connections
        )
        assert server.clients == limits.connections
        scene.works()
        assert eventually(lambda: server.clients == 1), "those that say nothing lose their place"
        for connection in flood:
            connection.close()
        with scene.client() as client:
            Adder(client)()
        scene.goes_on()


def test_a_device_without_memory_that_we_can_touch(device: CountingDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator: what arrives is written piece by piece, and what is read is never here as a whole."""
    monkeypatch.setattr(device, "receiving", partial(ServedDevice.receiving, device))
    order: list[tuple[str, int]] = []

    class Queued:
        """What is read when the device has been asked three times."""

        def __init__(self, buffer: Buffer, offset: int, size: int) -> None:
            self.place, self.looks = (buffer, offset, size), 3
            order.append(("asked", size))

        def ready(self) -> bool:
            self.looks -= 1
            return self.looks < 0

        def wait(self) -> Bytes:
            order.append(("came", self.place[2]))
            return bytes(device.read(*self.place))

    monkeypatch.setattr(device, "read_soon", Queued)
    data = np.random.default_rng(1).bytes(AT_ONCE * PIECE + 3)
    with Server([device]) as server, RawClient(server.port) as client:
        tensor = client.record(client.buffer(len(data) + 1), (len(data) // 4 + 1,))
        client.set(tensor, data)
        assert client.get(tensor, len(data)) == data
        assert client.get(tensor, 5, len(data) - 5) == data[-5:]
        client.ask(messages.GetAllocSize(0, tensor, (Record(),) * 10))
    whole = [PIECE] * AT_ONCE
    first = [("asked", size) for size in whole] + [("came", PIECE), ("asked", 3)]
    rest = [("came", size) for size in (*whole[1:], 3)]
    assert order == [*first, *rest, ("asked", 5), ("came", 5)]


@pytest.mark.parametrize("error", [DeviceError("it fell off the bus"), RuntimeError("a fault of ours")], ids=repr)
def test_a_device_that_fails_while_it_is_read(scene: Scene, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """A reason in the middle of an answer would be taken for data: the connection ends without one."""
    size = 3 * PIECE
    device = scene.devices[0]

    def read(buffer: Buffer, offset: int, length: int) -> Bytes:
        if length == PIECE and offset == 2 * PIECE:
            raise error
        return LocalDevice.read(device, buffer, offset, length)

    monkeypatch.setattr(device, "read", read)
    client = scene.client(CAPABILITIES)
    client.post(messages.GetTensor(client.record(client.buffer(size), (size // 4,)), 0, size))
    assert client.receive(8 + 2 * PIECE) == REPLY_HEADER.pack(size) + bytes(2 * PIECE)
    with pytest.raises(EOFError):
        client.receive(1)
    scene.goes_on()


def test_a_client_whose_machine_is_gone_is_noticed_by_the_system(device: CountingDevice) -> None:
    with Server([device], limits=Limits(dead_seconds=42)) as server, RawClient(server.port) as client:
        Adder(client)()
        (connected,) = server._clients.values()
        sock = connected.stream._socket
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 21
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 7


@pytest.mark.parametrize("begun", [False, True], ids=["between-messages", "in-a-message"])
def test_what_is_said_of_a_client_whose_machine_is_gone(
    device: CountingDevice, begun: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Server([device]) as server, RawClient(server.port) as client:
        tensor = client.record(client.buffer(4000), (1000,))
        if begun:
            client.begin_set(tensor, 4000)
        monkeypatch.setattr(stream, "is_gone", lambda *_: True)
        assert eventually(lambda: any("its machine does not answer any more while" in line for line in caplog.messages))


def test_options_of_a_connection_that_has_ended() -> None:
    """Systems refuse them."""
    one, other = socket.socketpair()  # of no network, which refuses them, too
    with one, other:
        prepare(one, 10)


@pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="Linux tells how often it has probed")
def test_a_client_that_does_not_read_for_a_while_is_not_gone(device: CountingDevice) -> None:
    """Its machine acknowledges what is sent to find out whether there is room again."""
    size = 16 << 20
    with Server([device], limits=Limits(dead_seconds=1, stall_seconds=600)) as server, RawClient(server.port) as client:
        client.post(messages.GetTensor(client.record(client.buffer(size), (size // 4,)), 0, size))
        (connected,) = server._clients.values()
        sock = connected.stream._socket
        assert eventually(lambda: sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[4] >= 3, 60)  # tcpi_backoff
        assert client.receive(8 + size) == REPLY_HEADER.pack(size) + bytes(size)


def test_who_came_and_what_it_took_is_logged(device: CountingDevice, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sdrpc")
    with Server([device]) as server:
        with RawClient(server.port) as client:
            add = Adder(client, elements=1 << 18)
            add()
        assert eventually(lambda: any("left after" in line for line in caplog.messages))
    mine = [line.partition(": ")[2] for line in caplog.messages if line.startswith(f"{client.name}:")]
    assert mine[0] == "came, a client of ggml's protocol, is offered protocol 8.0"
    assert re.fullmatch(
        r"left after 6 requests in .* s, 2\.0 MiB in, 1\.0 MiB out, [345]\.\d MiB held at most", mine[-1]
    )
