"""Whose turn it is, of a device or of a server's threads: who had least so far goes first. No threads here.

Clients stand in a tree: owners, and below each of them its connections. A turn goes to the owner that will have had the
fewest seconds after it, if it takes as long as its last one, then to whichever of its connections will have had fewest:
a hundred connections of one owner have together what another one has alone. Who comes, or comes again after a pause,
begins where the one stood that had the last turn, so that nobody saves up turns. So who asks for a millisecond now and
then waits for the run that is under way, and for no other, until it had as much more than that as others' shortest run
takes. (Fair queueing with start times as the clock: Goyal, Vin, Cheng 1996; by the end of turns, as in Golestani 1994.)
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


class FairQueue(Generic[T]):
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
        """The task whose turn it is, which begins. There must be one."""
        lane = self._root
        lane.begin()
        while lane.below:
            lane = lane.next()
            lane.begin()
        return lane.tasks.popleft()

    def spent(self, client: Path, seconds: float) -> None:
        """A task of ``client`` that was taken is over; it took so long."""
        lane = self._root
        lane.end(seconds)
        for name in client:
            lane = lane.below[name]
            lane.end(seconds)


class _Lane(Generic[T]):
    """A client with its tasks, or several ``below``; so many of its tasks are ``waiting``, and so many ``running``.
    ``used``: the seconds that it had, or did not ask for; ``last``: those of its last task; ``floor``: where the one
    below stood that had the last turn."""

    __slots__ = ("below", "floor", "last", "running", "tasks", "used", "waiting")

    def __init__(self, used: float) -> None:
        self.used, self.last, self.floor = used, 0.0, 0.0
        self.waiting = self.running = 0
        self.tasks: deque[T] = deque()
        self.below: dict[Hashable, _Lane[T]] = {}

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def begin(self) -> None:
        self.waiting -= 1
        self.running += 1

    def end(self, seconds: float) -> None:
        self.running -= 1
        self.used += seconds
        self.last = seconds

    def child(self, name: Hashable) -> _Lane[T]:
        if name not in self.below:
            self._forget()
            self.below[name] = _Lane(self.floor)
        lane = self.below[name]
        if lane.idle:
            lane.used = max(lane.used, self.floor)
        return lane

    def next(self) -> _Lane[T]:
        lane = min((lane for lane in self.below.values() if lane.waiting), key=lambda lane: lane.used + lane.last)
        self.floor = max(self.floor, lane.used)
        return lane

    def _forget(self) -> None:
        """Drop who would begin at the floor anyway; beyond a number, whoever is idle."""
        idle = [(name, lane) for name, lane in self.below.items() if lane.idle]
        gone = [name for name, lane in idle if lane.used <= self.floor]
        others = [name for name, lane in idle if lane.used > self.floor]
        for name in gone + others[: max(0, len(others) - REMEMBERED)]:
            del self.below[name]
