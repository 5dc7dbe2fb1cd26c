"""The devices that there are, how busy they are, and what somebody chose to put where."""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from threading import Lock, Thread
from typing import Protocol

from typing_extensions import TypedDict

from ..device import Device, Memory, Traffic
from ..device_names import AUTO, folded
from ..diffusion import placement
from ..errors import DeviceLost, InvalidValue, SdrpcError
from ..runtime.chain import Chain, Lanes
from ..storage import read_own, write_whole
from .store import on_disk

log = logging.getLogger(__name__)

MEMORY_SECONDS = 2.0
"""How old what is said about a device's memory may be: a busy one answers between two steps."""

LOAD_SECONDS = 60.0
"""The time whose share a device's load is."""

MAX_FILE = 1 << 20
"""Bytes of a file of placements."""

Chosen = Mapping[str, tuple[str, ...]]
"""Component → names of its devices, in order of preference, each as sd-cli's ``--backend`` has it: ``RPC0&RPC1``; or
``auto`` alone."""


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


class Places:
    """``devices`` of this process, and which components somebody put on them, by model; that is kept in the file
    ``path``. ``elsewhere`` gives those that seats have in other processes. For any thread."""

    def __init__(
        self, devices: Sequence[Device], path: Path, elsewhere: Callable[[], Sequence[Shown]] = lambda: ()
    ) -> None:
        self._devices = {device.name: device for device in devices}
        self._elsewhere = elsewhere
        self._path = path
        self._lock, self._asking = Lock(), Lock()
        self._known: tuple[float, list[tuple[Shown, Memory | None]]] = (float("-inf"), [])
        self._now: dict[str, tuple[tuple[str, ...], float]] = {}
        self._before: deque[tuple[tuple[str, ...], float, float]] = deque()
        self._absent: set[str] = set()
        self._chosen = self._read()

    # --- what is chosen

    def chosen(self, model: str) -> Chosen:
        """What somebody put where, of a model; nothing where the command line decides."""
        with self._lock:
            return self._chosen.get(model, {})

    def choose(self, model: str, components: Sequence[str], wanted: Mapping[str, Sequence[str]]) -> None:
        """Put what is ``wanted`` of a model's ``components`` on devices, from its next job on; nothing: as the command
        line says. Raises :class:`InvalidValue` for a component or device that is not there, and for one without, and
        :class:`NotKept`."""
        named = {part: self._canonical(part, names) for part, names in wanted.items()}
        assigned = placement.assigned(components, named, "components", ())
        placed = {part: names for part, names in assigned.items() if names}
        with self._lock:
            others = {name: there for name, there in self._chosen.items() if name != model}
            chosen = {**others, model: placed} if placed else others
            with on_disk():
                write_whole(self._path, json.dumps(chosen).encode())
            self._chosen = chosen

    def lanes(self, chosen: Chosen) -> dict[str, list[Lanes]]:
        """What is chosen as places; what is left to a plan is not among them."""
        return {part: [self._lanes(name) for name in names] for part, names in chosen.items() if names != (AUTO,)}

    def _lanes(self, name: str) -> Lanes:
        return Lanes(tuple(map(Chain, placement.meant(name, self._devices, "components"))))

    def _canonical(self, part: str, names: Sequence[str]) -> tuple[str, ...]:
        """The names of a component's devices as they are, each once. Raises :class:`InvalidValue`."""
        if not names:
            reason = "no device is named; leave a component out, and it is where the command line says"
            raise InvalidValue("components", part, reason)
        if not self._devices:
            raise InvalidValue("components", part, "a cluster's devices are placed with --backend")
        if any(folded(name) == AUTO for name in names):
            if len(names) > 1:
                raise InvalidValue("components", ",".join(names), "auto stands alone: a plan is no preference")
            return (AUTO,)
        return tuple(dict.fromkeys(self._lanes(name).name for name in names))

    def _is_there(self, name: str) -> bool:
        try:
            return name == AUTO or bool(self._lanes(name))
        except InvalidValue:
            return False

    def _read(self) -> dict[str, Chosen]:
        """What was chosen before; what of it names devices that are not there any more is as if it had not been."""
        data = read_own(self._path, MAX_FILE)
        if data is None:
            return {}
        try:
            kept: dict[str, Chosen] = {
                str(model): {
                    str(component): tuple(name for name in names if self._is_there(str(name)))
                    for component, names in there.items()
                }
                for model, there in json.loads(data).items()
            }
        except (ValueError, AttributeError, TypeError, RecursionError):
            log.warning("%s is no file of placements: components go where the command line says", self._path)
            return {}
        return {
            model: found for model, there in kept.items() if (found := {part: on for part, on in there.items() if on})
        }

    # --- what they are doing

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
        connections = {id(device.traffic): device.traffic for device in self._devices.values()}
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
                    there = [*self._devices.values(), *self._elsewhere()]
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
