"""When a run has to end: after so many seconds, or when it is told to stop."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sdrpc.device import Watch
from sdrpc.errors import ComputeError, Stopped

WATCH_SECONDS = 0.2
"""How often a run's watch is asked."""


class Deadline:
    """The end of one run of ``what`` (a device's name). :meth:`start` begins the count of ``seconds`` (None: no limit).
    :meth:`stop` may come from any thread. ``watch``, if there is one, is asked by :meth:`check` itself. ``node`` is
    what is being computed, for the error."""

    def __init__(self, seconds: float | None, what: str = "", watch: Watch | None = None) -> None:
        self.node = ""
        self._what, self._seconds = what, math.inf if seconds is None else seconds
        self._watch, self._asked = watch, 0.0
        self._reason = ""
        self._at = math.inf

    def start(self) -> None:
        self._at = min(self._at, time.monotonic() + self._seconds)

    def stop(self, reason: str) -> None:
        """Let the run end at its next check."""
        self._reason, self._at = reason, -math.inf

    def check(self) -> None:
        """Raise :class:`Stopped` when the run was told to stop, :class:`ComputeError` when its time is over."""
        now = time.monotonic()
        if self._watch is not None and now > self._asked + WATCH_SECONDS:
            self._asked = now
            if reason := self._watch():
                self.stop(reason)
        if now <= self._at:
            return
        where = f"{self._what}: stopped at {self.node}" if self.node else f"{self._what}: stopped"
        if self._reason:
            raise Stopped(f"{where}: {self._reason}", self._reason)
        raise ComputeError(f"{where}: it took longer than {self._seconds:g} seconds")


_running = threading.local()


@contextmanager
def running(deadline: Deadline) -> Iterator[None]:
    """Make ``deadline`` the one that :func:`checkpoint` looks at in this thread."""
    _running.deadline = deadline
    try:
        yield
    finally:
        del _running.deadline


def checkpoint() -> None:
    """To be called now and then within what takes long: ends it when the run that it belongs to has to end."""
    deadline: Deadline | None = getattr(_running, "deadline", None)
    if deadline is not None:
        deadline.check()
