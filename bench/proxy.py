"""TCP proxies: one that counts, one that delays."""

from __future__ import annotations

import socket
import time
from contextlib import suppress
from queue import SimpleQueue

from tests.support.proxy import Proxy

CHUNK = 1 << 20


class SlowLink(Proxy):
    """A link with a round trip of ``seconds`` before the server on ``port`` of this machine: what comes goes on half of
    that later, in either direction. It has any bandwidth."""

    def __init__(self, port: int, seconds: float) -> None:
        super().__init__(port)
        self._delay = seconds / 2

    def joined(self, client: socket.socket, server: socket.socket) -> None:
        for source, target in ((client, server), (server, client)):
            source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            on_the_way: SimpleQueue[tuple[float, bytes]] = SimpleQueue()
            self.run(self._receive, source, on_the_way)
            self.run(self._deliver, on_the_way, target)

    def _receive(self, source: socket.socket, on_the_way: SimpleQueue[tuple[float, bytes]]) -> None:
        data = b""
        with suppress(OSError):
            while data := source.recv(CHUNK):
                on_the_way.put((time.perf_counter() + self._delay, data))
        on_the_way.put((0.0, b""))

    def _deliver(self, on_the_way: SimpleQueue[tuple[float, bytes]], target: socket.socket) -> None:
        with suppress(OSError):
            while (arrival := on_the_way.get())[1]:
                time.sleep(max(0.0, arrival[0] - time.perf_counter()))
                target.sendall(arrival[1])
            target.shutdown(socket.SHUT_WR)


class CountingProxy(Proxy):
    """``sent`` and ``received`` are bytes that clients sent and got; a byte is counted before it goes on, so that
    nobody who has it finds it uncounted."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.sent = self.received = 0

    def joined(self, client: socket.socket, server: socket.socket) -> None:
        self.run(self._pump, client, server, "sent")
        self.run(self._pump, server, client, "received")

    def _pump(self, source: socket.socket, target: socket.socket, count: str) -> None:
        source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        buffer = memoryview(bytearray(CHUNK))
        with suppress(OSError):  # either side has hung up
            while got := source.recv_into(buffer):
                setattr(self, count, getattr(self, count) + got)
                target.sendall(buffer[:got])
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)
