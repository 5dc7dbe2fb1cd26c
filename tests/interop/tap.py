"""A proxy between a client and a server that counts the commands that go through it."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections import Counter

from tests.support.proxy import Proxy, cut

HEADER = struct.Struct("<BQ")
COMMANDS = dict(enumerate((
    "ALLOC_BUFFER", "GET_ALIGNMENT", "GET_MAX_SIZE", "BUFFER_GET_BASE", "FREE_BUFFER", "BUFFER_CLEAR", "SET_TENSOR",
    "SET_TENSOR_HASH", "GET_TENSOR", "COPY_TENSOR", "GRAPH_COMPUTE", "GET_DEVICE_MEMORY", "INIT_TENSOR",
    "GET_ALLOC_SIZE", "HELLO", "DEVICE_COUNT", "GRAPH_RECOMPUTE", "MEMSET_TENSOR", "SET_TENSOR_2D", "GET_TENSOR_2D",
    "COMM_INIT", "COMM_ALLREDUCE", "COMM_FREE",
))) | {240: "SET_RANGES_DIGEST", 241: "GET_CARRIERS", 242: "CARRY", 243: "SET_RANGES"}  # fmt: skip
CARRY = 242
"""Behind it there are no commands any more."""


class Tap(Proxy):
    """Passes everything on, and counts."""

    def __init__(self, target: str, source: str = "127.0.0.1") -> None:
        super().__init__(target, source)
        self.commands: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        """Of payloads."""
        self._open: list[socket.socket] = []

    def joined(self, client: socket.socket, server: socket.socket) -> None:
        self._open += [client, server]
        self.run(self._requests, client, server)
        self.run(self._replies, server, client)

    def end(self) -> None:
        cut(*self._open)
        for connection in self._open:
            connection.close()

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError), client.makefile("rb") as stream:
            while head := stream.read(HEADER.size):
                command, size = HEADER.unpack(head)
                self.commands[COMMANDS.get(command, "")] += 1
                self.bytes[COMMANDS.get(command, "")] += size
                server.sendall(head)
                while size:
                    piece = stream.read(min(size, 1 << 20))
                    server.sendall(piece)
                    size -= len(piece)
                while command == CARRY and (piece := stream.read1(1 << 20)):
                    self.bytes["carried"] += len(piece)
                    server.sendall(piece)
            server.shutdown(socket.SHUT_WR)

    @staticmethod
    def _replies(server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            with contextlib.suppress(ConnectionResetError):  # as good as the end, for the client as well
                while piece := server.recv(1 << 20):
                    client.sendall(piece)
            client.shutdown(socket.SHUT_WR)
