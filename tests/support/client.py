"""A raw client: whole messages where they are right, and any bytes at all where they shall be wrong."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from struct import pack
from typing import Any

import numpy as np

from sdrpc.device import Bytes
from sdrpc.ggml import params
from sdrpc.ggml.dialect import Dialect, newest
from sdrpc.ggml.tensor import Dims, contiguous_strides
from sdrpc.ggml.types import TYPES
from sdrpc.wire import messages
from sdrpc.wire.framing import ERROR_MARK, REPLY_HEADER, ErrorReply, drive, encode_request, read_reply
from sdrpc.wire.graphs import COMPUTE
from sdrpc.wire.hello import NATIVE, Capability, encode_hello, read_hello_reply
from sdrpc.wire.messages import COMMANDS, Command, encode
from sdrpc.wire.ranges import Named, pack_named
from sdrpc.wire.records import Record, encode_records

FORK = {"QUANTIZE_I8_CONVROT": 101}
"""Operations of stable-diffusion.cpp's own, as its protocol 5.0.1 numbered them at first."""
SECONDS = 120.0
"""How long a server may take to answer; far more than any of these tests needs."""


class RawClient:
    """A connection to ``port`` on this machine that has said HELLO, unless ``capabilities`` is None."""

    def __init__(
        self,
        port: int,
        dialect: Dialect | None = None,
        name_length: int = 64,
        capabilities: Capability | None = NATIVE,
        host: str = "127.0.0.1",
    ) -> None:
        self.dialect, self.name_length = dialect or newest(), name_length
        self.socket = socket.create_connection((host, port), SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        host, number = self.socket.getsockname()[:2]
        self.name = f"{host}:{number}"
        self.errors = False
        if capabilities is not None:
            try:
                self.send(encode_hello(capabilities if self.dialect.hello_request_bytes else None))
                self.hello = drive(read_hello_reply(), self.receive)
            except BaseException:
                self.socket.close()
                raise
            self.errors = Capability.ERRORS in self.hello.capabilities

    def send(self, *parts: Bytes) -> None:
        for part in parts:
            self.socket.sendall(part)

    def receive(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece = self.socket.recv(size - len(data))
            if not piece:
                raise EOFError("the server has closed the connection")
            data += piece
        return bytes(data)

    def ended(self) -> str:
        """Wait for the server to close the connection; what it said before: nothing, or its reason."""
        _, _, reason = self.rest().partition(REPLY_HEADER.pack(ERROR_MARK))
        return reason[4:].decode("utf-8", "replace")

    def rest(self) -> bytes:
        """All that comes until the server closes the connection."""
        said = bytearray()
        try:
            while piece := self.socket.recv(1 << 16):
                said += piece
        except ConnectionResetError:
            pass
        return bytes(said)

    def command(self, number: int, payload: bytes = b"", size: int | None = None) -> None:
        """A command with any payload, whose header says ``size`` (default: the truth)."""
        self.send(pack("<BQ", number, len(payload) if size is None else size), payload)

    def post(self, message: Any) -> None:
        """Send a request that has no answer."""
        self.send(*encode_request(message, self.dialect, self.name_length))

    def ask(self, message: Any, bulk: int = 0) -> Any:
        """Send a request and return its answer, or None where the dialect has none."""
        self.post(message)
        command = COMMANDS[type(message)]
        if messages.response_class(command, self.dialect) is None:
            return None
        reply = drive(read_reply(command, self.dialect, bulk, self.errors), self.receive)
        assert not isinstance(reply, ErrorReply), reply.reason
        return reply

    def buffer(self, size: int, device: int = 0) -> tuple[int, int]:
        """A new buffer's handle and address."""
        handle, got = self.ask(messages.AllocBuffer(device, size))
        assert handle
        assert got >= size
        return handle, self.ask(messages.BufferGetBase(handle)).base_ptr

    def record(self, buffer: tuple[int, int] = (0, 0), ne: Sequence[int] = (4,), **fields: Any) -> Record:
        """A dense F32 tensor at the start of a buffer, unless ``fields`` say otherwise. ``type`` and ``op`` may be
        names; ``at`` is its offset in the buffer, ``words`` are its parameters as numbers. What has an operation is
        marked to be computed."""
        shape: Dims = (*ne, 1, 1, 1, 1)[:4]  # type: ignore[assignment]
        kind = fields.pop("type", "F32")
        if isinstance(kind, str):
            if "nb" not in fields:
                fields["nb"] = tuple(n % 2**32 for n in contiguous_strides(TYPES[kind], shape))
            kind = self.dialect.type_numbers[kind]
        op = fields.pop("op", 0)
        data = buffer[1] + fields.pop("at", 0)
        if words := fields.pop("words", ()):
            fields["op_params"] = pack(f"<{len(words)}i", *words).ljust(64, b"\0")
        if named := fields.pop("params", None):
            fields["op_params"] = params.encode(named, self.dialect)
        if "src" in fields:
            fields["src"] = (*fields["src"], *(0,) * 10)[:10]
        fields.setdefault("nb", (4, 16, 16, 16))
        fields["flags"] = fields.get("flags", 0) | (COMPUTE if op else 0)
        defaults = {"type": kind, "buffer": buffer[0], "ne": shape, "data": data, "name": b"t"}
        defaults["op"] = (FORK | self.dialect.op_numbers)[op] if isinstance(op, str) else op
        return Record(**{**defaults, **fields})

    def set(self, tensor: Record, values: np.ndarray | bytes, offset: int = 0) -> None:
        data = values if isinstance(values, bytes) else values.tobytes()
        self.post(messages.SetTensor(tensor, 0, offset, data))

    def begin_set(self, tensor: Record, size: int) -> None:
        """All of a SET_TENSOR but its ``size`` bytes of data."""
        head = b"".join(map(bytes, encode(messages.SetTensor(tensor, 0, 0, b""), self.dialect, self.name_length)))
        self.command(Command.SET_TENSOR, head, len(head) + size)

    def get(self, tensor: Record, size: int, offset: int = 0) -> bytes:
        self.ask(messages.GetTensor(tensor, offset, size), bulk=size)
        return self.receive(size)

    def find(self, handle: int, *asked: Named) -> list[bool]:
        """Ask for bytes of a buffer by their digests: which of them are there now."""
        self.ask(messages.SetRangesDigest(handle, pack_named(asked)), bulk=len(asked))
        return list(map(bool, self.receive(len(asked))))

    def graph(self, nodes: Sequence[int], records: Sequence[Record], device: int = 0, uid: int = 0) -> bytes:
        """A GRAPH_COMPUTE payload: node ids and tensors as they are, whatever they mean."""
        head = pack("<IQ", device, uid) if self.dialect.has_graph_uids else pack("<I", device)
        ids = head + pack(f"<I{len(nodes)}Q", len(nodes), *nodes)
        return ids + pack("<I", len(records)) + encode_records(list(records), self.name_length)

    def compute(self, nodes: Sequence[int], records: Sequence[Record], device: int = 0, uid: int = 0) -> None:
        self.command(Command.GRAPH_COMPUTE, self.graph(nodes, records, device, uid))

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Adder:
    """A client that keeps computing a + b, to see that a server does its other clients right."""

    def __init__(self, client: RawClient, elements: int = 32) -> None:
        self.client, self.elements = client, elements
        size = 4 * elements
        buffer = self.buffer = client.buffer(3 * size)
        self.a, self.b = (client.record(buffer, (elements,), at=i * size, id=i + 1) for i in (0, 1))
        self.sum = client.record(buffer, (elements,), at=2 * size, id=3, op="ADD", src=(1, 2), flags=2)
        self.rounds = 0

    def __call__(self) -> None:
        """Once more, with other numbers."""
        self.rounds += 1
        a = np.arange(self.elements, dtype="f4")
        b = np.full(self.elements, self.rounds, "f4")
        self.client.set(self.a, a)
        self.client.set(self.b, b)
        if self.rounds == 1:
            self.client.compute([3], [self.a, self.b, self.sum], uid=1)
        else:
            self.client.post(messages.GraphRecompute(0, 1))
        got = np.frombuffer(self.client.get(self.sum, 4 * self.elements), "f4")
        np.testing.assert_array_equal(got, a + b)


def busy(client: RawClient, products: int = 4000, n: int = 512, uid: int = 0) -> None:
    """Send a graph that computes for a long time: products of n × n matrices, one after the other. The server keeps it
    as ``uid``, unless that is 0."""
    buffer = client.buffer(3 * 4 * n * n)
    weight = client.record(buffer, (n, n), id=1)
    places = (4 * n * n, 8 * n * n)
    nodes = [
        client.record(buffer, (n, n), at=places[i % 2], id=i, op="MUL_MAT", src=(1, i - 1))
        for i in range(2, products + 2)
    ]
    client.compute(range(2, products + 2), [weight, *nodes], uid=uid)
