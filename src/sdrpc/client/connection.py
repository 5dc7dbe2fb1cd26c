"""One TCP connection to a server: requests out, answers in, one after the other.

The HELLO has two forms, and a client can't know which one a server expects. The newer one (protocol 4.0 and later)
goes first; a server that hangs up on it gets the empty one of 3.x on a fresh connection.

The length of names (GGML_MAX_NAME) can't be asked for either. But a native server hangs up, and does nothing else, on a
GET_ALLOC_SIZE of a size that is not its own: so that comes first, with one length after the other, each on a fresh
connection; the connection on which it is answered is kept. Our own servers take any length.
"""

from __future__ import annotations

import errno
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..device import Bytes, Silence, Traffic
from ..errors import (
    ConnectionFailed,
    ConnectionLost,
    KeyNeeded,
    RemoteProtocolError,
    VersionMismatch,
)
from ..ggml import dialect as dialects
from ..ggml.dialect import Dialect
from ..sockets import GONE, hung_up, is_gone, prepare
from ..wire import framing, hello, messages
from ..wire.hello import NATIVE, Capability, HelloReply
from ..wire.messages import COMMANDS, Command
from ..wire.name_length import COMMON
from ..wire.records import Record
from ..wire.refusals import from_text
from .endpoint import Endpoint
from .keychain import Credential, Keychain
from .refused import Refused
from .secure import secured, show_key

if TYPE_CHECKING:
    from .carriers import Carriers

CAPABILITIES = Capability(sum(Capability)) & ~Capability.LOCKED
MAX_DEVICES = 256
"""More devices than this nobody has: a larger number is a broken or malicious server."""
_AT_ONCE = 1 << 18
"""Bytes that are given to TLS together: it says nothing of its progress before they are all sent."""
_JOIN_BELOW = 1 << 14
"""Bytes that are sent in one piece where buffers can't be sent together: one packet, and in TLS one record."""
MAX_BUFFERS_PER_SEND = 64
"""Below every system's IOV_MAX."""


@dataclass(frozen=True)
class Timeouts:
    """Seconds. ``connect``: until the connection stands and HELLO is answered. ``answer``: without a byte from the
    server, or without room for one, where servers are silent while they compute. ``silent``: the same where they
    aren't (``Capability.BEATS``): a machine that sleeps for less than that goes on where it was. A server whose machine
    is gone is noticed after ``dead``."""

    connect: float = 10.0
    answer: float = 660.0
    silent: float = 60.0
    dead: int = 10


LOOK_SECONDS = 1.0
"""How often somebody who waits is told so."""
HANGS_UP = (ConnectionResetError, ConnectionAbortedError, BrokenPipeError, ssl.SSLEOFError, ssl.SSLZeroReturnError)

DEFAULT_TIMEOUTS = Timeouts()


class Connection:
    """A connection after HELLO. Not thread-safe. Any failure closes it, since the stream then has no meaning any more:
    later calls raise :class:`ConnectionLost` with the first reason."""

    def __init__(
        self,
        endpoint: Endpoint,
        sock: socket.socket,
        dialect: Dialect,
        version: str,
        capabilities: Capability,
        timeouts: Timeouts,
    ) -> None:
        self.endpoint = endpoint
        self.dialect = dialect
        self.version = version
        """What the server says it speaks; the dialect may be of a lower patch."""
        self.capabilities = capabilities
        self.name_length = COMMON[0]
        self.closed_because = ""
        self.watch: Silence = lambda _: None
        """See :meth:`sdrpc.device.Device.watched`."""
        self.traffic = Traffic(str(endpoint))
        self._socket = sock
        self._timeouts = timeouts
        self._patience = timeouts.connect

    def call(self, message: Any, doing: str) -> Any:
        """Send ``message`` and return its answer, or None where the dialect has none."""
        command = COMMANDS[type(message)]
        answered = messages.response_class(command, self.dialect) is not None
        request = framing.encode_request(message, self.dialect, self.name_length)
        with self._guard(doing):
            self._send(request)
            reply = self._reply(command) if answered else None
        if isinstance(reply, framing.ErrorReply):
            raise self._refusal(reply)
        return reply

    def fetch(self, message: messages.GetTensor, into: memoryview, doing: str) -> messages.GetTensorReply:
        """Send ``message`` and receive the tensor's bytes straight into ``into`` (as many as it asks for)."""
        request = framing.encode_request(message, self.dialect, self.name_length)
        with self._guard(doing):
            self._send(request)
            reply: messages.GetTensorReply = self._into(Command.GET_TENSOR, into)
        return reply

    def ask_later(self, messages: Sequence[Any], doing: str) -> None:
        """Send ``messages``; :meth:`answer_of` receives the answer to each, before those of any other. They must be few
        and small, because the server answers while we still send."""
        requests = [framing.encode_request(message, self.dialect, self.name_length) for message in messages]
        with self._guard(doing):
            self._send([part for request in requests for part in request])

    def answer_of(self, message: Any, into: memoryview, doing: str) -> Any:
        """The answer to the first :meth:`ask_later` that was not received yet, which sent ``message``; its
        bulk data is received in ``into``."""
        with self._guard(doing):
            return self._into(COMMANDS[type(message)], into)

    def shows_at(self) -> int | None:
        """The file descriptor that can be read from when an answer comes; None where some of it may be here already."""
        secured = isinstance(self._socket, ssl.SSLSocket) and self._socket.pending()
        return None if secured or self.closed_because else self._socket.fileno()

    def send_over(
        self,
        carriers: Carriers,
        message: messages.SetRanges,
        data: Sequence[Sequence[memoryview]],
        sent: Callable[[], None],
        doing: str,
    ) -> None:
        """Send ``message``, and its data over ``carriers``, which :meth:`~Carriers.tell` that it is ``sent``. What the
        server says to either it says here."""
        request = framing.encode_request(message, self.dialect, self.name_length)
        size = sum(len(view) for views in data for view in views)

        def counted() -> None:
            self.traffic.sent += size
            sent()

        with self._guard(doing), self._hearing():
            self._send(request)
            carriers.send(data, counted, self.watch)

    def finish_over(self, carriers: Carriers, doing: str) -> None:
        """Wait until all that ``carriers`` have is sent."""
        with self._guard(doing), self._hearing():
            carriers.finish(self.watch)

    @contextmanager
    def _hearing(self) -> Iterator[None]:
        """Why a server ended a carrier it says to this connection."""
        try:
            yield
        except ConnectionLost as lost:
            if isinstance(lost.__cause__, HANGS_UP):
                raise self._refusal(framing.drive(framing.read_error(), self._receive)) from lost
            raise

    def carry(self, views: Sequence[memoryview]) -> None:
        """Send data for another connection, as its carrier."""
        with self._guard("carrying data"):
            self._send(views)

    def cut(self) -> None:
        """End whatever another thread does with it."""
        with suppress(OSError):  # it has ended
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def go_on_from(self, lost: Connection) -> None:
        """This connection stands for one that was ``lost``: both count together."""
        lost.traffic.sent += self.traffic.sent
        lost.traffic.received += self.traffic.received
        self.traffic = lost.traffic

    def close(self, because: str = "the connection was closed") -> None:
        self.closed_because = self.closed_because or because
        self._socket.close()

    def greeted(self) -> None:
        """It is known that the server is one and what it can do: from now on it may take its time."""
        ticks = Capability.BEATS in self.capabilities
        self._patience = self._timeouts.silent if ticks else self._timeouts.answer
        self._socket.settimeout(min(LOOK_SECONDS, self._patience))

    def _wait(self, silent: float) -> None:
        """Called while the server has been silent for so many seconds: whether to wait any longer."""
        if silent >= self._patience:
            raise TimeoutError
        if is_gone(self._socket, self._timeouts.dead):
            raise OSError(errno.EHOSTUNREACH, GONE)
        if Capability.BEATS in self.capabilities:
            self.watch(silent)

    def _wait_for_room(self, silent: float) -> None:
        """The same, while the server takes nothing of what is sent to it."""
        if hung_up(self._socket):
            raise ConnectionResetError("the server hung up")
        self._wait(silent)

    def _send(self, buffers: Sequence[Bytes]) -> None:
        try:
            _send_all(self._socket, buffers, self._wait_for_room)
        except HANGS_UP:
            # A server of ours says why before it hangs up, and what it said can still be read.
            if self.capabilities & Capability.ERRORS:
                raise self._refusal(framing.drive(framing.read_error(), self._receive)) from None
            raise
        self.traffic.sent += sum(map(framing.byte_length, buffers))

    def _reply(self, command: Command, bulk: int = 0) -> Any:
        errors = bool(self.capabilities & Capability.ERRORS)
        reply = framing.drive(framing.read_reply(command, self.dialect, bulk, errors), self._receive)
        if isinstance(reply, framing.ErrorReply) and not reply.goes_on:
            raise self._refusal(reply)
        return reply

    def _refusal(self, reply: framing.ErrorReply) -> Refused:
        return Refused(str(self.endpoint), from_text(reply.reason))

    def _into(self, command: Command, into: memoryview) -> Any:
        """The answer to ``command``, whose bulk data is received in ``into``."""
        reply = self._reply(command, bulk=len(into))
        _receive_into(self._socket, into, self._wait)
        self.traffic.received += len(into)
        return reply

    def _receive(self, size: int) -> Bytes:
        data = _receive(self._socket, size, self._wait)
        self.traffic.received += size
        return data

    @contextmanager
    def _guard(self, doing: str) -> Iterator[None]:
        """Failures of the socket as ours; whatever goes wrong in mid exchange ends the connection."""
        if self.closed_because:
            raise ConnectionLost(str(self.endpoint), doing, self.closed_because)
        try:
            yield
        except OSError as error:
            reason = _reason(error)
            self.close(reason)
            raise ConnectionLost(str(self.endpoint), doing, reason) from error
        except RemoteProtocolError as error:
            self.close(str(error))
            raise RemoteProtocolError(f"{self.endpoint}: {error} (while {doing})") from error
        except BaseException as error:
            self.close(str(error) or "an exchange was interrupted")
            raise


def open_connection(
    endpoint: Endpoint,
    timeouts: Timeouts = DEFAULT_TIMEOUTS,
    name_length: int | None = None,
    keychain: Keychain | None = None,
) -> tuple[Connection, int]:
    """Connect, greet, and find out everything that must be known before the first tensor: the version, what the server
    can do, how long its names are. ``name_length`` says the last for a native server with an unusual one. A server for
    which ``keychain`` (default: what was kept) has a key is talked to in TLS only.

    Returns the connection and how many devices the server has. Raises :class:`ConnectionFailed` (nobody there, or
    nothing that answers as an RPC server, or lets us in), :class:`VersionMismatch`, :class:`RemoteProtocolError`.
    """
    keychain = keychain or Keychain()
    lengths = COMMON if name_length is None else (name_length,)
    for length in lengths:
        connection = greet(endpoint, timeouts, keychain)
        try:
            devices = _count_devices(connection)
            connection.name_length = length
            if _takes_names(connection):
                connection.greeted()
                return connection, devices
        except BaseException:
            connection.close()
            raise
    raise ConnectionFailed(
        str(endpoint),
        f"the server refuses tensors with names of {', '.join(map(str, lengths))} bytes; "
        "if it was built with another GGML_MAX_NAME, give that as the name length",
    )


def greet(endpoint: Endpoint, timeouts: Timeouts, keychain: Keychain) -> Connection:
    """By key where we have one; else the newer HELLO, then the older one."""
    credentials = keychain.credentials(endpoint)
    if credentials:
        return _greet_by_key(endpoint, timeouts, credentials, keychain)
    for offer in (CAPABILITIES, None):
        sock = _connect(endpoint, timeouts)
        try:
            reply = _hello(endpoint, sock, offer)
            if reply is not None:
                return _connection(endpoint, sock, reply, timeouts)
        except BaseException:
            sock.close()
            raise
        sock.close()
    raise ConnectionFailed(str(endpoint), "the server hangs up on HELLO: is it an RPC server?")


def _greet_by_key(
    endpoint: Endpoint, timeouts: Timeouts, credentials: list[Credential], keychain: Keychain
) -> Connection:
    """In TLS, to a server that proves who it is. Nothing is said to any other."""
    sock = _connect(endpoint, timeouts)
    try:
        sock = encrypted = secured(endpoint, sock)
        try:
            credential = show_key(endpoint, encrypted, credentials, lambda size: _receive(encrypted, size))
        except OSError as error:
            raise ConnectionFailed(str(endpoint), f"it was to prove who it is: {_reason(error)}") from error
        except RemoteProtocolError as error:
            raise RemoteProtocolError(f"{endpoint}: {error}") from error
        reply = _hello(endpoint, encrypted, CAPABILITIES)
        if reply is None:
            raise ConnectionFailed(str(endpoint), "the server knows our key, and hangs up on HELLO; its log says why")
        connection = _connection(endpoint, encrypted, reply, timeouts)
    except BaseException:
        sock.close()
        raise
    keychain.accepted(endpoint, credential.key, credential.fingerprint or b"")
    return connection


def _hello(endpoint: Endpoint, sock: socket.socket, offer: Capability | None) -> HelloReply | None:
    """The server's answer; None when it hangs up."""
    try:
        _send_all(sock, [hello.encode_hello(offer)])
        return framing.drive(hello.read_hello_reply(), lambda size: _receive(sock, size))
    except TimeoutError as error:
        raise ConnectionFailed(
            str(endpoint), "no answer to HELLO: the server is busy with another client, or is no RPC server"
        ) from error
    except HANGS_UP:
        return None
    except OSError as error:
        raise ConnectionFailed(str(endpoint), _reason(error)) from error
    except RemoteProtocolError as error:
        raise RemoteProtocolError(f"{endpoint}: {error}") from error


def _connection(endpoint: Endpoint, sock: socket.socket, reply: HelloReply, timeouts: Timeouts) -> Connection:
    version = ".".join(map(str, reply.version))
    if Capability.LOCKED in reply.capabilities:
        raise KeyNeeded(
            str(endpoint), "clients on other machines need a key: give the one that rpc-server prints with --rpc-key"
        )
    dialect = dialects.for_server(reply.version)
    if dialect is None:
        raise VersionMismatch(str(endpoint), version, ", ".join(dialects.dialects()))
    return Connection(endpoint, sock, dialect, version, reply.capabilities, timeouts)


def _count_devices(connection: Connection) -> int:
    try:
        count: int = connection.call(messages.DeviceCount(), "asking for its devices").device_count
    except Refused as refused:
        raise refused.meant() from refused
    if count == 0:
        raise ConnectionFailed(str(connection.endpoint), "the server offers no device")
    if count > MAX_DEVICES:
        raise RemoteProtocolError(f"{connection.endpoint}: {count:,} devices; at most {MAX_DEVICES} are believed")
    return count


def _takes_names(connection: Connection) -> bool:
    """Whether the server takes records of this connection's name length; if not, the connection is over."""
    if connection.capabilities != NATIVE:
        return True
    one = Record(id=1, type=connection.dialect.type_numbers["F32"], ne=(1, 1, 1, 1), nb=(4, 4, 4, 4))
    question = messages.GetAllocSize(0, one, (Record(),) * 10)
    try:
        connection.call(question, "finding the length of its names")
    except ConnectionLost as lost:
        if isinstance(lost.__cause__, HANGS_UP):
            return False
        raise
    return True


def _connect(endpoint: Endpoint, timeouts: Timeouts) -> socket.socket:
    try:
        sock = socket.create_connection((endpoint.host, endpoint.port), timeouts.connect)
    except (OSError, UnicodeError) as error:
        raise ConnectionFailed(str(endpoint), f"nobody answers ({_reason(error)}){_hint(endpoint, error)}") from error
    prepare(sock, timeouts.dead)
    return sock


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return GONE if error.errno == errno.ETIMEDOUT else "no answer in time"  # the system's own, or ours
    if isinstance(error, HANGS_UP):
        return "the server hung up"
    return getattr(error, "strerror", None) or str(error)


def _hint(endpoint: Endpoint, error: Exception) -> str:
    """What may be the matter when a machine refuses the connection."""
    if not isinstance(error, ConnectionRefusedError):
        return ""
    if endpoint.host == "localhost" or endpoint.host.startswith("127.") or endpoint.host == "::1":
        return "; is rpc-server running, on this port?"
    return (
        "; rpc-server listens on its own machine only unless it is told another address: start it there with "
        "-H 0.0.0.0, which prints the key that this machine needs"
    )


def _at_once(_: float) -> None:
    """Who waits no longer than the socket does."""
    raise TimeoutError


def _send_all(sock: socket.socket, buffers: Sequence[Bytes], wait: Silence = _at_once) -> None:
    """Send buffers one after the other without joining them. ``wait`` is called with the seconds without room for a
    byte, each time that the socket's own patience is over, and may end it."""
    views = [memoryview(buffer).cast("B") for buffer in buffers if framing.byte_length(buffer)]
    # TLS takes one at a time, and so does Windows
    together = hasattr(sock, "sendmsg") and not isinstance(sock, ssl.SSLSocket)
    if not together and sum(map(len, views)) <= _JOIN_BELOW:
        views = [memoryview(b"".join(views))] if views else []
    since = time.monotonic()
    while views:
        try:
            sent = sock.sendmsg(views[:MAX_BUFFERS_PER_SEND]) if together else sock.send(views[0][:_AT_ONCE])
        except TimeoutError as error:
            if error.errno:  # the system gave up
                raise
            wait(time.monotonic() - since)
            continue
        since = time.monotonic()
        while views and sent >= len(views[0]):
            sent -= len(views.pop(0))
        if sent:
            views[0] = views[0][sent:]


def _receive(sock: socket.socket, size: int, wait: Silence = _at_once) -> Bytes:
    data = bytearray(size)
    _receive_into(sock, memoryview(data), wait)
    return data


def _receive_into(sock: socket.socket, view: memoryview, wait: Silence = _at_once) -> None:
    """Fill ``view``. ``wait``: as in :func:`_send_all`, of seconds without a byte."""
    since = time.monotonic()
    while view:
        try:
            got = sock.recv_into(view)
        except TimeoutError as error:
            if error.errno:  # the system gave up
                raise
            wait(time.monotonic() - since)
            continue
        if not got:
            raise ConnectionResetError("the server hung up")
        since = time.monotonic()
        view = view[got:]
