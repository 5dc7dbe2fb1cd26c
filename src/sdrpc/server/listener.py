"""Listening: accept clients up to a limit, give each a thread, end all of them cleanly."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import selectors
import socket
import sys
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..ggml.dialect import Dialect, newest
from .client_cache import Library
from .handler import converse
from .limits import Limits
from .negotiation import Fixed, Protocol
from .session import Session
from .stream import Stream
from .version_memory import normal

if TYPE_CHECKING:
    from ..engine.device import LocalDevice

log = logging.getLogger(__name__)

_JOIN_SECONDS = 5.0  # how long threads may take to end; a kernel that runs then dies with the process


class Server:
    """Offers ``devices`` (numbered in that order) at ``host``:``port`` (0: a free one) to whoever connects and speaks
    ``protocol``: one version (default: the newest), or what is learnt about each client.
    Tensors that clients may send again are kept in ``library``, if there is one.

    As a context manager it serves in a thread of its own; :meth:`serve` does so in the caller's. The devices and
    the library stay the caller's to close. Raises :class:`UsageError` when it can't listen there.
    """

    def __init__(
        self,
        devices: Sequence[LocalDevice],
        protocol: Protocol | Dialect | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        limits: Limits | None = None,
        library: Library | None = None,
    ) -> None:
        self.devices, self.limits, self.library = tuple(devices), limits or Limits(), library
        self.protocol = protocol if isinstance(protocol, Protocol) else Fixed(protocol or newest())
        self._listening = _listen(host, port, self.limits.backlog)
        self.host, self.port = host, self._listening.getsockname()[1]
        self._waker, self._wakened = socket.socketpair()
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._clients: dict[threading.Thread, Stream] = {}
        self._thread: threading.Thread | None = None

    @property
    def endpoint(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def dialect(self) -> Dialect:
        """What a client of ours is offered."""
        return self.protocol.dialect

    @property
    def exposed(self) -> bool:
        """Whether other machines can reach it."""
        return not ipaddress.ip_address(self._listening.getsockname()[0].partition("%")[0]).is_loopback

    @property
    def clients(self) -> int:
        """How many are connected."""
        with self._lock:
            return len(self._clients)

    def serve(self) -> None:
        """Accept clients until :meth:`stop`; then end every connection and return."""
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self._listening, selectors.EVENT_READ)
                selector.register(self._wakened, selectors.EVENT_READ)
                while not self._closing.is_set():
                    selector.select()
                    self._accept()
        finally:
            self._end()

    def stop(self) -> None:
        """Make :meth:`serve` return soon. For any thread, and for signal handlers."""
        self._closing.set()
        with contextlib.suppress(OSError):  # it has returned already
            self._waker.send(b"!")

    def __enter__(self) -> Server:
        self._thread = threading.Thread(target=self.serve, name=f"sdrpc {self.endpoint}", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()
        if self._thread is not None:
            self._thread.join()

    def _accept(self) -> None:
        try:
            connection, address = self._listening.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                raise
            log.warning("a connection has to wait: %s", error.strerror)
            time.sleep(0.1)  # it stays in the backlog; clients that leave make room
            return
        peer = f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}"
        if self.clients >= self.limits.connections:
            log.warning("%s: refused, %d clients are connected already", peer, self.limits.connections)
            connection.close()
            return
        try:
            self._start(Stream(connection, peer, normal(address[0]), self.limits.stall_seconds))
        except (OSError, RuntimeError) as error:  # it is gone already; or the system has no thread left
            log.warning("%s: refused: %s", peer, error)
            connection.close()

    def _start(self, stream: Stream) -> None:
        thread = threading.Thread(target=self._talk, args=(stream,), name=f"sdrpc client {stream.peer}", daemon=True)
        with self._lock:
            self._clients[thread] = stream
        try:
            thread.start()
        except RuntimeError:
            with self._lock:
                del self._clients[thread]
            raise

    def _talk(self, stream: Stream) -> None:
        shelf = self.library.shelf(stream.address) if self.library else None
        session = Session(self.devices, self.limits, lambda: "its client is gone" if stream.hung_up() else "", shelf)
        try:
            converse(stream, session, self.protocol)
        finally:
            session.close()
            with self._lock:
                del self._clients[threading.current_thread()]
            stream.close()

    def _end(self) -> None:
        self._listening.close()
        with self._lock:
            clients = dict(self._clients)
        for stream in clients.values():
            stream.abort()
        until = time.monotonic() + _JOIN_SECONDS
        for thread in clients:
            thread.join(max(0.0, until - time.monotonic()))
        self._waker.close()
        self._wakened.close()


def _listen(host: str, port: int, backlog: int) -> socket.socket:
    where = f"{host}:{port}"
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, OverflowError, UnicodeError) as error:
        raise UsageError(f"can't listen on {where}: {_said(error)}") from error
    try:
        if sys.platform != "win32":  # where it would let two servers have the same port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(backlog)
        listening.setblocking(False)
    except (OSError, OverflowError) as error:
        listening.close()
        hint = " (--port 0 picks a free one)" if getattr(error, "errno", 0) == errno.EADDRINUSE else ""
        raise UsageError(f"can't listen on {where}: {_said(error)}{hint}") from error
    return listening


def _said(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
