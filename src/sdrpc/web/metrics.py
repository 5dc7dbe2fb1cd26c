"""What a monitor wants to know, in Prometheus' form."""

from __future__ import annotations

from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..diffusion.events import Event
from .jobs import State
from .store import JobStore

STEP_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


def _count(store: JobStore, state: State) -> float:
    return len(store.jobs([state]))


class Metrics:
    """Counters of one server."""

    def __init__(self, store: JobStore) -> None:
        self.registry = CollectorRegistry()
        named: Any = {"registry": self.registry}
        self._pictures = Counter("sdrpc_pictures", "Pictures drawn", ["seat", "model"], **named)
        self._steps = Histogram("sdrpc_step_seconds", "Seconds per step", ["seat"], buckets=STEP_SECONDS, **named)
        self._sent = Counter("sdrpc_weights_sent_bytes", "Bytes of weights sent to devices", ["seat"], **named)
        self._kept = Counter("sdrpc_weights_kept_bytes", "Bytes of weights that servers had", ["seat"], **named)
        for state in (State.QUEUED, State.RUNNING):
            gauge = Gauge(f"sdrpc_jobs_{state.value}", f"Jobs that are {state.value}", **named)
            gauge.set_function(partial(_count, store, state))
        self._last: dict[str, tuple[int, float]] = {}

    def drawn(self, seat: str, model: str) -> None:
        self._pictures.labels(seat, model).inc()

    def told(self, seat: str, event: Event) -> None:
        """A session's event."""
        if event.stage == "sample":
            done, seconds = self._last.get(seat, (0, 0.0))
            if event.done > done:
                self._steps.labels(seat).observe((event.seconds - seconds) / (event.done - done))
            self._last[seat] = (0, 0.0) if event.over else (event.done, event.seconds)
        elif event.stage == "upload" and event.over and event.sent is not None:
            self._sent.labels(seat).inc(event.sent)
            self._kept.labels(seat).inc(max(event.total - event.sent, 0))

    def text(self) -> bytes:
        return generate_latest(self.registry)
