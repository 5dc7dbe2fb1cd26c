"""Where the time goes: seconds per stage, each second counted once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident

STAGES = ("load", "capture", "upload", "encode", "sample", "decode")


class StageTimer:
    """Stages may be entered inside of each other: the inner one's time is not the outer one's. What other threads do
    meanwhile is a part of the stage that waits for them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0
        self._thread = 0

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        if self._running and get_ident() != self._thread:
            yield
            return
        self._thread = get_ident()
        self._charge()
        self._running.append(stage)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def spent(self, *stages: str) -> float:
        """Seconds of stages that are over."""
        return sum(self.seconds.get(stage, 0.0) for stage in stages)

    def _charge(self) -> None:
        """Give the time since the last change to the stage that ran."""
        now = time.perf_counter()
        if self._running:
            stage = self._running[-1]
            self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._since
        self._since = now
