"""The devices that there are: how busy they are, what memory they have, and whether they are there."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from threading import Lock, Thread
from typing import Protocol

from typing_extensions import TypedDict

from ..device import Device, Memory, Traffic
from ..errors import DeviceLost, SdrpcError

log = logging.getLogger(__name__)

MEMORY_SECONDS = 2.0
"""How old what is said about a device's memory may be: a busy one answers between two steps."""

LOAD_SECONDS = 60.0
"""The time whose share a device's load is."""


class Said(TypedDict):
    """A device. ``free`` and ``total``: bytes, None of one that is gone. ``load``: the share of the last minute in
    which this server's jobs were drawn on it, 0 … 1; ``jobs``: those that are now."""

    name: str
    description: str
    free: int | None
    total: int | None
    load: float
    jobs: list[str]


class Shown(Protocol):
    """What is said of a device that a seat draws on."""

    @property
    def name(self) -> str: ...

    @property
    def description(self) -> str: ...

    def memory(self) -> Memory:
        """Raises :class:`SdrpcError` where it can't be known."""


class Devices:
    """Those of this process, ``own``, and those that seats have in other processes, which ``elsewhere`` gives; what
    they are doing. For any thread."""

    def __init__(self, own: Sequence[Device], elsewhere: Callable[[], Sequence[Shown]] = lambda: ()) -> None:
        self._own = own
        self._elsewhere = elsewhere
        self._lock, self._asking = Lock(), Lock()
        self._known: tuple[float, list[tuple[Shown, Memory | None]]] = (float("-inf"), [])
        self._now: dict[str, tuple[tuple[str, ...], float]] = {}
        self._before: deque[tuple[tuple[str, ...], float, float]] = deque()
        self._absent: set[str] = set()

    def begin(self, job: str, devices: Iterable[Shown]) -> None:
        """``job`` is drawn on these from now on."""
        with self._lock:
            self._now[job] = tuple(device.name for device in devices), time.monotonic()

    def end(self, job: str) -> None:
        with self._lock:
            names, began = self._now.pop(job, ((), 0.0))
            if names:
                self._before.append((names, began, time.monotonic()))

    def absent(self, device: str, reason: str) -> None:
        """A device was lost, which the log says once."""
        with self._lock:
            news = device not in self._absent
            self._absent.add(device)
        if news:
            log.warning("%s is not there: %s", device, reason)

    def present(self, device: str, anew: bool = False) -> None:
        """A device is there, which the log says where it was not, or was lost meanwhile (``anew``)."""
        with self._lock:
            news = anew or device in self._absent
            self._absent.discard(device)
        if news:
            log.warning("%s is there again", device)

    def said(self) -> list[Said]:
        """All devices, as they are."""
        known = self._remembered()
        with self._lock:
            now = time.monotonic()
            while self._before and self._before[0][2] < now - LOAD_SECONDS:
                self._before.popleft()
            spans = [*self._before, *((names, began, now) for names, began in self._now.values())]
            running = {job: names for job, (names, _) in self._now.items()}
        return [_said(device, memory, spans, running, now) for device, memory in known]

    def known(self, seconds: float) -> list[tuple[Shown, Memory | None]]:
        """Devices and what is known of their memory after so many ``seconds``, in which they are asked; one that is
        not, because it is busy, has what it had before, or nothing. Nobody waits any longer for its turn."""
        if not self._asking.locked():
            asking = Thread(target=self._remembered, name="memory of devices", daemon=True)
            asking.start()
            asking.join(seconds)
        return self._known[1]

    def traffic(self) -> list[Traffic]:
        """What goes between this process and its servers, over all connections that it has to each."""
        connections = {id(device.traffic): device.traffic for device in self._own}
        total: dict[str, Traffic] = {}
        for traffic in filter(None, connections.values()):
            so_far = total.setdefault(traffic.server, Traffic(traffic.server))
            so_far.sent += traffic.sent
            so_far.received += traffic.received
        return list(total.values())

    def _remembered(self) -> list[tuple[Shown, Memory | None]]:
        """Devices and their memory. One who asks waits for the devices, others get what was known before."""
        if self._asking.acquire(blocking=not self._known[1]):
            try:
                if time.monotonic() - self._known[0] > MEMORY_SECONDS:
                    there = [*self._own, *self._elsewhere()]
                    before = {device.name: memory for device, memory in self._known[1]}
                    with self._lock:
                        busy = {name for names, _ in self._now.values() for name in names}
                    found = [
                        (device, self._memory(device, before.get(device.name), device.name in busy)) for device in there
                    ]
                    self._known = time.monotonic(), found
            finally:
                self._asking.release()
        return self._known[1]

    def _memory(self, device: Shown, before: Memory | None, busy: bool) -> Memory | None:
        """What a device says, when it is its turn; one that is drawn on and does not answer meanwhile has what it had
        ``before``, one that is lost has none."""
        try:
            with device.turns if isinstance(device, Device) else nullcontext():
                memory = device.memory()
        except DeviceLost as lost:
            self.absent(device.name, str(lost))
            return None
        except SdrpcError:
            return before if busy else None
        self.present(device.name)
        return memory


def _said(
    device: Shown,
    memory: Memory | None,
    spans: Sequence[tuple[tuple[str, ...], float, float]],
    running: Mapping[str, tuple[str, ...]],
    now: float,
) -> Said:
    name, since = device.name, now - LOAD_SECONDS
    busy = sum(end - max(began, since) for names, began, end in spans if name in names)
    return {
        "name": name, "description": device.description,
        "free": None if memory is None else memory.free, "total": None if memory is None else memory.total,
        "load": round(min(busy / LOAD_SECONDS, 1.0), 3),
        "jobs": [job for job, names in running.items() if name in names],
    }  # fmt: skip
