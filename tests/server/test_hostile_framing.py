"""T1 … T11 and T65 of the hostile inputs: bytes that are no messages, and messages that lie about their size."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import product, repeat
from struct import pack
from threading import Thread, Timer
from typing import NamedTuple

import pytest

from sdrpc.errors import RemoteProtocolError
from sdrpc.server import Limits, Server
from sdrpc.server.stream import Stream
from sdrpc.wire import messages
from sdrpc.wire.framing import REPLY_HEADER
from sdrpc.wire.hello import NATIVE, Capability, encode_hello
from sdrpc.wire.messages import Command
from tests.server.conftest import CountingDevice, Scene
from tests.support.client import Adder, RawClient


class Attack(NamedTuple):
    steps: Callable[[RawClient], object]
    reason: str


GREETINGS = {
    "T1-alloc-first": Attack(lambda c: c.command(Command.ALLOC_BUFFER, bytes(12)), "first command is 0 instead"),
    "T1-unknown-first": Attack(lambda c: c.command(200), "first command is 200 instead of HELLO"),
    "T2-size-0": Attack(
        lambda c: c.command(Command.HELLO),
        r"client speaks one of the protocols 3\.6\.0 to 3\.6\.1, this server 8\.0\.0; start .* --protocol 3\.6\.1",
    ),
    "T2-size-25": Attack(lambda c: c.command(Command.HELLO, bytes(25)), "HELLO of 25 bytes"),
    "T2-size-2^63": Attack(lambda c: c.command(Command.HELLO, size=2**63), f"HELLO of {2**63} bytes"),
    "T65-http": Attack(
        lambda c: c.send(b"POST / HTTP/1.1\r\nHost: localhost:50052\r\nContent-Length: 4\r\n\r\nabcd"),
        "first command is 80 instead of HELLO",
    ),
    "T65-tls": Attack(lambda c: c.send(bytes.fromhex("16030100f1010000ed0303") + bytes(64)), "this server has none"),
}


@pytest.mark.parametrize("name", GREETINGS)
def test_greetings_that_are_none(scene: Scene, name: str) -> None:
    client = scene.client(capabilities=None)
    GREETINGS[name].steps(client)
    scene.ends(client, GREETINGS[name].reason)


def test_t2_capabilities_that_mean_nothing_to_us_are_a_native_client(scene: Scene) -> None:
    with scene.client(capabilities=None) as client:
        client.command(Command.HELLO, bytes(range(24)))
        assert client.receive(8 + 28) == pack("<Q", 28) + bytes((8, 0, 0, 0)) + bytes(24)
        assert client.ask(messages.DeviceCount()).device_count == len(scene.devices)


def change_names(client: RawClient) -> None:
    tensor = client.record(client.buffer(16))
    client.ask(messages.GetAllocSize(0, tensor, (client.record(),) * 10))
    client.name_length = 128
    client.post(messages.InitTensor(tensor))


COMMANDS = {
    "T3-second-hello": Attack(lambda c: c.send(encode_hello(Capability.ERRORS)), "second HELLO"),
    "T4-command-23": Attack(lambda c: c.command(23), "no command 23"),
    "T4-command-255": Attack(lambda c: c.command(255), "no command 255"),
    "T10-names-change": Attack(change_names, "names of 128 bytes after names of 64"),
    "T10-odd-length": Attack(lambda c: c.command(Command.INIT_TENSOR, bytes(232 + 63)), "right for no length of names"),
    "T10-long": Attack(lambda c: c.command(Command.INIT_TENSOR, bytes(232 + 4096)), "right for no length of names"),
    "T11-endless-name": Attack(
        lambda c: c.command(Command.SET_TENSOR, b"\xff" * (232 + 64) + bytes(9 + 16)), "right for no length of names"
    ),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_that_are_none(scene: Scene, flavour: Capability, name: str) -> None:
    client = scene.client(flavour)
    COMMANDS[name].steps(client)
    scene.ends(client, COMMANDS[name].reason)


def test_t10_clients_with_other_name_lengths_side_by_side(scene: Scene) -> None:
    with scene.client(name_length=64) as a, scene.client(name_length=128) as b, scene.client(name_length=160) as c:
        adders = [Adder(client) for client in (a, b, c)]
        for _ in range(3):
            for add in adders:
                add()
    scene.goes_on()


RECORD = 232 + 64
RIGHT_SIZES = {
    Command.ALLOC_BUFFER: 12, Command.GET_ALIGNMENT: 4, Command.GET_MAX_SIZE: 4, Command.BUFFER_GET_BASE: 8,
    Command.FREE_BUFFER: 8, Command.BUFFER_CLEAR: 9, Command.SET_TENSOR: RECORD + 9, Command.DEVICE_COUNT: 0,
    Command.SET_TENSOR_HASH: RECORD + 16, Command.GET_TENSOR: RECORD + 16, Command.COPY_TENSOR: 2 * RECORD,
    Command.GRAPH_COMPUTE: 12, Command.GET_DEVICE_MEMORY: 4, Command.INIT_TENSOR: RECORD,
    Command.GET_ALLOC_SIZE: 4 + 11 * RECORD, Command.GRAPH_RECOMPUTE: 4, Command.MEMSET_TENSOR: RECORD + 17,
}  # fmt: skip
LIES: dict[str, Callable[[int], int]] = {
    "0": lambda right: 0,
    "short": lambda right: (right - 1) % 2**64,
    "plus-1": lambda right: right + 1,
    "2^31": lambda right: 2**31,
    "2^61": lambda right: 2**61,
    "2^64-1": lambda right: 2**64 - 1,
}


@pytest.mark.parametrize(
    ("command", "lie"),
    [
        (command, lie)
        for command, lie in product(RIGHT_SIZES, LIES)
        if LIES[lie](RIGHT_SIZES[command]) != RIGHT_SIZES[command]
    ],
    ids=lambda value: value.name if isinstance(value, Command) else value,
)
def test_t5_sizes_that_lie(scene: Scene, command: Command, lie: str) -> None:
    """A header with a wrong size and nothing behind it: most sizes are refused at once, the others never arrive."""
    client = scene.client()
    client.command(command, size=LIES[lie](RIGHT_SIZES[command]))
    client.socket.shutdown(socket.SHUT_WR)
    scene.ends(client, r"bytes instead of|right for no length of names|closed while|too few")


def test_t6_a_client_that_sends_byte_by_byte(scene: Scene) -> None:
    with scene.client(capabilities=None) as client:
        whole = client.send

        def drip(*parts: bytes | bytearray | memoryview) -> None:
            for part in parts:
                for byte in bytes(part):
                    whole(bytes([byte]))

        client.send = drip  # type: ignore[method-assign]
        client.send(encode_hello(Capability.MANAGED))
        client.receive(8 + 28)
        add = Adder(client, elements=4)
        add()
        add()
    scene.goes_on()


STALL_SECONDS = 1.5
"""Within which an honest client must get through, also on a busy machine."""


@pytest.fixture(scope="module")
def hasty(device: CountingDevice) -> Iterator[Server]:
    """A server that does not wait for long."""
    with Server([device], limits=Limits(hello_seconds=STALL_SECONDS, stall_seconds=STALL_SECONDS)) as server:
        yield server


class Silence(NamedTuple):
    capabilities: Capability | None
    steps: Callable[[RawClient], object]
    reason: str


SILENCES = {
    "no-greeting": Silence(None, lambda c: None, "in time while greeting"),
    "half-a-greeting": Silence(None, lambda c: c.send(encode_hello(NATIVE)[:-1]), "in time while greeting"),
    "half-a-header": Silence(Capability.ERRORS, lambda c: c.send(b"\x0f\0"), "in time while receiving a request"),
    "only-a-header": Silence(NATIVE, lambda c: c.command(0, size=12), "in time while receiving a request"),
    "half-a-tensor": Silence(
        Capability.ERRORS,
        lambda c: (c.begin_set(c.record(c.buffer(1 << 20), (1 << 18,)), 1 << 20), c.send(bytes(1000))),
        "in time while SET_TENSOR",
    ),
}


@pytest.mark.parametrize("name", SILENCES)
def test_t7_silence(hasty: Server, caplog: pytest.LogCaptureFixture, name: str) -> None:
    capabilities, steps, reason = SILENCES[name]
    with Scene(hasty, caplog) as scene:
        client = scene.client(capabilities)
        steps(client)
        scene.ends(client, reason)


def test_t7_a_client_that_does_not_read(hasty: Server, caplog: pytest.LogCaptureFixture) -> None:
    """If it reads on, it finds a part of the answer and no reason behind it, which it would take for the rest."""
    size = 64 << 20
    with Scene(hasty, caplog) as scene:
        with scene.client(Capability.ERRORS) as client:
            tensor = client.record(client.buffer(size), (size // 4,))
            client.post(messages.GetTensor(tensor, 0, size))
            scene.logs(client, "does not read its replies")
            assert client.receive(8) == REPLY_HEADER.pack(size)
            assert client.rest().strip(b"\0") == b""
        scene.goes_on()


def test_t7_silence_between_messages_is_fine(hasty: Server) -> None:
    """Also behind data that is received in one call of the system, which has a time limit of its own."""
    size = 1 << 20
    with Scene(hasty) as scene, scene.client() as client:
        add = Adder(client)
        add()
        client.set(client.record(client.buffer(size), (size // 4,)), bytes(size))
        add()
        time.sleep(1.2 * STALL_SECONDS)
        add()


def test_t7_small_answers_that_nobody_reads() -> None:
    """Behind data that was received in one call of the system, without Python's own time limit."""
    limits = Limits(stall_seconds=0.2)
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
        closing(Stream(listener.accept()[0], "somebody", "127.0.0.1", limits)) as stream,
    ):
        sender = Thread(target=client.sendall, args=(bytes(1 << 20),))
        sender.start()
        stream.read_into(memoryview(bytearray(1 << 20)))
        sender.join()
        watchdog = Timer(120, stream.cut)
        watchdog.start()
        with pytest.raises(RemoteProtocolError, match="does not read its replies"):
            any(map(stream.write, repeat([bytes(1000)])))
        watchdog.cancel()


def test_t8_a_client_that_is_cut_off_in_the_middle_of_a_tensor_and_comes_back(scene: Scene) -> None:
    size = 1 << 20
    for _ in range(3):
        with scene.client() as client:
            client.begin_set(client.record(client.buffer(size), (size // 4,)), size)
            client.send(bytes(size // 2))
        scene.logs(client, "closed while SET_TENSOR|reset by peer")
        scene.goes_on()
    with scene.client() as client:
        Adder(client)()
    scene.goes_on()


def test_t11_names_that_are_no_text(scene: Scene) -> None:
    """A name that fills its field and is no UTF-8 is only a name."""
    with scene.client() as client:
        add = Adder(client)
        add.sum = add.sum._replace(name=b"\xff" * 63)
        client.ask(messages.GetAllocSize(0, add.sum, (client.record(),) * 10))
        add()
        record = client.graph([3], [add.a, add.b, add.sum])
        end = record.rindex(b"\xff") + 1
        client.command(Command.GRAPH_COMPUTE, record[:end] + b"\xff" + record[end + 1 :])
        add()
    scene.goes_on()


def test_a_name_can_not_forge_a_line_of_the_log(scene: Scene) -> None:
    client = scene.client()
    client.post(messages.GetTensor(client.record(name=b"x\nWARNING all is well\x1b[2J"), 0, 4))
    client.ended()
    assert scene.logs(client, "is in no buffer").isprintable()
    client.close()
    scene.goes_on()
