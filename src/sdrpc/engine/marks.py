"""Which bytes of a buffer are still those that came, and what they are."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Hashable

from sdrpc.device import Mark


class Marks:
    """The marks of one buffer: disjoint ranges that nobody has written to since."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._marks: list[Mark] = []

    def __len__(self) -> int:
        return len(self._marks)

    def add(self, start: int, end: int) -> Mark:
        self.write(start, end)
        mark = Mark(start, end)
        i = bisect_left(self._starts, start)
        self._starts.insert(i, start)
        self._marks.insert(i, mark)
        return mark

    def write(self, start: int, end: int | None) -> None:
        """Bytes ``[start, end)`` are written, by default all from ``start`` on."""
        touched = self._touched(start, end)
        for mark in self._marks[touched]:
            mark.written = True
        del self._starts[touched], self._marks[touched]

    def move(self, start: int, end: int, moved: bool) -> None:
        for mark in self._marks[self._touched(start, end)]:
            mark.moved, mark.name = moved, None

    def _touched(self, start: int, end: int | None) -> slice:
        first = max(bisect_right(self._starts, start) - 1, 0)
        if first < len(self._marks) and self._marks[first].end <= start:
            first += 1
        return slice(first, len(self._starts) if end is None else bisect_left(self._starts, end))

    def content(self, start: int, end: int) -> Hashable | None:
        """What bytes ``[start, end)`` are: where they begin in which named bytes, one behind the other."""
        i = bisect_right(self._starts, start) - 1
        if i < 0:
            return None
        within, at, names = start - self._starts[i], self._starts[i], []
        for mark in self._marks[i:]:
            if mark.start != at or mark.name is None:
                return None
            names.append(mark.name)
            at = mark.end
            if at >= end:
                return within, tuple(names)
        return None
