"""How far jobs are, for whoever looks: drawing threads write, requests of the event loop read and wait for news."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any


@dataclass(frozen=True)
class Progress:
    """Where a job is. ``stage`` and ``component``: of the session's last event; ``step`` of ``steps`` of ``picture``;
    ``preview``: a small PNG of what is there so far, and its number, counted from 1; ``seat``: who draws it."""

    stage: str = "queued"
    component: str = ""
    step: int = 0
    steps: int = 0
    picture: int = 1
    done: int = 0
    total: int = 0
    preview: bytes | None = None
    previews: int = 0
    seat: str = ""


class Board:
    """Job → :class:`Progress`, and bells that ring when anything on it, or in the queue, changed."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._progress: dict[str, Progress] = {}
        self._bells: set[tuple[asyncio.AbstractEventLoop, asyncio.Event, str | None]] = set()
        self.closed = False
        """The server ends: nobody is to wait any longer."""

    def get(self, job: str) -> Progress:
        with self._lock:
            return self._progress.get(job, Progress())

    def show(self, job: str, **changes: Any) -> None:
        """Change what stands there about ``job``; any thread."""
        with self._lock:
            self._progress[job] = replace(self._progress.get(job, Progress()), **changes)
        self.ring(job)

    def clear(self, job: str) -> None:
        with self._lock:
            self._progress.pop(job, None)
        self.ring(job)

    def close(self) -> None:
        """Let go who waits for news; any thread."""
        self.closed = True
        self._wake(lambda _: True)

    def ring(self, job: str | None = None) -> None:
        """Wake who waits for news of ``job``, and who waits for all; None: the latter, since places in the line
        changed. Who waits for one job looks at its place now and then: woken at each move, a long line would be told of
        every one in it before the next request is read. Any thread."""
        self._wake(lambda of: of in (None, job))

    def _wake(self, whom: Callable[[str | None], bool]) -> None:
        with self._lock:
            bells = [(loop, bell) for loop, bell, of in self._bells if whom(of)]
        for loop, bell in bells:
            if not loop.is_closed():
                loop.call_soon_threadsafe(bell.set)

    async def news(self, bell: asyncio.Event, seconds: float) -> None:
        """Until ``bell``, one of :meth:`listen`, has rung, or for so many ``seconds``."""
        try:
            await asyncio.wait_for(bell.wait(), seconds)
        except (asyncio.TimeoutError, TimeoutError):
            return
        bell.clear()

    @contextmanager
    def listen(self, job: str | None = None) -> Iterator[asyncio.Event]:
        """A bell, in the running event loop, for as long as the context lasts. ``job``: whose news it rings for; None:
        all."""
        entry = asyncio.get_running_loop(), asyncio.Event(), job
        with self._lock:
            self._bells.add(entry)
        try:
            yield entry[1]
        finally:
            with self._lock:
                self._bells.discard(entry)
