"""What proxies between a client and a server have in common: each client that comes gets a connection to the server."""

from __future__ import annotations

import contextlib
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Any

from typing_extensions import Self


class Proxy(ABC):
    """Listens at :attr:`endpoint`, which is ``port`` of this machine, and joins clients that come with the server at
    ``target`` (host:port, or a port of this machine), as if they were on the machine ``source``. ``connections``: how
    many came."""

    def __init__(self, target: str | int, source: str = "127.0.0.1") -> None:
        host, _, port = str(target).rpartition(":")
        self._target, self._source = (host or "127.0.0.1", int(port)), (source, 0)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self.endpoint = f"127.0.0.1:{self.port}"
        self.connections = 0
        self._threads: list[threading.Thread] = []
        self._ends: list[socket.socket] = []

    def __enter__(self) -> Self:
        self.run(self._accept)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self.end()
        cut(*self._ends)
        for thread in self._threads:
            thread.join(60)
        for end in (self._listening, *self._ends):
            end.close()

    def run(self, target: Callable[..., None], *args: Any) -> threading.Thread:
        """Do something in a thread of its own."""
        self._threads.append(threading.Thread(target=target, args=args, daemon=True))
        self._threads[-1].start()
        return self._threads[-1]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed: the end
            while True:
                client, _ = self._listening.accept()
                self.connections += 1
                try:
                    server = socket.create_connection(self._target, source_address=self._source)
                except OSError:
                    client.close()
                    continue
                self._ends += client, server
                self.joined(client, server)

    @abstractmethod
    def joined(self, client: socket.socket, server: socket.socket) -> None:
        """A client came; begin to pass on what it says, and what the server answers."""

    def end(self) -> None:
        """No more clients come: do what is to be done before their connections are ended."""


def cut(*ends: socket.socket) -> None:
    """End connections for who reads or writes there."""
    for end in ends:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
