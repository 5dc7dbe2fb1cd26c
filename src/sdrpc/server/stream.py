"""A client's socket as exact reads and whole writes, with time limits.

Small messages come through a read-ahead buffer, many in one system call; tensor data goes from the socket straight to
where it shall live. A client that is silent in the middle of a message is a protocol error, one that is gone is
:class:`ConnectionLost`.
"""

from __future__ import annotations

import contextlib
import select
import socket
import sys
import time
from collections.abc import Sequence

from ..device import Bytes
from ..errors import ConnectionLost, RemoteProtocolError

_AHEAD = 1 << 16
_SOCKET_BUFFER = 4 << 20  # the kernel's own limits cap it
_JOIN_BELOW = 1 << 14  # replies up to here are sent in one piece with their header


class Stream:
    """One connection: ``peer`` names it, ``address`` only the machine it comes from. ``doing`` says what is going on,
    for errors; ``deadline`` (monotonic) bounds all reads if set; ``aborted`` is true when it was us who ended it."""

    def __init__(self, connection: socket.socket, peer: str, address: str, stall_seconds: float) -> None:
        self.peer, self.address = peer, address
        self.aborted = False
        self.doing = "connecting"
        self.deadline: float | None = None
        self._socket, self._stall = connection, stall_seconds
        self._ahead = memoryview(bytearray(_AHEAD))
        self._start = self._end = 0
        self._staging = memoryview(bytearray())
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            connection.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER)

    def wait(self) -> bool:
        """Wait for the next message, for as long as ``deadline`` lets us; False when the client has finished."""
        if self._start < self._end:
            return True
        self._start, self._end = 0, self._receive(self._ahead, None)
        return self._end > 0

    def read(self, size: int) -> bytes:
        """The next ``size`` bytes, which must be few: they are buffered here."""
        if self._end - self._start >= size:
            self._start += size
            return bytes(self._ahead[self._start - size : self._start])
        data = bytearray(size)
        self.read_into(memoryview(data))
        return bytes(data)

    def read_into(self, target: memoryview) -> None:
        """Fill ``target`` (bytes) with what comes next, without a copy on the way."""
        ahead = min(len(target), self._end - self._start)
        target[:ahead] = self._ahead[self._start : self._start + ahead]
        self._start += ahead
        filled = ahead
        while filled < len(target):
            rest = target[filled:]
            if len(rest) < _AHEAD:  # take along what follows
                self._start, self._end = 0, self._received(self._ahead)
                taken = min(len(rest), self._end)
                rest[:taken] = self._ahead[:taken]
                self._start = taken
                filled += taken
            else:
                filled += self._received(rest)

    def staging(self, size: int) -> memoryview:
        """Memory for ``size`` bytes on their way to somewhere else; the next call may return the same."""
        if len(self._staging) < size:
            self._staging = memoryview(bytearray(size))
        return self._staging[:size]

    def write(self, parts: Sequence[Bytes]) -> None:
        """Send all of ``parts``; large ones go out as they are, without a copy."""
        if sum(map(len, parts)) <= _JOIN_BELOW:
            parts = [b"".join(parts)]
        for part in parts:
            self._send(memoryview(part))

    def linger(self, seconds: float) -> None:
        """Finish sending, and read on for a while: closing with unread bytes would make the kernel drop our words."""
        self.deadline = time.monotonic() + seconds
        with contextlib.suppress(OSError):  # the client may have ended it already
            self._socket.shutdown(socket.SHUT_WR)
        while self._receive(self._ahead, None) > 0:
            pass

    def hung_up(self) -> bool:
        """Whether the client is gone, seen without waiting, whatever it sent before."""
        if sys.platform == "win32":
            return False  # it does not tell; what is computed for a client that is gone ends by itself
        poll = select.poll()
        # Linux tells an end that is behind unread bytes apart
        poll.register(self._socket, select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0))
        return bool(poll.poll(0))

    def abort(self) -> None:
        """End whatever another thread is doing with this socket."""
        self.aborted = True
        with contextlib.suppress(OSError):  # the client may have ended it already
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()

    def _received(self, target: memoryview) -> int:
        count = self._receive(target, self._stall)
        if not count:
            raise ConnectionLost(self.peer, self.doing)
        return count

    def _receive(self, target: memoryview, seconds: float | None) -> int:
        if self.deadline is not None:
            left = self.deadline - time.monotonic()
            seconds = left if seconds is None else min(seconds, left)
        try:
            if seconds is not None and seconds <= 0:
                raise TimeoutError
            self._socket.settimeout(seconds)
            return self._socket.recv_into(target)
        except TimeoutError:
            raise RemoteProtocolError(f"nothing more came in time while {self.doing}") from None
        except OSError as error:
            raise ConnectionLost(self.peer, self.doing, error.strerror or str(error)) from None

    def _send(self, rest: memoryview) -> None:
        self._socket.settimeout(self._stall)
        try:
            while rest:
                rest = rest[self._socket.send(rest) :]
        except TimeoutError:
            raise RemoteProtocolError("the client does not read its replies") from None
        except OSError as error:
            raise ConnectionLost(self.peer, self.doing, error.strerror or str(error)) from None
