"""When a run has to end: after so many seconds, or when somebody says so."""

from __future__ import annotations

import math
import time

from sdrpc.errors import ComputeError


class Deadline:
    """Made for one run; :meth:`start` when it begins. :meth:`stop` may come from any thread."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = math.inf if seconds is None else seconds
        self._reason = f"it took longer than {self._seconds:g} seconds"
        self._at = math.inf

    def start(self) -> None:
        self._at = min(self._at, time.monotonic() + self._seconds)

    def stop(self, reason: str) -> None:
        """Let the run end at its next step."""
        self._reason, self._at = reason, -math.inf

    def check(self, device: object, node: str) -> None:
        """Raise :class:`ComputeError`, which says that the run ended at ``node``, when it has to."""
        if time.monotonic() > self._at:
            raise ComputeError(f"{device}: stopped at {node}: {self._reason}")
