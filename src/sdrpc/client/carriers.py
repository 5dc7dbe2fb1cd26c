"""Further connections to a server, which carry data for the first one (:mod:`sdrpc.wire.carrying`).

They are there while an upload lasts. Each has a thread, which leaves the GIL to the others while it sends.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial

from ..device import Silence
from ..errors import RemoteProtocolError, SdrpcError
from ..wire.carrying import dealt
from ..wire.messages import Carry, GetCarriersReply
from .connection import LOOK_SECONDS, Connection

log = logging.getLogger(__name__)

MOST = 4
LEAST_BYTES = 64 << 20
"""Of an upload: below, opening connections takes longer than they spare."""


class Carriers:
    """``connections`` that carry data for another one. Close them when done."""

    def __init__(self, connections: Sequence[Connection]) -> None:
        self._connections = connections
        self._pool = ThreadPoolExecutor(len(connections), thread_name_prefix="sdrpc-carrier")

    def __len__(self) -> int:
        return len(self._connections)

    def send(self, data: Sequence[Sequence[memoryview]], watch: Silence) -> None:
        """Send ranges' bytes, given as views one behind the other. ``watch``: as
        :meth:`sdrpc.device.Device.watched`, while no carrier gets on. Raises :class:`ConnectionLost`."""
        silences: dict[Connection, float] = {}
        under_way = []
        try:
            hands = dealt([_size(each) for each in data], len(self))
            for connection, hand in zip(self._connections, hands, strict=True):
                views = [view for number, at, size in hand for view in _cut(data[number], at, at + size)]
                connection.watch = partial(silences.__setitem__, connection)
                under_way.append(self._pool.submit(connection.carry, views))
            while (state := wait(under_way, LOOK_SECONDS, FIRST_EXCEPTION)).not_done:
                for each in state.done:
                    each.result()
                if len(silences) == len(state.not_done):
                    watch(min(silences.values()))
                silences.clear()
            for each in under_way:
                each.result()
        except BaseException:
            self.close()
            raise
        finally:
            under_way.clear()

    def close(self) -> None:
        for connection in self._connections:
            connection.cut()
        self._pool.shutdown()
        for connection in self._connections:
            connection.close()


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
