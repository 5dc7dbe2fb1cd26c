"""What all clients of a server have together, so that none of them, nor many of one owner, can take everything."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock

from ..errors import OverQuota
from .limits import Limits

NO_DEVICE = -1
"""Where the graphs of a client are that are kept for it."""
REMEMBERED = 1024
"""Accounts without a connection that are remembered for what was computed for them."""


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


class Account:
    """What the connections of one client have together, made by :class:`Accounts`. For any thread."""

    def __init__(self, name: str, limits: Limits) -> None:
        self.name = name
        self.connections = self.buffers = self.running = 0
        self.spent = Spent(limits.compute_window)
        self._limits, self._lock = limits, Lock()
        self._held: Counter[int] = Counter()

    def held(self, device: int) -> int:
        """Bytes of its buffers on a device."""
        return self._held[device]

    @property
    def full(self) -> bool:
        """Whether it may have no more buffers."""
        return self.buffers >= self._limits.buffers

    def take(self, device: int, size: int, share: int) -> bool:
        """Count a buffer of ``size`` bytes, if there may be one more, and ``share`` bytes on that device."""
        with self._lock:
            total = self._held.total() + size
            if self.full or total > self._limits.buffer_bytes:
                return False
            if self._held[device] + size > share:
                return False
            self.buffers += 1
            self._held[device] += size
            return True

    def give_back(self, device: int, size: int) -> None:
        with self._lock:
            self.buffers -= 1
            self._held[device] -= size

    def hold(self, size: int) -> bool:
        """Count ``size`` bytes that are in no buffer, if they may be had."""
        with self._lock:
            if self._held.total() + size > self._limits.buffer_bytes:
                return False
            self._held[NO_DEVICE] += size
            return True

    def give_up(self, size: int) -> None:
        with self._lock:
            self._held[NO_DEVICE] -= size


class Accounts:
    """The accounts of all clients, by name (:attr:`sdrpc.server.visitor.Visitor.account`); and what is computed for
    them. For any thread."""

    def __init__(self, limits: Limits) -> None:
        self._limits, self._lock = limits, Lock()
        self._accounts: OrderedDict[str, Account] = OrderedDict()
        self._running = 0
        self.spent = Spent(limits.compute_window)

    def enter(self, name: str) -> Account | None:
        """The account for one more connection; None if it has too many."""
        with self._lock:
            account = self._accounts.setdefault(name, Account(name, self._limits))
            if account.connections >= self._limits.connections_of_address:
                return None
            account.connections += 1
            self._accounts.move_to_end(name)
            return account

    def leave(self, account: Account) -> None:
        """One connection less. Who has none is remembered as long as what it has computed counts, the last ones
        first."""
        with self._lock:
            account.connections -= 1
            gone = [name for name, each in self._accounts.items() if not each.connections]
            spent = [name for name in gone if self._accounts[name].spent.seconds()]
            for name in [*set(gone).difference(spent), *spent[: max(0, len(spent) - REMEMBERED)]]:
                del self._accounts[name]

    @contextmanager
    def computing(self, account: Account) -> Iterator[None]:
        """While something is computed, or waits for its turn. Raises :class:`OverQuota`."""
        limits = self._limits
        for whose, spent, most in (
            ("this client's", account.spent, limits.compute_seconds_of_client),
            ("all clients'", self.spent, limits.compute_seconds_of_all),
        ):
            if spent.seconds() >= most:
                raise OverQuota(
                    f"{whose} {most:g} seconds of computing within {limits.compute_window / 60:g} minutes are used up; "
                    f"there are some again in {spent.wait(most):,.0f} s"
                )
        with self._lock:
            if account.running >= limits.computing_of_client:
                raise OverQuota(f"{account.running} graphs of this client wait or run already; try again later")
            if self._running >= limits.computing:
                raise OverQuota(f"{self._running} graphs of all clients wait or run already; try again later")
            account.running += 1
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                account.running -= 1
                self._running -= 1

    def charge(self, account: Account, seconds: float) -> None:
        """So long was computed for it."""
        account.spent.add(seconds)
        self.spent.add(seconds)


class Spent:
    """Seconds of computing within the last ``window`` seconds, to a sixtieth of that. For any thread."""

    def __init__(self, window: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._window, self._clock, self._lock = window, clock, Lock()
        self._parts: deque[tuple[float, float]] = deque()  # (end, seconds), the oldest first

    def add(self, seconds: float) -> None:
        with self._lock:
            now = self._clock()
            if self._parts and now - self._parts[-1][0] < self._window / 60:
                now, before = self._parts.pop()
                seconds += before
            self._parts.append((now, seconds))

    def seconds(self) -> float:
        with self._lock:
            while self._parts and self._parts[0][0] <= self._clock() - self._window:
                self._parts.popleft()
            return sum(seconds for _, seconds in self._parts)

    def wait(self, most: float) -> float:
        """How long until there are fewer than ``most``."""
        over = self.seconds() - most
        with self._lock:
            for end, seconds in self._parts:
                over -= seconds
                if over < 0:
                    return max(0.0, end + self._window - self._clock())
        return self._window


class Buffers:
    """How many buffers all clients have, and of how many bytes, with graphs that are kept for them. For any thread."""

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

    def hold(self, size: int) -> bool:
        """Count ``size`` bytes that are in no buffer, if they may be had."""
        with self._lock:
            if self.held + size > self._limits.bytes_of_all:
                return False
            self.held += size
            return True

    def give_up(self, size: int) -> None:
        with self._lock:
            self.held -= size
