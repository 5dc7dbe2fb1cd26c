"""Memory for graphs, for devices that want to be told where everything is.

Values share memory when no moment needs both. What is flagged OUTPUT is kept from when it is computed to the end;
leaves, and nodes that already have a place, are not touched.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from .tensor import Graph, Tensor, rewrite, root


class Placed(NamedTuple):
    """A graph whose nodes all live somewhere, and the bytes that the buffer for them needs."""

    graph: Graph
    size: int


class LaidOut(NamedTuple):
    """Where things lie one after the other, and where they end."""

    offsets: tuple[int, ...]
    size: int


def place(graph: Graph, alignment: int, buffer: int) -> Placed:
    """Give every node without a buffer a place in ``buffer`` (its key), at multiples of ``alignment`` bytes.

    Names for bytes go where their bytes are. Offsets are assigned in the order of execution, each value into the
    smallest gap that holds it.
    """
    room = _Room(alignment)
    outputs = {root(node)[0] for node in graph.nodes if node.is_output}
    places: dict[Tensor, tuple[int, int]] = {}
    for node, dying in zip(graph.nodes, last_uses(graph), strict=True):
        if not node.buffer and node.view_src is None:
            places[node] = buffer, room.take(node.nbytes)
        for value in dying:
            if value not in outputs:
                room.give(places[value][1], value.nbytes)
    return Placed(bind(graph, places), room.end)


def bind(graph: Graph, places: Mapping[Tensor, tuple[int, int]]) -> Graph:
    """The graph with these leaves and nodes put at (buffer, offset), and all names for their bytes with them."""

    def moved(tensor: Tensor) -> dict[str, int]:
        owner, shift = root(tensor)
        if owner not in places:
            return {}
        buffer, offset = places[owner]
        return {"buffer": buffer, "offset": offset + shift}

    return rewrite(graph, moved)


def lay_out(sizes: Iterable[int], alignment: int) -> LaidOut:
    """Things of these ``sizes`` in bytes, one after the other at multiples of ``alignment``."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += aligned(size, alignment)
    return LaidOut(tuple(offsets), end)


def aligned(size: int, alignment: int) -> int:
    """``size`` rounded up to a multiple of ``alignment``."""
    return -(-size // alignment) * alignment


def last_uses(graph: Graph) -> list[list[Tensor]]:
    """Per node the values in no buffer that nothing reads after it, under any of their names."""
    last = {node: i for i, node in enumerate(graph.nodes) if not node.buffer and node.view_src is None}
    for position, node in enumerate(graph.nodes):
        for tensor in (*node.src, node):
            if tensor is not None and (owner := root(tensor)[0]) in last:
                last[owner] = position
    dying: list[list[Tensor]] = [[] for _ in graph.nodes]
    for value, position in last.items():
        dying[position].append(value)
    return dying


class _Room:
    """Memory that grows at its end. ``gaps`` are free ranges (offset, size) below it, never adjacent to each other."""

    def __init__(self, alignment: int) -> None:
        self.alignment = alignment
        self.end = 0
        self.gaps: list[tuple[int, int]] = []

    def take(self, size: int) -> int:
        size = aligned(size, self.alignment)
        fitting = [gap for gap in self.gaps if gap[1] >= size]
        if fitting:
            gap = min(fitting, key=lambda g: (g[1], g[0]))
            self.gaps.remove(gap)
            if gap[1] > size:
                insort(self.gaps, (gap[0] + size, gap[1] - size))
            return gap[0]
        offset = self.end
        if self.gaps and sum(self.gaps[-1]) == self.end:  # the last gap reaches the end: only the rest is new
            offset = self.gaps.pop()[0]
        self.end = offset + size
        return offset

    def give(self, offset: int, size: int) -> None:
        size = aligned(size, self.alignment)
        at = bisect_left(self.gaps, (offset, 0))
        if at < len(self.gaps) and self.gaps[at][0] == offset + size:
            size += self.gaps.pop(at)[1]
        if at and sum(self.gaps[at - 1]) == offset:
            offset, before = self.gaps.pop(at - 1)
            size += before
        insort(self.gaps, (offset, size))
