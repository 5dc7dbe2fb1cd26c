"""TCP proxies: one that counts, one that delays."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from queue import SimpleQueue
from types import TracebackType

CHUNK = 1 << 20


class SlowLink:
    """A link with a round trip of ``seconds`` before the server on ``port`` of this machine: what comes goes on half of
    that later, in either direction. It has any bandwidth."""

    def __init__(self, port: int, seconds: float) -> None:
        self._to, self._delay = port, seconds / 2
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> SlowLink:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._to))
                for source, target in ((client, server), (server, client)):
                    source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    on_the_way: SimpleQueue[tuple[float, bytes]] = SimpleQueue()
                    threading.Thread(target=self._receive, args=(source, on_the_way), daemon=True).start()
                    threading.Thread(target=self._deliver, args=(on_the_way, target), daemon=True).start()

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


class CountingProxy:
    """Stands on a free port before the server on ``port`` of this machine. ``sent`` and ``received`` are bytes that
    clients sent and got; a byte is counted before it goes on, so that nobody who has it finds it uncounted."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.sent = self.received = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> CountingProxy:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._to))
                for way in ((client, server, "sent"), (server, client, "received")):
                    threading.Thread(target=self._pump, args=way, daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, count: str) -> None:
        source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        buffer = memoryview(bytearray(CHUNK))
        with suppress(OSError):  # either side has hung up
            while got := source.recv_into(buffer):
                setattr(self, count, getattr(self, count) + got)
                target.sendall(buffer[:got])
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)
