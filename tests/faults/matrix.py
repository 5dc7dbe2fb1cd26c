"""What can happen between a client and a server, at each phase of a picture; the picture must be the same.

A row is a fault, a phase, and whether a key protects the connection. Bits that turn over are tried with a key only:
without one nobody can tell them from others (docs/security.md says so)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np

from sdrpc.client import Keychain, Timeouts, connect
from sdrpc.client.connection import DEFAULT_TIMEOUTS
from sdrpc.diffusion.events import Event
from sdrpc.diffusion.request import Request
from sdrpc.diffusion.session import Session
from sdrpc.runtime.cache import Cache
from sdrpc.server.key_ring import KeyRing
from tests.support.trouble import Fault, Line, Restartable, Wire, cut, flip, stall

REQUEST = Request("a cat", width=64, height=64, steps=2, sampling_method="euler_a")


class Phase(NamedTuple):
    """After the event that ``is_now``, what goes ``up`` to the server next belongs to it, or what comes down."""

    is_now: Callable[[Event], bool]
    up: bool


def uploading(component: str) -> Callable[[Event], bool]:
    return lambda event: event.stage == "upload" and event.component == component and 0 < event.done < event.total


def uploaded(component: str) -> Callable[[Event], bool]:
    return lambda event: event.stage == "upload" and event.component == component and event.over


def stepped(event: Event) -> bool:
    return event.stage == "sample" and event.done == 1


PHASES = {
    "uploading a text encoder": Phase(uploading("clip_l"), up=True),
    "encoding": Phase(uploaded("clip_l"), up=True),
    "reading a text": Phase(uploaded("clip_l"), up=False),
    "uploading the diffusion model": Phase(uploading("diffusion"), up=True),
    "the first step": Phase(uploaded("diffusion"), up=True),
    "reading a prediction": Phase(uploaded("diffusion"), up=False),
    "a later step": Phase(stepped, up=True),
    "reading a later prediction": Phase(stepped, up=False),
    "uploading the VAE": Phase(uploading("vae"), up=True),
    "decoding": Phase(uploaded("vae"), up=True),
    "reading a picture": Phase(uploaded("vae"), up=False),
}


def _kill(server: Restartable, seconds: float) -> Fault:
    def happens(line: Line, data: bytes) -> bytes:
        server.kill()
        server.start()
        return data

    return happens


def _sleep(server: Restartable, seconds: float) -> Fault:
    def happens(line: Line, data: bytes) -> bytes:
        server.sleep(seconds)
        return data

    return happens


FAULTS: dict[str, Callable[[Restartable, float], Fault]] = {
    "cut": lambda *_: cut,
    "stall": lambda *_: stall,
    "kill": _kill,
    "sleep": _sleep,
    "flip": lambda *_: flip,
}
"""A connection that ends; one through which nothing comes any more; kill -9, and a start at once; SIGSTOP for so many
seconds; a bit."""


class Row(NamedTuple):
    fault: str
    phase: str
    key: bool

    def __str__(self) -> str:
        return f"{self.fault}-{self.phase}{'-with a key' if self.key else ''}"


ROWS = [
    Row(fault, phase, key) for key in (False, True) for fault in FAULTS for phase in PHASES if key or fault != "flip"
]


class Setting:
    """A server, with a key or without, and a checkpoint that is drawn through it. ``sleep``: seconds that it stands
    still. ``timeouts``: of the client, where the connection stalls."""

    def __init__(
        self, checkpoint: Path, folder: Path, key: bool, sleep: float = 30.0, timeouts: Timeouts = DEFAULT_TIMEOUTS
    ) -> None:
        self.key, self._checkpoint, self._folder = key, checkpoint, folder
        self._sleep, self._timeouts = sleep, timeouts
        self._keychain: Keychain | None = None
        if key:
            folder.mkdir(exist_ok=True)
            self._keychain = Keychain([(None, KeyRing(folder / "keys.json").add("laptop").key)], folder / "client.json")
        self._cache = Cache(folder / "graphs")
        self._stack = ExitStack()

    def __enter__(self) -> Setting:
        options = ("--precision", "exact", *(["--require-key"] if self.key else []))
        self._server = self._stack.enter_context(Restartable(*options, state=self._folder if self.key else None))
        self._undisturbed, _ = self._draw(f"127.0.0.1:{self._server.port}", DEFAULT_TIMEOUTS)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def _draw(
        self,
        endpoint: str,
        timeouts: Timeouts,
        is_now: Callable[[Event], bool] = lambda _: False,
        happens: Callable[[], None] = lambda: None,
    ) -> tuple[np.ndarray, list[int]]:
        """A picture, and its steps as they were told. ``happens`` is called once, when an event ``is_now``, and all
        that was sent before has come."""
        (device,) = connect([endpoint], timeouts, keychain=self._keychain)
        waits, steps = True, []

        def on_event(event: Event) -> None:
            nonlocal waits
            if event.stage == "sample":
                steps.append(event.done)
            if waits and is_now(event):
                waits = False
                device.memory()
                happens()

        with closing(device), Session.open(self._checkpoint, device, self._cache) as session:
            (picture,) = session.generate(REQUEST, on_event)
            return picture.image, steps

    def goes_wrong(self, row: Row) -> str:
        """What is wrong with the picture that is drawn while it happens; nothing should."""
        phase = PHASES[row.phase]
        fault = FAULTS[row.fault](self._server, self._sleep)
        timeouts = self._timeouts if row.fault == "stall" else DEFAULT_TIMEOUTS
        with Wire(self._server.port) as wire:
            picture, steps = self._draw(wire.endpoint, timeouts, phase.is_now, lambda: wire.disturb(fault, phase.up))
        if not wire.happened:
            return "it did not happen"
        if not np.array_equal(picture, self._undisturbed):
            return "another picture"
        if steps != list(range(REQUEST.steps + 1)):
            return f"steps {steps}"
        if row.fault == "sleep" and wire.connections > 1:
            return "whoever slept goes on, yet the client came again"
        if row.fault != "sleep" and wire.connections == 1:
            return "the client did not come again"
        return ""
