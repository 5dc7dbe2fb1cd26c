"""What all clients of a server have together, so that none of them, nor many of one owner, can take everything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from threading import Lock

from .limits import Limits


class Payloads:
    """Bytes of graphs that are on their way, which are held until they are whole. ``most`` of all clients together,
    half of it of those of one owner. For any thread."""

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, Lock()
        self._held: Counter[str] = Counter()

    def take(self, owner: str, size: int) -> bool:
        """Count ``size`` more bytes, if they may be held."""
        with self._lock:
            if self._held.total() + size > self._most or self._held[owner] + size > self._most // 2:
                return False
            self._held[owner] += size
            return True

    def give_back(self, owner: str, size: int) -> None:
        with self._lock:
            self._held[owner] -= size
            if not self._held[owner]:
                del self._held[owner]


class Places:
    """Connections of each owner (:attr:`sdrpc.server.visitor.Visitor.owner`), ``most`` of them. For any thread."""

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, Lock()
        self._taken: Counter[str] = Counter()

    def take(self, owner: str) -> bool:
        """Count one more, if there may be one."""
        with self._lock:
            if self._taken[owner] >= self._most:
                return False
            self._taken[owner] += 1
            return True

    def give_back(self, owner: str) -> None:
        with self._lock:
            self._taken[owner] -= 1
            if not self._taken[owner]:
                del self._taken[owner]


class Buffers:
    """How many buffers all clients have, and of how many bytes. For any thread."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._lock = limits, Lock()
        self.count = self.held = 0

    def take(self, size: int, allocate: Callable[[], object]) -> bool:
        """Count a buffer of ``size`` bytes and ``allocate`` it, if it may be had. What that raises goes through."""
        with self._lock:
            if self.count >= self._limits.buffers_of_all or self.held + size > self._limits.bytes_of_all:
                return False
            self.count += 1
            self.held += size
        try:
            allocate()
        except BaseException:
            self.give_back(size)
            raise
        return True

    def give_back(self, size: int) -> None:
        with self._lock:
            self.count -= 1
            self.held -= size
