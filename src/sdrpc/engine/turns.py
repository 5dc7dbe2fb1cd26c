"""Whose turn it is: who had least of the device so far goes first. No threads here.

Clients stand in a tree: owners, and below each of them its connections. A turn goes to the owner that had the fewest
seconds, then to whichever of its connections had fewest: a hundred connections of one owner have together what another
one has alone, and who asks for a millisecond now and then does not wait for others' seconds more than once. Who comes,
or comes again after a pause, begins where the one stands whose turn it is, so that nobody saves up turns. (Start-time
fair queueing: Goyal, Vin, Cheng 1996.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")

Path = Sequence[Hashable]
"""A client: its owner, which of its owner's it is, and so on. Paths of one queue have one length."""
REMEMBERED = 256
"""Clients without a task below one node that are remembered, so that they can't begin anew by leaving."""


class Turns(Generic[T]):
    """Tasks of clients. Not thread-safe."""

    def __init__(self) -> None:
        self._root: _Lane[T] = _Lane(0.0)

    def __len__(self) -> int:
        return self._root.waiting

    def put(self, client: Path, task: T) -> None:
        """``task`` waits for its turn, behind others of the same client."""
        lane = self._root
        lane.waiting += 1
        for name in client:
            lane = lane.child(name)
            lane.waiting += 1
        lane.tasks.append(task)

    def take(self) -> T:
        """The task whose turn it is. There must be one."""
        lane = self._root
        lane.waiting -= 1
        while lane.below:
            lane = lane.next()
            lane.waiting -= 1
        return lane.tasks.popleft()

    def spent(self, client: Path, seconds: float) -> None:
        """``client`` had the device for so long."""
        lane: _Lane[T] | None = self._root
        for name in client:
            lane = lane.below.get(name) if lane is not None else None
            if lane is not None:
                lane.used += seconds


class _Lane(Generic[T]):
    """A client with its tasks, or several ``below``. ``used``: the seconds that it had, or did not ask for; ``floor``:
    where the one below stood that had the last turn."""

    __slots__ = ("below", "floor", "tasks", "used", "waiting")

    def __init__(self, used: float) -> None:
        self.used, self.floor, self.waiting = used, 0.0, 0
        self.tasks: deque[T] = deque()
        self.below: dict[Hashable, _Lane[T]] = {}

    def child(self, name: Hashable) -> _Lane[T]:
        if name not in self.below:
            self._forget()
            self.below[name] = _Lane(self.floor)
        lane = self.below[name]
        if not lane.waiting:
            lane.used = max(lane.used, self.floor)
        return lane

    def next(self) -> _Lane[T]:
        lane = min((lane for lane in self.below.values() if lane.waiting), key=lambda lane: lane.used)
        self.floor = max(self.floor, lane.used)
        return lane

    def _forget(self) -> None:
        """Drop who would begin at the floor anyway; beyond a number, whoever waits for nothing."""
        gone = [name for name, lane in self.below.items() if not lane.waiting and lane.used <= self.floor]
        idle = [name for name, lane in self.below.items() if not lane.waiting and lane.used > self.floor]
        for name in gone + idle[: max(0, len(idle) - REMEMBERED)]:
            del self.below[name]
