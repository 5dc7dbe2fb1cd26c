"""A client's socket as exact reads and whole writes, with time limits.

Small messages come through a read-ahead buffer, many in one system call; tensor data goes from the socket straight to
where it shall live. A client that is silent in the middle of a message is a protocol error, one that is gone is
:class:`ConnectionLost`.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import sys
import time
from collections.abc import Iterator, Sequence
from struct import Struct

import numpy as np

from ..device import Bytes
from ..errors import ConnectionLost, OverQuota, RemoteProtocolError, SdrpcError
from ..sockets import GONE, hung_up, is_gone, prepare
from ..wire.framing import BEAT
from ..wire.refusals import Refusal
from .limits import Limits
from .quotas import Payloads

_AHEAD = 1 << 16
_COUNTED = 1 << 20  # of a payload: what is below this is not counted, and more is counted in such pieces
_SENT = 1 << 20  # at a time: TLS sends all of it within one time limit
_BEAT_SECONDS = 2.0  # from one to the next: several fit into the time after which a client wonders
_NOW = getattr(socket, "MSG_DONTWAIT", 0)  # Windows has no such flag
_AT_ONCE = 1 << 22  # bytes that are waited for together
_WAITS = sys.platform == "linux"  # elsewhere SO_RCVTIMEO looks otherwise, or does not end such a wait
_TIME = Struct("@ll")  # its struct timeval
_JOIN_BELOW = 1 << 14  # replies up to here are sent in one piece with their header


class Stream:
    """One connection: ``peer`` names it, ``address`` only the machine it comes from, ``owner`` whom what it takes is
    counted for: the address, until it is known better. ``doing`` says what is going on,
    for errors; ``deadline`` (monotonic) bounds all reads if set; ``aborted`` is why it was us who ended it, if it was.
    ``received`` and ``sent`` count bytes. ``idle_since`` (monotonic) is when it began to wait for the client, None
    while there is something to do. ``beats``: whether the client wants to hear that we are at work. ``halved``: a part
    of something was sent, behind which nothing else has a meaning. Large messages are counted in ``payloads``."""

    def __init__(
        self, connection: socket.socket, peer: str, address: str, limits: Limits, payloads: Payloads | None = None
    ) -> None:
        self.peer, self.address = peer, address
        self.owner = address
        self.aborted: Refusal | None = None
        self.doing = "connecting"
        self.deadline: float | None = None
        self.received = self.sent = 0
        self.began = time.monotonic()
        self.idle_since: float | None = self.began
        self.beats = self.halved = self._sending = self._gone = False
        self._told = self.began
        self._socket, self._limits, self._payloads = connection, limits, payloads
        self._stall = limits.stall_seconds
        self._counted = 0
        self._ahead = memoryview(bytearray(_AHEAD))
        self._start = self._end = 0
        self._staging = memoryview(bytearray())
        self._records: ssl.SSLSocket | None = None
        self._patient: float | None = connection.gettimeout()
        self._system_waits = 0
        prepare(connection, limits.dead_seconds)

    def peek(self) -> int | None:
        """The first byte that comes, which stays there; None when the client leaves without a word."""
        self._wait_at_most(self._patience(None))
        with self._errors():
            first = self._socket.recv(1, socket.MSG_PEEK)
        return first[0] if first else None

    def secure(self, context: ssl.SSLContext) -> None:
        """Go on in TLS, as its server. Nothing must have been read before."""
        with self._errors():
            secured = context.wrap_socket(self._socket, server_side=True, do_handshake_on_connect=False)
            self._socket = self._records = secured
            if self.aborted:  # while the socket was changed, somebody may have ended the old one
                raise ConnectionAbortedError
            self._patient = secured.gettimeout()
            self._wait_at_most(self._patience(None))
            secured.do_handshake()

    @property
    def encrypted(self) -> bool:
        return self._records is not None

    def expect(self, size: int) -> None:
        """A message of ``size`` bytes is on its way: it must come at a speed that is of use."""
        self.deadline = time.monotonic() + self._stall + size / self._limits.slowest

    def done(self) -> None:
        """The message that was expected is dealt with, and nothing of it is held any more."""
        self.deadline = None
        if self._payloads is not None and self._counted:
            self._payloads.give_back(self.owner, self._counted)
        self._counted = 0

    def wait(self) -> bool:
        """Wait for the next message, for as long as ``deadline`` lets us; False when the client has finished."""
        if self._start < self._end:
            return True
        self.idle_since = time.monotonic()
        self._start, self._end = 0, self._receive(self._ahead, None)
        self.idle_since = None
        if self._gone:
            raise self._ended()
        return self._end > 0

    @property
    def has_more(self) -> bool:
        """Whether the client has sent something that was not read yet, or hung up."""
        if self._start < self._end or (isinstance(self._socket, ssl.SSLSocket) and self._socket.pending()):
            return True
        if sys.platform == "win32":
            return bool(select.select([self._socket], [], [], 0)[0])
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    @property
    def ahead(self) -> memoryview:
        """What has come and was not read yet, as far as it is here."""
        return self._ahead[self._start : self._end]

    def skip(self, size: int) -> None:
        """Pass over ``size`` bytes of what is :attr:`ahead`."""
        self._start += size

    def read(self, size: int) -> Bytes:
        """The next ``size`` bytes, which are buffered here: many are counted among the ``payloads``."""
        if self._end - self._start >= size:
            self._start += size
            return self._ahead[self._start - size : self._start].tobytes()
        if size > _COUNTED:
            return self._read_counted(size)
        data = bytearray(size)
        self.read_into(memoryview(data))
        return data

    def _read_counted(self, size: int) -> Bytes:
        data = np.empty(size, np.uint8).data  # untouched: it takes memory as the bytes come
        self.expect(size)
        for start in range(0, size, _COUNTED):
            piece = data[start : start + _COUNTED]
            if self._payloads is not None:
                if not self._payloads.take(self.owner, len(piece)):
                    raise OverQuota("too many large graphs are on their way to this server; try again later")
                self._counted += len(piece)
            self.read_into(piece)
        return data

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
            elif self._records is not None:
                filled += self._received_records(rest[:_SENT])
            else:
                filled += self._received_whole(rest[:_AT_ONCE]) if _WAITS else self._received(rest)

    def staging(self, size: int) -> memoryview:
        """Memory for ``size`` bytes on their way to somewhere else; the next call may return the same."""
        if len(self._staging) < size:
            self._staging = memoryview(bytearray(size))
        return self._staging[:size]

    def write(self, parts: Sequence[Bytes]) -> None:
        """Send all of ``parts``; large ones go out as they are, without a copy."""
        self._told = time.monotonic()
        if sum(map(len, parts)) <= _JOIN_BELOW:
            parts = [b"".join(parts)]
        for part in parts:
            self._send(memoryview(part))

    def beat(self) -> None:
        """Let the client know that we work for it, if that was agreed on and it was told nothing for a while. To be
        called often, between two answers; never waits."""
        now = time.monotonic()
        if not self.beats or now - self._told < _BEAT_SECONDS or not self._has_room():
            return
        self._told = now
        with contextlib.suppress(ConnectionLost):  # whoever asks next whether the client is there learns that
            self._send(memoryview(BEAT))

    def _has_room(self) -> bool:
        """Whether a few bytes can be sent at once."""
        if sys.platform == "win32":
            return bool(select.select([], [self._socket], [], 0)[1])
        poll = select.poll()
        poll.register(self._socket, select.POLLOUT)
        return bool(poll.poll(0))

    def linger(self, seconds: float) -> None:
        """Finish sending, and read on for a while: closing with unread bytes would make the kernel drop our words."""
        self.deadline = time.monotonic() + seconds
        with contextlib.suppress(OSError):  # the client may have ended it already
            _shut(self._socket, socket.SHUT_WR)
        while self._receive(self._ahead, None) > 0:
            pass

    def hung_up(self) -> bool:
        """Whether the client is gone, seen without waiting, whatever it sent before. Where the system does not tell,
        what is computed for it ends by itself."""
        return hung_up(self._socket)

    def look(self) -> None:
        """End the connection if the client's machine acknowledges nothing any more. To be called now and then, by any
        thread: who waits for the client is not told by the system, for many minutes."""
        if is_gone(self._socket, self._limits.dead_seconds):
            self._gone = True
            self.cut()

    def abort(self, why: Refusal) -> None:
        """Let whatever another thread is doing with this socket end; it can still tell the client ``why``."""
        self.aborted = why
        with contextlib.suppress(OSError):  # the client may have ended it already
            _shut(self._socket, socket.SHUT_RDWR if self._sending else socket.SHUT_RD)

    def cut(self) -> None:
        """End whatever another thread is doing with this socket, at once."""
        with contextlib.suppress(OSError):
            _shut(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()

    def _received(self, target: memoryview) -> int:
        count = self._receive(target, self._stall)
        if not count:
            raise self._ended()
        return count

    def _received_whole(self, target: memoryview) -> int:
        """As many bytes of ``target``, which is wanted whole, as come in time. The system waits for all of them in one
        call: each return to Python waits for its turn among the threads of this process, of which one may be at work
        that never lets go by itself."""
        if self.aborted:
            raise ConnectionLost(self.peer, self.doing)
        with self._errors():
            milliseconds = max(1, int((self._patience(self._stall) or self._stall) * 1e3))  # 0 would be for ever
            self._let_python_wait(None)
            self._let_system_wait(milliseconds)
            try:
                count = self._socket.recv_into(target, 0, socket.MSG_WAITALL)
            except BlockingIOError:
                raise TimeoutError from None
        self.received += count
        if not count:
            raise self._ended()
        return count

    def _received_records(self, target: memoryview) -> int:
        """As many bytes of ``target``, which is wanted whole, as come in time. TLS gives 16 KiB at a time: what can be
        done once for many of them is."""
        assert self._records is not None  # noqa: S101
        receive, filled = self._records.recv_into, 0
        with self._errors():
            patience = self._patience(self._stall)
            self._wait_at_most(patience)
            until = time.monotonic() + (patience or self._stall)
            while filled < len(target) and (not filled or time.monotonic() < until):
                count = receive(target[filled:])
                if not count:
                    break
                filled += count
        self.received += filled
        if not filled:
            raise self._ended()
        return filled

    def _receive(self, target: memoryview, seconds: float | None) -> int:
        if self.aborted:  # what is on its way still comes, also to a socket that was shut
            return 0
        try:  # not as a context, which takes as long as all the rest: small questions come by the hundred
            self._wait_at_most(self._patience(seconds))
            count = self._socket.recv_into(target)
        except OSError as error:
            raise self._fault(error) from None
        self.received += count
        return count

    def _wait_at_most(self, seconds: float | None) -> None:
        """Let the socket wait so long for the client. To say it anew takes as long as to send a few bytes."""
        self._let_system_wait(0)  # what it was told for data: between messages a client may be silent for longer
        self._let_python_wait(seconds)

    def _let_python_wait(self, seconds: float | None) -> None:
        if seconds != self._patient:
            self._socket.settimeout(seconds)
            self._patient = seconds

    def _let_system_wait(self, milliseconds: int) -> None:
        """Let the system wait so long for bytes that are wanted whole; 0: for ever."""
        if milliseconds != self._system_waits:
            patience = _TIME.pack(milliseconds // 1000, milliseconds % 1000 * 1000)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, patience)
            self._system_waits = milliseconds

    def _patience(self, seconds: float | None) -> float | None:
        """How long to wait for the client: ``seconds``, and not beyond the deadline."""
        if self.deadline is None:
            return seconds
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise RemoteProtocolError(f"nothing more came in time while {self.doing}")
        return left if seconds is None else min(seconds, left)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """What goes wrong with the socket while something is received."""
        try:
            yield
        except OSError as error:
            raise self._fault(error) from None

    def _ended(self) -> ConnectionLost:
        """What it means that nothing more comes."""
        return ConnectionLost(self.peer, self.doing, GONE) if self._gone else ConnectionLost(self.peer, self.doing)

    def _fault(self, error: OSError) -> SdrpcError:
        """What ``error`` of the socket means."""
        timed_out = isinstance(error, TimeoutError)
        if self._gone or (timed_out and error.errno):  # the system's, not ours
            return ConnectionLost(self.peer, self.doing, GONE)
        if timed_out:
            return RemoteProtocolError(f"nothing more came in time while {self.doing}")
        return ConnectionLost(self.peer, self.doing, error.strerror or str(error))

    def _send(self, rest: memoryview) -> None:
        rest = rest[self._sent_at_once(rest) :]
        if not rest:
            return
        self._sending = True
        try:
            self._wait_at_most(self._stall)
            while rest:
                count = self._socket.send(rest[:_SENT])
                self.sent += count
                rest = rest[count:]
        except TimeoutError as error:
            self.halved = True
            if error.errno:
                raise ConnectionLost(self.peer, self.doing, GONE) from None
            raise RemoteProtocolError("the client does not read its replies") from None
        except OSError as error:
            raise self._fault(error) from None
        finally:
            self._sending = False

    def _sent_at_once(self, data: memoryview) -> int:
        """Send of a small answer what the system takes without waiting, as it nearly always does; how much that was."""
        if len(data) > _JOIN_BELOW or self._records is not None or not _NOW:
            return 0
        try:
            self._wait_at_most(None)  # else Python waits before it sends
            count = self._socket.send(data, _NOW)
        except OSError:  # there is no room, or something is wrong: sending in the usual way says what
            return 0
        self.sent += count
        return count


def _shut(connection: socket.socket, how: int) -> None:
    """Shut a connection, whatever another thread does with it: TLS's own way would make that one read plain bytes."""
    socket.socket.shutdown(connection, how)
