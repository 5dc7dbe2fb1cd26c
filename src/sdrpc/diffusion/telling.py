"""Who is told what happens while something is drawn."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

from ..errors import Cancelled
from .events import Cancel, Event, OnEvent, Stage


class Telling:
    """Who wants to know what happens, and whether it shall stop; another one in each call of a session. They hear of
    one thing after the other, from whichever thread."""

    def __init__(self) -> None:
        self.listener: OnEvent = lambda _: None
        self.cancel: Cancel = lambda: False
        self._one_at_a_time = RLock()

    def on_event(self, event: Event) -> None:
        """Something happened."""
        with self._one_at_a_time:
            self.listener(event)

    def check(self) -> None:
        """Raises :class:`Cancelled` when the caller wants no more."""
        if self.cancel():
            raise Cancelled

    @contextmanager
    def stage(self, stage: Stage, component: str = "") -> Iterator[None]:
        """Tells when a stage begins and when it is over."""
        began = time.perf_counter()
        self.on_event(Event(stage, component))
        yield
        self.on_event(Event(stage, component, 1, 1, seconds=time.perf_counter() - began))
