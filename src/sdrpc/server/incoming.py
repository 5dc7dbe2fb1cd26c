"""Where the data of a tensor goes while it comes: to its device, and to the cache."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from types import TracebackType

from .client_cache import CacheWriter
from .places import Place
from .session import Session


class Incoming:
    """``place`` of a client's memory, which gets its data piece by piece, in any order and from any thread. To be
    entered before the first piece: what came is kept in the cache when all did, if the client may ask for it again.
    ``window``: the device's own memory, where that can be had."""

    def __init__(self, session: Session, place: Place) -> None:
        region, self._start, self._left = place
        self._session, self._place = session, place
        self._device, self._buffer = session.devices[region.device], region.buffer
        self.window = self._device.window(self._buffer, self._start, place.size)
        self._lock, self._begun = Lock(), False
        self._writer: CacheWriter | None = None

    def take(self, at: int, size: int, read: Callable[[memoryview], None]) -> None:
        """Let ``read`` put ``size`` bytes (:data:`sdrpc.content.PIECE`, or the rest) from ``at`` on into memory."""
        writer = self._opened()

        def fill(memory: memoryview) -> None:
            read(memory)
            if writer is not None:
                writer.feed(at, memory)

        if self.window is None:
            self._device.receive(self._buffer, self._start + at, size, fill)
        else:
            fill(self.window[at : at + size])
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
