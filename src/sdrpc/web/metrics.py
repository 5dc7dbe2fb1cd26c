"""What a monitor wants to know, in Prometheus' form."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..diffusion.events import Event
from .devices import Devices
from .jobs import Job, State
from .store import JobStore

STEP_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

WAIT_SECONDS = (0.1, 0.5, 1, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)

ASK_SECONDS = 0.25
"""How long a monitor waits for what devices say of their memory; a busy one's is then what it said before."""


def _count(store: JobStore, state: State) -> float:
    return len(store.jobs([state]))


class Metrics:
    """Counters of one server, and what is known of its ``devices`` when somebody asks."""

    def __init__(self, store: JobStore, devices: Devices) -> None:
        self.registry = CollectorRegistry()
        named: Any = {"registry": self.registry}
        self._pictures = Counter("sdrpc_pictures", "Pictures drawn", ["seat", "model"], **named)
        self._steps = Histogram("sdrpc_step_seconds", "Seconds per step", ["seat"], buckets=STEP_SECONDS, **named)
        self._sent = Counter("sdrpc_weights_sent_bytes", "Bytes of weights sent to devices", ["seat"], **named)
        self._kept = Counter("sdrpc_weights_kept_bytes", "Bytes of weights that servers had", ["seat"], **named)
        self._waits = Histogram(
            "sdrpc_job_wait_seconds", "Seconds from a job's arrival until it is drawn", buckets=WAIT_SECONDS, **named
        )
        self._requests = Counter("sdrpc_http_requests", "Requests answered", ["route", "status"], **named)
        self.registry.register(_Devices(devices))
        ProcessCollector(registry=self.registry)
        for state in (State.QUEUED, State.RUNNING):
            gauge = Gauge(f"sdrpc_jobs_{state.value}", f"Jobs that are {state.value}", **named)
            gauge.set_function(partial(_count, store, state))
        self._last: dict[str, tuple[int, float]] = {}

    def began(self, job: Job) -> None:
        """A seat took ``job``, for the first time or again."""
        self._waits.observe(max(time.time() - job.created, 0.0))

    def answered(self, route: str, status: int) -> None:
        """``route``: its pattern, ``/sdcpp/v1/jobs/{id}``; empty for a request that came to none."""
        self._requests.labels(route, status).inc()

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


class _Devices(Collector):
    """Each device's memory, and what went to each server and came from it. Those of a cluster's actors are not known to
    this process."""

    def __init__(self, devices: Devices) -> None:
        self._devices = devices

    def collect(self) -> Iterator[Metric]:
        free = GaugeMetricFamily("sdrpc_device_memory_free_bytes", "Free memory of a device", labels=["device"])
        total = GaugeMetricFamily("sdrpc_device_memory_total_bytes", "Memory of a device", labels=["device"])
        for device, memory in self._devices.known(ASK_SECONDS):
            if memory is not None:
                free.add_metric([device.name], memory.free)
                total.add_metric([device.name], memory.total)
        sent = CounterMetricFamily("sdrpc_wire_sent_bytes", "Bytes sent to a server", labels=["server"])
        received = CounterMetricFamily("sdrpc_wire_received_bytes", "Bytes that came from a server", labels=["server"])
        for traffic in self._devices.traffic():
            sent.add_metric([traffic.server], traffic.sent)
            received.add_metric([traffic.server], traffic.received)
        yield from (free, total, sent, received)


class Counted:
    """A middleware around all others: requests of ``app`` by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.answered(getattr(scope.get("route"), "path", ""), message["status"])
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)
