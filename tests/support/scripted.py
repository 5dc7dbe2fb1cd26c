"""A server of the RPC protocol that does as it is told: it behaves like a native one (or one of ours), keeps real
memory, remembers every command, and answers with any bytes at all where a test says so. And a proxy that cuts and
stalls."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from sdrpc.device import Bytes
from sdrpc.errors import RemoteProtocolError
from sdrpc.ggml.dialect import Dialect, newest
from sdrpc.wire import graphs
from sdrpc.wire import messages as m
from sdrpc.wire.framing import REPLY_HEADER, RequestReader, drive, encode_reply
from sdrpc.wire.hello import NATIVE, Capability, encode_hello_reply, own_commands, read_hello
from sdrpc.wire.messages import Command
from sdrpc.wire.name_length import NameLength

HANG_UP = object()
"""As an answer: close the connection instead."""
SILENCE = object()
"""As an answer: none."""
GIB = 1 << 30
MOST_GRAPHS = 1024

Answer = Any  # a message, bytes for the whole answer as they are, HANG_UP or SILENCE


@dataclass
class Scripted:
    """``answers``: by command, what is answered instead of the truth (or a function of the message that gives it).
    ``name_length``: like a native server's, None for one that takes any. ``hello``: bytes to answer HELLO with.
    ``last_words``: what is sent before hanging up. ``kept``: uids of graphs that came (of all devices together)."""

    dialect: Dialect = field(default_factory=newest)
    name_length: int | None = 64
    capabilities: Capability = NATIVE
    devices: int = 1
    answers: dict[Command, Answer | Callable[[Any], Answer]] = field(default_factory=dict)
    hello: bytes | None = None
    last_words: bytes = b""
    on_graph: Callable[[Scripted, graphs.Received], None] | None = None
    log: list[tuple[Command, Any]] = field(default_factory=list)
    memory: dict[int, bytearray] = field(default_factory=dict)
    kept: set[int] = field(default_factory=set)
    greetings: int = 0
    port: int = 0
    problems: list[BaseException] = field(default_factory=list)

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def commands(self) -> list[str]:
        return [command.name for command, _ in self.log]

    @contextlib.contextmanager
    def listening(self) -> Iterator[Scripted]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
            thread = threading.Thread(target=self._serve, args=(listener,), daemon=True)
            thread.start()
            try:
                yield self
            finally:
                listener.shutdown(socket.SHUT_RDWR)
                thread.join(60)
        assert not self.problems, self.problems

    def _serve(self, listener: socket.socket) -> None:
        """One client after the other, as native servers do."""
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                with client:
                    try:
                        self._talk(client)
                    except OSError:
                        pass  # the client has gone: that is what many tests are about
                    except BaseException as problem:
                        self.problems.append(problem)

    def _talk(self, client: socket.socket) -> None:
        def receive(size: int) -> bytes:
            data = bytearray()
            while len(data) < size:
                piece = client.recv(min(size - len(data), 1 << 20))
                if not piece:
                    raise ConnectionResetError
                data += piece
            return bytes(data)

        hello = drive(read_hello(), receive)
        self.greetings += 1
        if hello.with_caps != (self.dialect.hello_request_bytes > 0):
            return
        reply = encode_hello_reply(self.dialect, self.capabilities & hello.capabilities)
        client.sendall(reply if self.hello is None else self.hello)
        names = NameLength(self.name_length, certain=True) if self.name_length else NameLength()
        reader = RequestReader(self.dialect, known=names, ours=own_commands(self.capabilities & hello.capabilities))
        while True:
            received = self._read(reader, receive)
            if received is None:
                return
            command, message, bulk = received
            data = bytes(getattr(message, "data", b"")) + receive(bulk)
            self.log.append((command, message._replace(data=data) if command is Command.SET_TENSOR else message))
            answer = self.answers.get(command) or self._honest(command, self.log[-1][1])
            if callable(answer):
                answer = answer(message) or self._honest(command, self.log[-1][1])
            if answer is HANG_UP:
                client.sendall(self.last_words)
                return
            if answer is not SILENCE:
                parts = [answer] if isinstance(answer, bytes) else encode_reply(command, answer, self.dialect)
                client.sendall(b"".join(parts))

    def _read(self, reader: RequestReader, receive: Callable[[int], bytes]) -> Any:
        """A request; None for one of a size that a native server hangs up on."""
        try:
            return drive(reader.read(), receive)
        except RemoteProtocolError:
            return None

    def _place(self, handle: int, address: int) -> tuple[bytearray, int]:
        return self.memory[handle], address - base(handle)

    def _honest(self, command: Command, message: Any) -> Answer:
        match command:
            case Command.DEVICE_COUNT:
                return m.DeviceCountReply(self.devices)
            case Command.GET_ALIGNMENT:
                return m.GetAlignmentReply(32)
            case Command.GET_MAX_SIZE:
                return m.GetMaxSizeReply(GIB)
            case Command.GET_DEVICE_MEMORY:
                return m.GetDeviceMemoryReply(GIB, 2 * GIB)
            case Command.GET_ALLOC_SIZE:
                return m.GetAllocSizeReply(4)
            case Command.ALLOC_BUFFER:
                handle = len(self.memory) + 1
                self.memory[handle] = bytearray(message.size)
                return m.AllocBufferReply(handle, message.size)
            case Command.BUFFER_GET_BASE:
                return m.BufferGetBaseReply(base(message.remote_ptr))
            case Command.SET_TENSOR:
                memory, offset = self._place(message.tensor.buffer, message.tensor.data + message.offset)
                memory[offset : offset + len(message.data)] = message.data
                return SILENCE
            case Command.SET_TENSOR_HASH:
                return m.SetTensorHashReply(0)
            case Command.GET_TENSOR:
                memory, offset = self._place(message.tensor.buffer, message.tensor.data + message.offset)
                return m.GetTensorReply(memoryview(memory)[offset : offset + message.size])
            case Command.GRAPH_COMPUTE:
                graph = graphs.decode_graph(
                    message.payload, self.dialect, lambda handle, at: (handle, at - base(handle))
                )
                if len(self.kept) >= MOST_GRAPHS:
                    self.kept.clear()
                self.kept.add(graphs.split(message.payload, self.dialect).uid)
                if self.on_graph:
                    self.on_graph(self, graph)
                return SILENCE
            case Command.GRAPH_RECOMPUTE:
                return SILENCE if message.uid in self.kept else HANG_UP
            case Command.FREE_BUFFER:
                return m.Ack()
        raise AssertionError(f"the client under test does not use {command.name}")


def base(handle: int) -> int:
    """The address of a scripted server's buffer."""
    return handle << 32


def raw(payload: bytes, size: int | None = None) -> bytes:
    """An answer with any payload, announced as ``size`` bytes (its own size unless given)."""
    return REPLY_HEADER.pack(len(payload) if size is None else size) + payload


@dataclass
class Proxy:
    """Stands between a client and ``port``. After ``limit`` bytes of ``direction`` ("up": the client's) it cuts both
    connections, or goes silent when ``stall``. ``passed`` counts bytes by direction."""

    port: int
    limit: int | None = None
    direction: str = "down"
    stall: bool = False
    passed: dict[str, int] = field(default_factory=lambda: {"up": 0, "down": 0})
    endpoint: str = ""

    @contextlib.contextmanager
    def listening(self) -> Iterator[Proxy]:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.endpoint = f"127.0.0.1:{listener.getsockname()[1]}"
            self._done = threading.Event()
            thread = threading.Thread(target=self._serve, args=(listener,), daemon=True)
            thread.start()
            try:
                yield self
            finally:
                self._done.set()
                listener.shutdown(socket.SHUT_RDWR)
                thread.join(60)

    def _serve(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                with client, socket.create_connection(("127.0.0.1", self.port)) as server, contextlib.suppress(OSError):
                    self._pump(client, server)

    def _pump(self, client: socket.socket, server: socket.socket) -> None:
        ways = {client: ("up", server), server: ("down", client)}
        while not self._done.is_set():
            ready, _, _ = select.select(list(ways), [], [], 0.05)
            for source in ready:
                way, target = ways[source]
                room = None if self.limit is None or way != self.direction else self.limit - self.passed[way]
                data: Bytes = source.recv(65536 if room is None else min(65536, max(room, 1)))
                if not data:
                    return
                if room is not None and room <= 0:
                    if self.stall:
                        self._done.wait(30)
                    return
                target.sendall(data)
                self.passed[way] += len(data)
