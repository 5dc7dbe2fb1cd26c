"""A proxy between a client and a server that counts the commands that go through it."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections import Counter
from types import TracebackType

HEADER = struct.Struct("<BQ")
COMMANDS = dict(enumerate((
    "ALLOC_BUFFER", "GET_ALIGNMENT", "GET_MAX_SIZE", "BUFFER_GET_BASE", "FREE_BUFFER", "BUFFER_CLEAR", "SET_TENSOR",
    "SET_TENSOR_HASH", "GET_TENSOR", "COPY_TENSOR", "GRAPH_COMPUTE", "GET_DEVICE_MEMORY", "INIT_TENSOR",
    "GET_ALLOC_SIZE", "HELLO", "DEVICE_COUNT", "GRAPH_RECOMPUTE", "MEMSET_TENSOR", "SET_TENSOR_2D", "GET_TENSOR_2D",
    "COMM_INIT", "COMM_ALLREDUCE", "COMM_FREE",
))) | {240: "SET_TENSOR_DIGEST", 241: "GET_CARRIERS", 242: "CARRY", 243: "SET_RANGES"}  # fmt: skip
CARRY = 242
"""Behind it there are no commands any more."""


class Tap:
    """Listens on :attr:`endpoint` and passes everything on to ``target`` (host:port) and back, as if its clients were
    on the machine ``source``."""

    def __init__(self, target: str, source: str = "127.0.0.1") -> None:
        self._source = (source, 0)
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self.commands: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        """Of payloads."""
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self._open: list[socket.socket] = [self._listening]

    def __enter__(self) -> Tap:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed: the end
            while True:
                client, _ = self._listening.accept()
                server = socket.create_connection(self._target, source_address=self._source)
                self._open += [client, server]
                threading.Thread(target=self._requests, args=(client, server), daemon=True).start()
                threading.Thread(target=self._replies, args=(server, client), daemon=True).start()

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
