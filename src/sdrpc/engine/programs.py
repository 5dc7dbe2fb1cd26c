"""Compiled graphs by name: what several clients run, or one again, is compiled once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock

from sdrpc.device import Client

from .deadline import Deadline, running
from .in_turn import InTurn
from .program import Compiled

PROGRAMS = 32
"""Graphs that are kept compiled."""
TENSORS = 1 << 18
"""Of all of them together: each takes one to two kB, also when nobody is there any more."""


class Programs:
    """For any thread. Graphs are compiled one at a time: it is Python's work, of which two threads do no more than one,
    and those that compute would wait for all of them. The largest take half a minute, so clients take turns."""

    def __init__(self) -> None:
        self._kept: OrderedDict[bytes, tuple[Compiled, int]] = OrderedDict()
        self._lock, self._compiling = Lock(), InTurn()

    def get(
        self, name: bytes, make: Callable[[], Compiled], tensors: int, deadline: Deadline, client: Client
    ) -> Compiled:
        """The graph of so many ``tensors`` that is called ``name``, made for ``client`` if it is not there.
        ``deadline`` may end that."""
        if (known := self._find(name)) is not None:
            return known
        with self._compiling.turn(client, deadline):
            if (known := self._find(name)) is not None:  # somebody else was faster
                return known
            deadline.start()
            with running(deadline):
                made = make()
            self._keep(name, made, tensors)
        return made

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()

    def _keep(self, name: bytes, made: Compiled, tensors: int) -> None:
        with self._lock:
            self._kept[name] = made, tensors
            while len(self._kept) > PROGRAMS or sum(count for _, count in self._kept.values()) > TENSORS:
                self._kept.popitem(last=False)

    def _find(self, name: bytes) -> Compiled | None:
        with self._lock:
            if name not in self._kept:
                return None
            self._kept.move_to_end(name)
            return self._kept[name][0]
