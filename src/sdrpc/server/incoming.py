"""Where the data of tensors goes while it comes: to its device, and to the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import Lock
from types import TracebackType
from typing import NamedTuple

from ..content import SMALLEST, digest
from ..device import Receive
from .client_cache import CacheWriter
from .finder import Finder
from .places import Place
from .session import Session

HASHED = 1 << 15
"""Bytes of what is called by its digest as soon as it is here: to read it again later, from an accelerator, would take
far longer."""


class Incoming:
    """``place`` of a client's memory, which gets its data piece by piece (:func:`take`), in any order and from any
    thread. To be entered before the first piece: what came is kept in the cache when all did, if the client may ask for
    it again."""

    def __init__(self, finder: Finder, place: Place, receive: Receive) -> None:
        _, self.start, self._left = place
        self._finder, self._place = finder, place
        self.receive = receive
        self._lock, self._begun = Lock(), False
        self._writer: CacheWriter | None = None
        self._digest: bytes | None = None

    def keep(self, at: int, data: memoryview) -> None:
        """``data`` is what came from ``at`` on: for the cache, and for others who may ask for it."""
        if SMALLEST <= len(data) == self._place.size <= HASHED:
            self._digest = digest(data)
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
            self._finder.received(self._place, self._digest)

    def _opened(self) -> CacheWriter | None:
        """The file in the cache, which is open only while data comes: there may be many targets at once."""
        with self._lock:
            if not self._begun:
                self._begun, self._writer = True, self._finder.writer(self._place)
            return self._writer

    def _close(self, complete: bool) -> None:
        if self._writer is not None:
            self._writer.finish(complete)
            self._writer = None


@contextmanager
def receiving(session: Session, places: Sequence[Place], ahead: bool = False) -> Iterator[list[Incoming]]:
    """What comes to ``places``, all of one buffer. ``ahead``: see :meth:`sdrpc.device.ServedDevice.receiving`."""
    region = places[0].region
    with ExitStack() as stack:
        wanted = [(place.offset, place.size) for place in places]
        receive = stack.enter_context(session.devices[region.device].receiving(region.buffer, wanted, ahead))
        yield [stack.enter_context(Incoming(session.finder, place, receive)) for place in places]


class Part(NamedTuple):
    """``size`` bytes of what ``target`` gets, from ``at`` on."""

    target: Incoming
    at: int
    size: int


def take(wanted: Sequence[Part], read: Callable[[memoryview], None]) -> None:
    """Let ``read`` put what comes for ``wanted``, one behind the other, into memory: at most
    :data:`sdrpc.content.PIECE` bytes, for targets of one :func:`receiving`."""
    left = iter(wanted)

    def fill(memory: memoryview) -> None:
        read(memory)
        while memory:
            target, at, size = next(left)
            target.keep(at, memory[:size])
            memory = memory[size:]

    wanted[0].target.receive([(part.target.start + part.at, part.size) for part in wanted], fill)
    for part in wanted:
        part.target.came(part.size)
