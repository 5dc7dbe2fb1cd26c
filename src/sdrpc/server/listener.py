"""Listening: accept clients up to a limit, give each a thread, end all of them cleanly."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import selectors
import socket
import threading
import time
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import NamedTuple

from ..device import ServedDevice
from ..ggml.dialect import Dialect, newest
from ..sockets import listen
from ..wire.refusals import Refusal
from .carriers import Expected
from .client_cache import CacheService
from .door import Door
from .handler import converse
from .limits import Limits
from .live import Live
from .negotiation import Fixed, Protocol
from .quotas import Accounts, Buffers, Payloads
from .session import Session
from .stream import Stream
from .version_memory import normal

log = logging.getLogger(__name__)

_REVOKE_SECONDS = 1.0  # how often it is looked whether keys of clients were revoked, and machines are there
_JOIN_SECONDS = 1.0  # how long threads may take to end; a kernel that runs then dies with the process
_DOORKEEPERS = 16  # threads that tell clients that all places are taken; when they are busy, clients are not told
_QUIET_SECONDS = 1.0  # between two requests of a client that is at work lies less
_STOPPING = Refusal("stopping", "this server is stopping")
_REST_SECONDS = 0.1  # after something went wrong with a connection for which others are not to blame


class Client(NamedTuple):
    """A connection and what its client has."""

    stream: Stream
    session: Session


class Server:
    """Offers ``devices`` (numbered in that order) at ``host``:``port`` (0: a free one) to whoever connects and speaks
    ``protocol``: one version (default: the newest), or what is learnt about each client. ``door`` says who is let in
    (default: only who comes from this machine). Tensors that clients may send again are kept in ``cache_service``, if
    there is one.

    As a context manager it serves in a thread of its own; :meth:`serve` does so in the caller's. The devices and
    the cache service stay the caller's to close. Raises :class:`UsageError` when it can't listen there.
    """

    def __init__(
        self,
        devices: Sequence[ServedDevice],
        protocol: Protocol | Dialect | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        limits: Limits | None = None,
        cache_service: CacheService | None = None,
        door: Door | None = None,
    ) -> None:
        self.devices, self.limits, self.cache_service = tuple(devices), limits or Limits(), cache_service
        self.protocol = protocol if isinstance(protocol, Protocol) else Fixed(protocol or newest())
        self.door = door or Door(limits=self.limits)
        self._listening = listen(host, port, self.limits.backlog, "--port")
        self._listening.setblocking(False)
        self.host, self.port = host, self._listening.getsockname()[1]
        self.address = self._listening.getsockname()[0].partition("%")[0]
        self._waker, self._wakened = socket.socketpair()
        self._closing = threading.Event()
        self._grace = 0.0
        self._doorkeepers = threading.Semaphore(_DOORKEEPERS)
        self._lock = threading.Lock()
        self._clients: dict[threading.Thread, Client] = {}
        self._buffers, self._payloads = Buffers(self.limits), Payloads(self.limits.payload_bytes)
        self._accounts = Accounts(self.limits)
        self._live, self._expected = Live(), Expected()
        self._looked = 0.0
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
        return not ipaddress.ip_address(self.address).is_loopback

    @property
    def clients(self) -> int:
        """How many are connected."""
        with self._lock:
            return len(self._clients)

    def serve(self) -> None:
        """Accept clients until :meth:`stop`; then end every connection and return."""
        try:
            for device in self.devices:
                device.begin_serving()
            with selectors.DefaultSelector() as selector:
                selector.register(self._listening, selectors.EVENT_READ)
                selector.register(self._wakened, selectors.EVENT_READ)
                while not self._closing.is_set():
                    came = selector.select(_REVOKE_SECONDS)
                    try:
                        if came:
                            self._accept()
                        self._expel()
                    except Exception:  # the boundary: whatever happens to one connection, others are served
                        log.exception("a connection is not served: a fault in this server")
                        time.sleep(_REST_SECONDS)
        finally:
            self._end()

    def stop(self, grace: float = 0.0) -> None:
        """Make :meth:`serve` return soon: no new client is let in, and those that are at work have ``grace`` seconds to
        finish. For any thread, and for signal handlers."""
        self._grace = grace
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
            time.sleep(_REST_SECONDS)  # it stays in the backlog; clients that leave make room
            return
        peer = f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}"
        try:
            full = self._full(normal(address[0]))
            if full:
                log.warning("%s: refused, %s", peer, full)
            stream = Stream(connection, peer, normal(address[0]), self.limits, self._payloads)
            if full and not self._doorkeepers.acquire(blocking=False):
                connection.close()
                return
            self._start(stream, full)
        except (OSError, RuntimeError, MemoryError) as error:  # it is gone already; or the system has no room left
            log.warning("%s: refused: %s", peer, error or type(error).__name__)
            connection.close()

    def _full(self, address: str) -> str:
        """Why there is no place for another client at ``address``, if there is none; one that does nothing has to make
        room."""
        with self._lock:
            clients = dict(self._clients)
        alike = {t: client for t, client in clients.items() if client.stream.address == address}
        if len(alike) >= self.limits.connections_of_address and not ipaddress.ip_address(address).is_loopback:
            if self._make_room(alike):
                return ""
            return f"{self.limits.connections_of_address} clients of {address} are connected already"
        if len(clients) >= self.limits.connections and not self._make_room(clients):
            return f"{self.limits.connections} clients are connected already"
        return ""

    def _make_room(self, clients: dict[threading.Thread, Client]) -> bool:
        """End the one of ``clients`` that has done nothing for longest, if it may have to go."""
        now = time.monotonic()
        idle: list[tuple[float, threading.Thread]] = []
        for thread, (stream, session) in clients.items():
            patience = self.limits.idle_seconds if session.requests else self.limits.silent_seconds
            since = stream.idle_since
            if since is not None and now - since >= patience and not session.holds_buffers:
                idle.append((since, thread))
        if not idle:
            return False
        _, thread = min(idle, key=lambda each: each[0])
        with self._lock:
            client = self._clients.pop(thread, None)
        if client is not None:
            client.stream.abort(Refusal("quota", "it did nothing, and another client wants its place"))
        return True

    def _at_work(self) -> bool:
        """Whether a client is in the middle of something. Those that are not are told that it is over."""
        now = time.monotonic()
        with self._lock:
            clients = list(self._clients.values())
        quiet = [c for c in clients if c.stream.idle_since is not None and now - c.stream.idle_since >= _QUIET_SECONDS]
        for client in quiet:
            client.stream.abort(_STOPPING)
        return len(quiet) < len(clients)

    def _expel(self) -> None:
        """End the connections of clients whose key was revoked since the last time, and of those whose machine is
        gone."""
        now = time.monotonic()
        if now - self._looked < _REVOKE_SECONDS:
            return
        self._looked = now
        with self._lock:
            clients = list(self._clients.values())
        for stream, session in clients:
            stream.look()
            visitor = session.visitor
            if visitor is not None and visitor.key is not None and self.door.revoked(visitor.key):
                stream.abort(Refusal("key", f"its key {visitor} was revoked"))

    def _start(self, stream: Stream, full: str) -> None:
        """Give a client its thread; when all is ``full``, only to tell it so."""
        thread = threading.Thread(name=f"sdrpc client {stream.peer}", daemon=True)
        try:
            session = Session(
                self.devices,
                self.limits,
                lambda: _why_stop(stream),
                self.cache_service,
                self._buffers,
                self._accounts,
                self._live,
                self._expected,
            )
            client = Client(stream, session)
            thread.run = partial(self._talk, client, full)  # type: ignore[method-assign]
            if not full:
                with self._lock:
                    self._clients[thread] = client
            thread.start()
        except (RuntimeError, MemoryError):
            self._left(thread, full)
            raise

    def _left(self, thread: threading.Thread, full: str) -> None:
        """A client's place is free again."""
        if full:
            self._doorkeepers.release()
        with self._lock:
            self._clients.pop(thread, None)

    def _talk(self, client: Client, full: str) -> None:
        stream, session = client
        with contextlib.ExitStack() as end:  # what goes wrong with one of them keeps none of the others from being done
            end.callback(stream.close)
            end.callback(self._left, threading.current_thread(), full)
            end.callback(stream.done)
            end.callback(session.close)
            for device in self.devices:
                device.serve_here()
            converse(stream, session, self.protocol, self.door, full)

    def _end(self) -> None:
        self._listening.close()
        until = time.monotonic() + self._grace
        while self._at_work() and time.monotonic() < until:
            time.sleep(_REST_SECONDS)
        with self._lock:
            clients = dict(self._clients)
        for client in clients.values():
            client.stream.abort(_STOPPING)
        until = time.monotonic() + _JOIN_SECONDS
        for thread, client in clients.items():
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                client.stream.cut()
        self._waker.close()
        self._wakened.close()


def _why_stop(stream: Stream) -> str:
    """Why nothing more shall be computed for a client, if so; if not, it is told that we are at it."""
    stream.beat()
    if stream.aborted:
        return stream.aborted.reason
    return "its client is gone" if stream.hung_up() else ""
