"""Many clients at one server at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle, islice
from typing import NamedTuple

from sdrpc.client import connect
from sdrpc.device import Device
from sdrpc.errors import OverQuota, SdrpcError
from tests.soak.clients import Scene

PATIENCE = 1800.0
"""Seconds after which a client that has neither its picture nor a reason waits for ever."""


class Gathering(NamedTuple):
    """How many clients got in, were refused with a reason, drew the right picture; what else was said."""

    connected: int
    refused: int
    drawn: int
    wrong: list[str]
    seconds: float
    wanted: int

    @property
    def right(self) -> bool:
        return not self.wrong and self.drawn == self.wanted

    def __str__(self) -> str:
        return (
            f"{self.connected} were let in, {self.refused} refused with a reason, {self.drawn} pictures were right, "
            f"in {self.seconds:.0f} s" + "".join(f"\n  wrong: {what}" for what in self.wrong[:20])
        )


def crowd(scene: Scene, clients: int, drawing: int) -> Gathering:
    """``clients`` connect at once and stay, with a buffer each, while ``drawing`` of them draw at once."""
    began = time.monotonic()
    devices: list[Device] = []
    refused: list[str] = []
    wrong: list[str] = []
    drawn: list[int] = []
    lock = threading.Lock()

    def stay() -> None:
        try:
            found = connect([scene.endpoint])
            found[0].allocate(1 << 16)
        except OverQuota as error:
            with lock:
                refused.append(error.reason)
        except SdrpcError as error:
            with lock:
                wrong.append(str(error))
        else:
            with lock:
                devices.extend(found)

    def draw(seed: int) -> None:
        try:
            scene.check(scene.draw(scene.endpoint, seed))
        except (SdrpcError, AssertionError) as error:
            with lock:
                wrong.append(str(error))
        else:
            with lock:
                drawn.append(seed)

    seeds = islice(cycle(scene.right), drawing)
    drawers = _started([partial(draw, seed) for seed in seeds])
    _joined(_started([stay] * (clients - drawing)), wrong)
    connected = len(devices)
    _joined(drawers, wrong)
    for device in devices:
        device.close()
    return Gathering(connected + drawing, len(refused), len(drawn), wrong, time.monotonic() - began, drawing)


def _started(tasks: list[Callable[[], None]]) -> list[threading.Thread]:
    threads = [threading.Thread(target=task, daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    return threads


def _joined(threads: list[threading.Thread], wrong: list[str]) -> None:
    until = time.monotonic() + PATIENCE
    for thread in threads:
        thread.join(max(until - time.monotonic(), 0))
        if thread.is_alive():
            wrong.append("a client waits for ever")
