"""A client against servers that mean harm or are broken: an error of ours that names the server, soon, and nothing is
believed that makes no sense."""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from struct import pack
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdrpc.client import RemoteDevice, Timeouts, connect
from sdrpc.errors import ConnectionFailed, ConnectionLost, RemoteProtocolError, SdrpcError
from sdrpc.ggml.build import leaf, node
from sdrpc.ggml.tensor import OUTPUT, Graph
from sdrpc.ggml.types import F32
from sdrpc.sockets import hung_up
from sdrpc.wire.framing import REPLY_HEADER
from sdrpc.wire.hello import Capability
from sdrpc.wire.messages import Command
from tests.support.scripted import HANG_UP, SILENCE, Proxy, Scripted, raw
from tests.support.trouble import Line, Wire

QUICK = Timeouts(connect=2.0, answer=2.0)
IMPATIENT = Timeouts(connect=0.15, answer=0.15)
OURS = Capability.ERRORS | Capability.MANAGED


def session(endpoint: str, timeouts: Timeouts = QUICK) -> bytes:
    """Everything that a client does, once: what it read."""
    (device,) = connect([endpoint], timeouts)
    try:
        return work(device)
    finally:
        device.close()


def work(device: RemoteDevice) -> bytes:
    device.memory()
    buffer, other = device.allocate(4096), device.allocate(64)
    device.write(buffer, 0, bytes(range(256)))
    x = replace(leaf(F32, 8), buffer=buffer.key)
    out = replace(node("SQR", x), buffer=buffer.key, offset=1024, flags=OUTPUT)
    program = device.compile(Graph((out,)), {buffer.key: buffer})
    program.run()
    program.run()
    result = bytes(device.read(buffer, 0, 256))
    device.free(other)
    return result


def outcome(endpoint: str, timeouts: Timeouts) -> SdrpcError | bytes:
    """What a session reads, or the error of ours that ends it."""
    try:
        return session(endpoint, timeouts)
    except SdrpcError as error:
        return error


def words(*values: int) -> bytes:
    return raw(pack(f"<{len(values)}Q", *values))


C = Command
NONSENSE: dict[str, tuple[Command, bytes, str]] = {
    "T47 10^9 devices": (C.DEVICE_COUNT, raw(pack("<I", 10**9)), "1,000,000,000 devices; at most 256"),
    "T48 alignment 0": (C.GET_ALIGNMENT, words(0), "an alignment of 0 bytes"),
    "T48 alignment 3": (C.GET_ALIGNMENT, words(3), "an alignment of 3 bytes; it must be a power of two"),
    "T48 alignment 2^40": (C.GET_ALIGNMENT, words(1 << 40), "an alignment of"),
    "T48 max size 0": (C.GET_MAX_SIZE, words(0), "a largest buffer of 0 bytes"),
    "T49 base 0": (C.BUFFER_GET_BASE, words(0), "a buffer of 4,096 bytes at address 0x0"),
    "T49 base near 2^64": (C.BUFFER_GET_BASE, words(2**64 - 4095), "at address 0xfff"),
    "T49 one handle twice": (C.ALLOC_BUFFER, words(1, 4096), "handle 0x1 for a second buffer"),
    "T50 less than asked": (C.ALLOC_BUFFER, words(1, 4095), "4,095 bytes where 4,096 were asked for"),
}


@pytest.mark.parametrize(("command", "answer", "reason"), NONSENSE.values(), ids=NONSENSE)
def test_nonsense(command: Command, answer: bytes, reason: str) -> None:
    server = Scripted(answers={command: answer})
    server.memory[1] = bytearray(4096)
    with server.listening(), pytest.raises(RemoteProtocolError, match=reason) as raised:
        session(server.endpoint)
    assert server.endpoint in str(raised.value)


def test_two_buffers_of_ours_at_one_address() -> None:
    """T49: ours never do that; native servers may (:mod:`tests.client.test_devices`)."""
    server = Scripted(name_length=None, capabilities=OURS, answers={C.BUFFER_GET_BASE: words(0x1000)})
    with server.listening(), pytest.raises(RemoteProtocolError, match="two buffers at address 0x1000"):
        session(server.endpoint)


def test_no_devices() -> None:
    with Scripted(devices=0).listening() as server, pytest.raises(ConnectionFailed, match="offers no device"):
        connect([server.endpoint], QUICK)


ANSWERED = [
    C.DEVICE_COUNT, C.GET_ALLOC_SIZE, C.GET_ALIGNMENT, C.GET_MAX_SIZE, C.GET_DEVICE_MEMORY, C.ALLOC_BUFFER,
    C.BUFFER_GET_BASE, C.GET_TENSOR,
]  # fmt: skip


@pytest.mark.parametrize("size", [0, 3, 1 << 31, 1 << 61, (1 << 64) - 1])
@pytest.mark.parametrize("command", ANSWERED, ids=lambda command: command.name)
def test_answers_of_another_length(command: Command, size: int) -> None:
    """T51: an answer that is announced with another size; nothing of it is read."""
    with (
        Scripted(answers={command: raw(b"", size)}).listening() as server,
        pytest.raises(RemoteProtocolError, match=f"{command.name}: an answer of {size} bytes"),
    ):
        session(server.endpoint)


def test_after_nonsense_nothing_more_is_said() -> None:
    server = Scripted(answers={C.GET_DEVICE_MEMORY: raw(b"abc")})
    with server.listening():
        (device,) = connect([server.endpoint], QUICK)
        with pytest.raises(RemoteProtocolError):
            device.memory()
        with pytest.raises(ConnectionLost, match="an answer of 3 bytes instead of 16") as raised:
            device.allocate(1)
        assert raised.value.doing == "allocating 1 bytes on device 0"
    assert server.commands()[-1] == "GET_DEVICE_MEMORY"


def test_error_replies_were_not_agreed_on_with_native_servers() -> None:
    with (
        Scripted(answers={C.GET_DEVICE_MEMORY: b"\xff" * 8 + pack("<I", 2) + b"no"}).listening() as server,
        pytest.raises(RemoteProtocolError, match="an answer of 18446744073709551615 bytes"),
    ):
        session(server.endpoint)


@pytest.mark.parametrize("kind", ["", "memory", "quota", "graph"])
def test_a_reason_changes_nothing_of_a_terminal(kind: str) -> None:
    """Escape sequences, lines that look like ours, marks that turn the direction: whatever the error is made of."""
    evil = "x\x1b]0;owned\x07\x1b[2J\r\x1b[Kok: saved\nerror: fake\u202e [/red]"
    text = json.dumps({"kind": kind, "reason": evil, "node": evil, "asked": 5}).encode() if kind else evil.encode()
    answers = {C.GET_DEVICE_MEMORY: b"\xff" * 8 + pack("<I", len(text)) + text}
    with (
        Scripted(name_length=None, capabilities=OURS | Capability.REASONS, answers=answers).listening() as server,
        pytest.raises(SdrpcError) as error,
    ):
        session(server.endpoint)
    assert str(error.value).isprintable()
    assert "owned" in str(error.value)


def test_endless_reasons() -> None:
    answers = {C.GET_DEVICE_MEMORY: b"\xff" * 8 + pack("<I", 2**32 - 1)}
    with (
        Scripted(name_length=None, capabilities=OURS, answers=answers).listening() as server,
        pytest.raises(RemoteProtocolError, match="an error reply of 4294967295 bytes"),
    ):
        session(server.endpoint)


@pytest.mark.parametrize("command", [*ANSWERED, C.SET_TENSOR, C.GRAPH_COMPUTE, C.GRAPH_RECOMPUTE, C.FREE_BUFFER])
@pytest.mark.parametrize("fate", [HANG_UP, SILENCE], ids=["hangs up", "is silent"])
def test_dies_in_each_phase(command: Command, fate: object) -> None:
    """T53: an error that says where and at what; a new connection to a healthy server does the job."""
    answers = {command: fate if fate is HANG_UP else lambda message: SILENCE}
    with Scripted(answers=answers).listening() as server:
        result = outcome(server.endpoint, IMPATIENT)
        if isinstance(result, bytes):  # what has no answer shows at the next one, and is not missed otherwise
            assert command in (C.SET_TENSOR, C.GRAPH_COMPUTE, C.GRAPH_RECOMPUTE, C.FREE_BUFFER)
        else:
            assert isinstance(result, ConnectionLost | ConnectionFailed)
            assert result.endpoint == server.endpoint
    with Scripted().listening() as healthy:
        assert session(healthy.endpoint) == bytes(range(256))


def test_what_it_was_doing() -> None:
    with Scripted(answers={C.GET_TENSOR: HANG_UP}).listening() as server:
        with pytest.raises(ConnectionLost) as raised:
            session(server.endpoint)
        assert str(raised.value) == (
            f"{server.endpoint}: the server hung up while reading 256 bytes on device 0 "
            "(after a graph was started on RPC0)"
        )


def test_an_end_behind_which_nobody_reads() -> None:
    """A proxy whose server was killed ends the connection, but what it had not read yet fills its buffers: nothing that
    is sent comes through, so nothing shows that nobody wants it."""
    over = threading.Event()

    def ends(line: Line, data: bytes) -> bytes:
        line.cut()
        over.wait(120)
        return b""

    with Scripted().listening() as server, Wire(server.port) as wire:
        (device,) = connect([wire.endpoint], Timeouts(answer=60.0))
        buffer = device.allocate(64 << 20)
        wire.disturb(ends, up=True)
        try:
            with pytest.raises(ConnectionLost, match="the server hung up while writing"):
                device.write(buffer, 0, bytes(64 << 20))
        finally:
            over.set()
            device.close()


def test_a_connection_that_was_closed_here_did_not_hang_up() -> None:
    """Another thread may close it while somebody waits for room."""
    ours, theirs = socket.socketpair()
    theirs.close()
    if sys.platform.startswith("linux"):
        assert hung_up(ours)
    ours.close()
    assert not hung_up(ours)


def counted() -> dict[str, int]:
    """How many bytes of a session pass in each direction."""
    with Scripted().listening() as server, Proxy(server.port).listening() as proxy:
        session(proxy.endpoint)
    return proxy.passed


def test_cut_anywhere() -> None:
    """The connection is cut after every 37 bytes up and down."""
    total = counted()
    for direction, limit in [(way, limit) for way in total for limit in range(0, total[way], 37)]:
        with Scripted().listening() as server, Proxy(server.port, limit, direction).listening() as proxy:
            result = outcome(proxy.endpoint, QUICK)
            if isinstance(result, bytes):  # only FREE_BUFFER was lost, the last word, which has no answer
                assert direction == "up", limit
                assert limit > total["up"] - 64
            else:
                assert isinstance(result, ConnectionLost | ConnectionFailed)
                assert result.endpoint == proxy.endpoint


def test_stalled_anywhere() -> None:
    """Bytes stop coming after every 61 bytes down."""
    for limit in range(0, counted()["down"], 61):
        with (
            Scripted().listening() as server,
            Proxy(server.port, limit, "down", stall=True).listening() as proxy,
            pytest.raises((ConnectionLost, ConnectionFailed), match="no answer"),
        ):
            session(proxy.endpoint, IMPATIENT)


def test_an_interrupted_exchange_ends_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between request and answer: the answer must not be taken for that of the next request."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with Scripted().listening() as server:
        (device,) = connect([server.endpoint], QUICK)
        buffer = device.allocate(64)
        with monkeypatch.context() as patched:
            patched.setattr("sdrpc.client.connection._receive", interrupt)
            with pytest.raises(KeyboardInterrupt):
                device.memory()
        device.free(buffer)  # as programs do on their way out: it hides nothing
        with pytest.raises(ConnectionLost, match="interrupted"):
            device.memory()


def listen(talk: Callable[[socket.socket], None]) -> tuple[socket.socket, str]:
    """A server of any protocol: ``talk`` gets each connection."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client:
                talk(client)

    threading.Thread(target=serve, daemon=True).start()
    return listener, f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    ("data", "kind", "reason"),
    [
        (b"", ConnectionFailed, "hangs up on HELLO: is it an RPC server"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", RemoteProtocolError, "it answers 'HTTP/1.1': another program"),
        (b"\x15\x03\x01\x00\x02\x02\x46\x00", RemoteProtocolError, "to HELLO"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", RemoteProtocolError, "it answers 'SSH-2.0-'"),
        (b"\x1c\0\0\0\0\0\0\0\x07", ConnectionFailed, "hangs up on HELLO"),
    ],
)
def test_other_protocols(data: bytes, kind: type[SdrpcError], reason: str) -> None:
    def talk(client: socket.socket) -> None:
        client.recv(64)
        client.sendall(data)

    listener, endpoint = listen(talk)
    with listener, pytest.raises(kind, match=f"{endpoint}: .*{reason}"):
        connect([endpoint], QUICK)


def test_a_server_that_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ConnectionFailed, match="busy with another client, or is no RPC server"):
            connect([endpoint], IMPATIENT)


@settings(max_examples=40)
@given(st.data())
def test_any_answers(data: st.DataObject) -> None:
    """Whatever a server answers, a session works or ends with an error of ours."""
    command = data.draw(st.sampled_from(ANSWERED))
    payload = data.draw(st.binary(max_size=40))
    answer: Any = data.draw(st.sampled_from([payload, raw(payload), REPLY_HEADER.pack(8) + payload, HANG_UP]))
    capabilities = data.draw(st.sampled_from([OURS, Capability(0)]))
    server = Scripted(
        name_length=None if capabilities else 64, capabilities=capabilities, answers={command: answer or HANG_UP}
    )
    with Server(server) as endpoint:
        assert outcome(endpoint, IMPATIENT)


class Server:
    """A scripted server whose own view of what its false answers made the client say does not matter."""

    def __init__(self, server: Scripted) -> None:
        self.context = server.listening()
        self.server = server

    def __enter__(self) -> str:
        return self.context.__enter__().endpoint

    def __exit__(self, *reason: Any) -> None:
        self.server.problems.clear()
        self.context.__exit__(*reason)
