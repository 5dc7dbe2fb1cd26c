"""Where the data of tensors goes while it comes: to its device, and to the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import Lock
from types import TracebackType
from typing import NamedTuple

from ..device import Receive, parts
from .client_cache import CacheWriter
from .places import Place
from .session import Session


class Incoming:
    """``place`` of a client's memory, which gets its data piece by piece (:func:`take`), in any order and from any
    thread. To be entered before the first piece: what came is kept in the cache when all did, if the client may ask for
    it again. ``window``: the device's own memory, where that can be had; else the device is to ``receive``."""

    def __init__(self, session: Session, place: Place, receive: Receive) -> None:
        region, self.start, self._left = place
        self._session, self._place = session, place
        self.receive = receive
        self.window = session.devices[region.device].window(region.buffer, self.start, place.size)
        self._lock, self._begun = Lock(), False
        self._writer: CacheWriter | None = None

    def keep(self, at: int, data: memoryview) -> None:
        """``data`` is what came from ``at`` on: for the cache."""
        writer = self._opened()
        if writer is not None:
            writer.feed(at, data)

    def came(self, size: int) -> None:
        """So many bytes more are where they belong."""
        with self._lock:
            self._left -= size
            if not self._left:
                self._close(complete=True)

    def __enter__(self) -> Incoming:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close(complete=False)
        if kind is None:
            self._session.received(self._place)

    def _opened(self) -> CacheWriter | None:
        """The file in the cache, which is open only while data comes: there may be many targets at once."""
        with self._lock:
            if not self._begun:
                self._begun, self._writer = True, self._session.writer(self._place)
            return self._writer

    def _close(self, complete: bool) -> None:
        if self._writer is not None:
            self._writer.finish(complete)
            self._writer = None


@contextmanager
def receiving(session: Session, places: Sequence[Place]) -> Iterator[list[Incoming]]:
    """What comes to ``places``, all of one buffer."""
    region = places[0].region
    with ExitStack() as stack:
        wanted = [(place.offset, place.size) for place in places]
        receive = stack.enter_context(session.devices[region.device].receiving(region.buffer, wanted))
        yield [stack.enter_context(Incoming(session, place, receive)) for place in places]


class Part(NamedTuple):
    """``size`` bytes of what ``target`` gets, from ``at`` on."""

    target: Incoming
    at: int
    size: int


def take(wanted: Sequence[Part], read: Callable[[memoryview], None]) -> None:
    """Let ``read`` put what comes for ``wanted``, one behind the other, into memory: at most
    :data:`sdrpc.content.PIECE` bytes, for targets of one :func:`receiving`."""
    first = wanted[0].target

    def fill(memory: memoryview) -> None:
        read(memory)
        for part, data in zip(wanted, parts(memory, [part.size for part in wanted]), strict=True):
            part.target.keep(part.at, data)

    if first.window is None:
        first.receive([(part.target.start + part.at, part.size) for part in wanted], fill)
    else:
        for target, at, size in wanted:
            assert target.window is not None  # noqa: S101
            memory = target.window[at : at + size]
            read(memory)
            target.keep(at, memory)
    for part in wanted:
        part.target.came(part.size)
