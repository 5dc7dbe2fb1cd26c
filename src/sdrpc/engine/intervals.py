"""A map from byte ranges to their last writers."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator


class Intervals:
    """Disjoint half-open ranges, each with a writer; bytes that were not written have none."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._entries: list[tuple[int, int]] = []  # (end, writer), parallel to _starts

    def assign(self, start: int, end: int, writer: int | None) -> None:
        """Make ``writer`` the last writer of ``[start, end)``; None forgets who it was."""
        if start >= end:
            return
        first = bisect_right(self._starts, start) - 1
        if first < 0 or self._entries[first][0] <= start:
            first += 1
        last = bisect_left(self._starts, end)
        new: list[tuple[int, int, int]] = []
        if first < last:
            head_end, head = self._entries[first]
            if self._starts[first] < start:
                new.append((self._starts[first], min(head_end, start), head))
        if writer is not None:
            new.append((start, end, writer))
        if first < last:
            tail_end, tail = self._entries[last - 1]
            if tail_end > end:
                new.append((end, tail_end, tail))
        self._starts[first:last] = [s for s, _, _ in new]
        self._entries[first:last] = [(e, w) for _, e, w in new]

    def writers(self, start: int, end: int) -> list[int | None]:
        """The last writers of the bytes ``[start, end)``, in order of address; None for each gap that was not
        written."""
        found: list[int | None] = []
        at = start
        i = max(bisect_right(self._starts, start) - 1, 0)
        while i < len(self._starts) and self._starts[i] < end:
            begin, (stop, writer) = self._starts[i], self._entries[i]
            i += 1
            if stop <= start:
                continue
            if begin > at:
                found.append(None)
            found.append(writer)
            at = stop
        if at < end:
            found.append(None)
        return found

    def touches(self, start: int, end: int) -> bool:
        """Whether somebody wrote any of the bytes ``[start, end)``."""
        i = bisect_left(self._starts, end) - 1
        return i >= 0 and self._entries[i][0] > start and start < end

    def __iter__(self) -> Iterator[int]:
        """Every writer of at least one byte."""
        return iter({writer for _, writer in self._entries})
