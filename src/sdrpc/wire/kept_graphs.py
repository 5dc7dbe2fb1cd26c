"""Which graphs a server keeps: a set that client and server count alike, each for itself, without a word about it.

Up to protocol 7.x a device's last graph is kept (as uid 0). From 8.0 on a client numbers its graphs, and a server
keeps up to :data:`MOST` of each device; when one more comes, both begin anew. What is lost before, because a buffer was
freed, keeps its place in the count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

MOST = 1024
"""GRAPH_CACHE_MAX (ggml-rpc.cpp): graphs of a device."""

T = TypeVar("T")


class KeptGraphs(Generic[T]):
    """A value for each graph, by device and uid."""

    def __init__(self) -> None:
        self._devices: dict[int, dict[int, T | None]] = {}

    def __iter__(self) -> Iterator[T]:
        return (value for graphs in self._devices.values() for value in graphs.values() if value is not None)

    def get(self, device: int, uid: int) -> T | None:
        """The value of a graph that is kept; None of one that is not."""
        return self._devices.get(device, {}).get(uid)

    def put(self, device: int, uid: int, value: T) -> list[T]:
        """A graph came with its bytes. Gives the values of those that are not kept any more."""
        graphs = self._devices.setdefault(device, {})
        gone: list[T | None] = []
        if len(graphs) >= MOST:
            gone = list(graphs.values())
            graphs.clear()
        gone.append(graphs.pop(uid, None))
        graphs[uid] = value
        return [one for one in gone if one is not None]

    def drop(self, lost: Callable[[T], bool]) -> list[T]:
        """Keep the values no more for which ``lost`` is true; gives them."""
        gone: list[T] = []
        for graphs in self._devices.values():
            for uid, value in graphs.items():
                if value is not None and lost(value):
                    graphs[uid] = None
                    gone.append(value)
        return gone
