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
from pathlib import Path
from types import TracebackType

from tests.interop.tap import COMMANDS, HEADER
from tests.support.process import ServerProcess, lasting_port
from tests.support.proxy import Proxy
from tests.support.proxy import cut as cut_off

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


class Trouble(Proxy):
    """Passes on what clients send to the server on ``port`` of this machine, and back. ``requests`` are the names of
    the commands that came. When half of the one with number ``at`` (counted from 0) has come, ``happens`` is called
    with the :class:`Passage` that it came through; the rest follows if that is still open."""

    def __init__(self, port: int, at: int | None = None, happens: Callable[[Passage], None] = lambda _: None) -> None:
        super().__init__(port)
        self.at, self.happens = at, happens
        self.requests: list[str] = []
        self._open: list[Passage] = []

    def joined(self, client: socket.socket, server: socket.socket) -> None:
        self._open.append(Passage(self, client, server))

    def end(self) -> None:
        for passage in self._open:
            passage.end()

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
        self._threads = [trouble.run(way) for way in (self._requests, self._answers)]

    def cut(self) -> None:
        cut_off(self.client, self.server)

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


class Wire(Proxy):
    """Passes bytes on, whatever they mean, to the server on ``port`` of this machine and back, until something happens
    to them (:meth:`disturb`). ``happened``: it did."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.happened = False
        self._lines: list[Line] = []
        self._lock = threading.Lock()
        self._fault: Fault | None = None
        self._up, self._left = True, 0

    def joined(self, client: socket.socket, server: socket.socket) -> None:
        line = Line(client, server)
        self._lines.append(line)
        for up in (True, False):
            self.run(self._pass, line, up)

    def end(self) -> None:
        for line in self._lines:
            line.cut()
        for thread in list(self._threads):
            thread.join(60)
        for line in self._lines:
            line.close()

    def disturb(self, fault: Fault, up: bool, after: int = 0) -> None:
        """Let ``fault`` happen, once, to what goes ``up`` (from clients) or down next, ``after`` so many bytes that
        way, counted over all connections."""
        with self._lock:
            self._fault, self._up, self._left = fault, up, after

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
        cut_off(self.client, self.server)

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
