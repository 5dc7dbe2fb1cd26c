"""Further connections to a server, which carry data for the first one (:mod:`sdrpc.wire.carrying`).

They are there while an upload lasts. Each has a thread, which leaves the GIL to the others while it sends.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import NamedTuple

from ..device import Silence
from ..errors import RemoteProtocolError, SdrpcError
from ..wire.carrying import dealt
from ..wire.messages import Carry, GetCarriersReply
from .connection import LOOK_SECONDS, Connection

log = logging.getLogger(__name__)

MOST = 4
LEAST_BYTES = 64 << 20
"""Of an upload: below, opening connections takes longer than they spare."""
AHEAD = 1
"""Loads that are on their way when the next one is given to the carriers: none of them has nothing to do then."""


class Load(NamedTuple):
    """What was given to all carriers together: what each does, and whom to tell when it is done."""

    work: list[Future[None]]
    sent: Callable[[], None]


class Carriers:
    """``connections`` that carry data for another one. Close them when done."""

    def __init__(self, connections: Sequence[Connection]) -> None:
        self._connections = connections
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix="sdrpc-carrier") for _ in connections]
        self._under_way: deque[Load] = deque()
        self._sent: deque[Callable[[], None]] = deque()
        self._silences: dict[Connection, float] = {}
        for connection in connections:
            connection.watch = partial(self._silences.__setitem__, connection)

    def __len__(self) -> int:
        return len(self._connections)

    @property
    def busy(self) -> bool:
        return bool(self._under_way)

    def send(self, data: Sequence[Sequence[memoryview]], sent: Callable[[], None], watch: Silence) -> None:
        """Send ranges' bytes, given as views one behind the other; ``sent`` is for :meth:`tell` when they are, mostly
        after this returns. ``watch``: as :meth:`sdrpc.device.Device.watched`, while no carrier gets on. Raises
        :class:`ConnectionLost`, also for what was given before."""
        hands = dealt([_size(each) for each in data], len(self))
        work = []
        for connection, thread, hand in zip(self._connections, self._threads, hands, strict=True):
            views = [view for number, at, size in hand for view in _cut(data[number], at, at + size)]
            work.append(thread.submit(connection.carry, views))
        self._under_way.append(Load(work, sent))
        self.finish(watch, AHEAD)

    def finish(self, watch: Silence, left: int = 0) -> None:
        """Wait until at most ``left`` loads are on their way."""
        try:
            while len(self._under_way) > left:
                load = self._under_way[0]
                state = wait(load.work, LOOK_SECONDS, FIRST_EXCEPTION)
                for each in state.done:
                    each.result()
                if not state.not_done:
                    self._sent.append(self._under_way.popleft().sent)
                    continue
                at_work = [self._silences.get(connection) for connection in self._at_work()]
                silent = [seconds for seconds in at_work if seconds is not None]
                if silent and len(silent) == len(at_work):
                    watch(min(silent))
                self._silences.clear()
        except BaseException:
            self.close()
            raise

    def tell(self) -> None:
        """Tell those whose data was sent."""
        while self._sent:
            self._sent.popleft()()

    def _at_work(self) -> list[Connection]:
        """Those of which something is awaited."""
        work = [load.work for load in self._under_way]
        return [
            connection
            for connection, mine in zip(self._connections, zip(*work, strict=True), strict=True)
            if not all(each.done() for each in mine)
        ]

    def close(self) -> None:
        for connection in self._connections:
            connection.cut()
        for thread in self._threads:
            thread.shutdown(cancel_futures=True)
        for connection in self._connections:
            connection.close()
        self._under_way.clear()


def opened(reply: GetCarriersReply, another: Callable[[], Connection]) -> Carriers | None:
    """The carriers that a server lets come, made by ``another``; None where there can't be two."""
    connections: list[Connection] = []
    try:
        while len(connections) < reply.carriers > 1:
            connections.append(another())
            number = connections[-1].call(Carry(reply.token), "becoming a carrier").number
            if number != len(connections) - 1:  # its data would get to other places
                raise RemoteProtocolError(f"carrier {len(connections) - 1} is called {number}")
            connections[-1].greeted()
    except SdrpcError as error:
        log.info("data goes over one connection: %s", error)
        for connection in connections:
            connection.close()
        return None
    return Carriers(connections) if connections else None


def _size(views: Sequence[memoryview]) -> int:
    return sum(map(len, views))


def _cut(views: Sequence[memoryview], start: int, end: int) -> list[memoryview]:
    """Bytes ``start`` to ``end`` of ``views``."""
    found, at = [], 0
    for view in views:
        part = view[max(start - at, 0) : max(end - at, 0)]
        if part:
            found.append(part)
        at += len(view)
    return found
