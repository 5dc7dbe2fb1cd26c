"""Graphs as a client sent them, packed: any of a thousand may have to run again, and not all can be kept compiled."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable

from ..device import Bytes

LEVEL = 1
"""Graphs are mostly zeros: the fastest level packs a UNet's 1.3 MB into 90 kB in a hundredth of a second."""


class PackedGraphs:
    """Graphs of one client by the digests of their bytes: at most ``most`` bytes, packed. ``hold`` counts more of them,
    if they may be had, ``give_up`` fewer. Where there is no room for another, those used longest ago go."""

    def __init__(self, most: int, hold: Callable[[int], bool], give_up: Callable[[int], None]) -> None:
        self._most, self._hold, self._give_up = most, hold, give_up
        self._graphs: OrderedDict[bytes, bytes] = OrderedDict()
        self.held = 0

    def put(self, digest: bytes, payload: Bytes) -> None:
        """Keep ``payload``, which has this ``digest``, if it can be."""
        if digest in self._graphs:
            self._graphs.move_to_end(digest)
            return
        packed = zlib.compress(payload, LEVEL)
        size = len(packed)
        if size > self._most:
            return
        while self.held + size > self._most or not self._hold(size):
            if not self._graphs:
                return
            self._drop(next(iter(self._graphs)))
        self._graphs[digest] = packed
        self.held += size

    def get(self, digest: bytes) -> bytes | None:
        """The graph with this ``digest``, if it is there."""
        if digest not in self._graphs:
            return None
        self._graphs.move_to_end(digest)
        return zlib.decompress(self._graphs[digest])

    def retain(self, digests: Iterable[bytes]) -> None:
        """Only these can be asked for again."""
        for digest in self._graphs.keys() - set(digests):
            self._drop(digest)

    def _drop(self, digest: bytes) -> None:
        size = len(self._graphs.pop(digest))
        self.held -= size
        self._give_up(size)
