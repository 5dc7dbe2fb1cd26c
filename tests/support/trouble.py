"""What goes wrong between a client and a server, at a request that a test names: a proxy that lets everything through
until then."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType

from tests.interop.tap import COMMANDS, HEADER
from tests.support.process import ServerProcess, lasting_port

PIECE = 1 << 16


class Restartable:
    """An rpc-server process that can be ended and started again on its port."""

    def __init__(self, *options: str, state: Path | None = None) -> None:
        self._options, self._state = options, state
        self._stack = ExitStack()
        self.port = lasting_port()
        self.start()

    def __enter__(self) -> Restartable:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def kill(self) -> None:
        """As kill -9 does."""
        self.server.process.kill()
        self.server.process.wait()

    def start(self) -> None:
        self.server = self._stack.enter_context(
            ServerProcess(*self._options, "--port", str(self.port), state=self._state)
        )
        assert self.server.port == self.port

    def stop(self) -> None:
        """Stand still, as a machine does whose lid is closed. None of its threads runs any more when this returns: the
        signal alone does not say so."""
        self.server.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.server.process.pid, os.WSTOPPED)

    def go_on(self) -> None:
        self.server.process.send_signal(signal.SIGCONT)

    def sleep(self, seconds: float) -> None:
        """Stand still for a while, from now on."""
        self.stop()
        threading.Timer(seconds, self.go_on).start()


class Trouble:
    """Passes on what clients send to the server on ``port`` of this machine, and back. ``requests`` are the names of
    the commands that came. When half of the one with number ``at`` (counted from 0) has come, ``happens`` is called
    with the :class:`Passage` that it came through; the rest follows if that is still open."""

    def __init__(self, port: int, at: int | None = None, happens: Callable[[Passage], None] = lambda _: None) -> None:
        self.port, self.at, self.happens = port, at, happens
        self.requests: list[str] = []
        self.connections = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self._open: list[Passage] = []

    def __enter__(self) -> Trouble:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for passage in self._open:
            passage.end()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed: the end
            while True:
                client, _ = self._listening.accept()
                self.connections += 1
                try:
                    server = socket.create_connection(("127.0.0.1", self.port))
                except OSError:
                    client.close()
                    continue
                self._open.append(Passage(self, client, server))

    def comes(self, command: int) -> bool:
        """Note a request; whether something happens in its middle."""
        self.requests.append(COMMANDS.get(command, str(command)))
        return len(self.requests) - 1 == self.at


class Passage:
    """One connection through the proxy."""

    def __init__(self, trouble: Trouble, client: socket.socket, server: socket.socket) -> None:
        self.trouble, self.client, self.server = trouble, client, server
        self.stalls = threading.Event()
        """Nothing goes through any more, and nobody is told."""
        self.spoils_request = self.spoils_answer = self.halves_answer = False
        """One bit of what comes next is another one; half of it comes, and nothing more."""
        self._threads = [threading.Thread(target=way, daemon=True) for way in (self._requests, self._answers)]
        for thread in self._threads:
            thread.start()

    def cut(self) -> None:
        for end in (self.client, self.server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        self.cut()
        for thread in self._threads:
            thread.join(60)
        self.client.close()
        self.server.close()

    def _requests(self) -> None:
        with contextlib.suppress(OSError), self.client.makefile("rb") as stream:
            while head := stream.read(HEADER.size):
                command, size = HEADER.unpack(head)
                happens = self.trouble.comes(command)
                self._pass(self.server, head)
                left = size
                while left or happens:
                    if happens and left <= size // 2:
                        happens = False
                        self.trouble.happens(self)
                        continue
                    piece = stream.read(min(left, PIECE) if left <= size // 2 else min(left - size // 2, PIECE))
                    if not piece:
                        break
                    left -= len(piece)
                    if self.spoils_request:
                        self.spoils_request, piece = False, spoilt(piece)
                    self._pass(self.server, piece)
        with contextlib.suppress(OSError):
            self.server.shutdown(socket.SHUT_WR)

    def _answers(self) -> None:
        with contextlib.suppress(OSError):
            while piece := self.server.recv(PIECE):
                if self.spoils_answer:
                    self.spoils_answer, piece = False, spoilt(piece)
                if self.halves_answer:
                    self._pass(self.client, piece[: len(piece) // 2])
                    self.cut()
                self._pass(self.client, piece)
        if not self.stalls.is_set():
            with contextlib.suppress(OSError):
                self.client.shutdown(socket.SHUT_WR)

    def _pass(self, target: socket.socket, data: bytes) -> None:
        if not self.stalls.is_set():
            target.sendall(data)


def spoilt(data: bytes) -> bytes:
    """``data`` with one bit of its middle turned over."""
    damaged = bytearray(data)
    damaged[len(damaged) // 2] ^= 0x10
    return bytes(damaged)


Fault = Callable[["Line", bytes], bytes]
"""What becomes of bytes that come through a line."""


class Wire:
    """Passes bytes on, whatever they mean, to the server on ``port`` of this machine and back, until something happens
    to them (:meth:`disturb`). ``connections`` came; ``happened``: it did."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.connections = 0
        self.happened = False
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self._lines: list[Line] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._fault: Fault | None = None
        self._up, self._left = True, 0

    def __enter__(self) -> Wire:
        self._run(self._accept)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        for line in self._lines:
            line.cut()
        for thread in list(self._threads):
            thread.join(60)
        self._listening.close()
        for line in self._lines:
            line.close()

    def disturb(self, fault: Fault, up: bool, after: int = 0) -> None:
        """Let ``fault`` happen, once, to what goes ``up`` (from clients) or down next, ``after`` so many bytes that
        way, counted over all connections."""
        with self._lock:
            self._fault, self._up, self._left = fault, up, after

    def _run(self, target: Callable[[], None]) -> None:
        self._threads.append(threading.Thread(target=target, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed: the end
            while True:
                client, _ = self._listening.accept()
                self.connections += 1
                try:
                    server = socket.create_connection(("127.0.0.1", self.port))
                except OSError:
                    client.close()
                    continue
                self._lines.append(Line(client, server))
                for up in (True, False):
                    self._run(partial(self._pass, self._lines[-1], up))

    def _pass(self, line: Line, up: bool) -> None:
        source, target = (line.client, line.server) if up else (line.server, line.client)
        try:
            while piece := source.recv(PIECE):
                if fault := self._due(up, len(piece)):
                    piece = fault(line, piece)
                if not line.silent:
                    target.sendall(piece)
            if not line.silent:
                target.shutdown(socket.SHUT_WR)
        except OSError:  # one end is gone: the other must not wait until somebody reads on
            if not line.silent:
                line.cut()

    def _due(self, up: bool, size: int) -> Fault | None:
        """What happens to the next ``size`` bytes."""
        with self._lock:
            if self._fault is None or up != self._up:
                return None
            self._left -= size
            if self._left >= 0:
                return None
            due, self._fault, self.happened = self._fault, None, True
            return due


class Line:
    """One connection through a wire. ``silent``: nothing goes through any more, and nobody is told."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        self.silent = False

    def cut(self) -> None:
        for end in (self.client, self.server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.client.close()
        self.server.close()


def flip(line: Line, data: bytes) -> bytes:
    """One bit is another one."""
    return spoilt(data)


def cut(line: Line, data: bytes) -> bytes:
    """The connection ends, and this is lost."""
    line.cut()
    return b""


def stall(line: Line, data: bytes) -> bytes:
    """Neither this nor anything else comes through, and nobody is told."""
    line.silent = True
    return data
