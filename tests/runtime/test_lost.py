"""Waiting for devices that were lost: which one is taken, how long, and what is said."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from sdrpc.device import Device
from sdrpc.errors import (
    ConnectionFailed,
    ConnectionLost,
    DeviceGone,
    DeviceLost,
    DoesNotFit,
    Room,
    SdrpcError,
    UsageError,
)
from sdrpc.runtime import lost
from sdrpc.runtime.lost import LOSSES, Absence, first_back, surviving

LOST = ConnectionLost("there:1", "reading")


class Away(Device):
    """A device that can be had again after so many tries."""

    def __init__(self, name: str, tries: int = 0) -> None:
        self.name, self.description, self.tries = name, name, tries

    def reopen(self) -> None:
        self.tries -= 1
        if self.tries >= 0:
            raise ConnectionFailed(self.name, "nobody answers")

    target = alignment = property(lambda _: pytest.fail("not asked for"))
    memory = allocate = free = write = read = compile = lambda *_: pytest.fail("not asked for")


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time that passes only when somebody sleeps."""
    now = [0.0]
    monkeypatch.setattr(lost.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(lost.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))


@pytest.mark.parametrize(
    ("tries", "taken"), [((0, 0), "RPC0"), ((1, 0), "RPC1"), ((2, 3), "RPC0"), ((9, 3), "RPC1"), ((4, 4), "RPC0")]
)
def test_the_first_that_is_there_is_taken(tries: tuple[int, int], taken: str) -> None:
    devices = [Away(f"RPC{i}", n) for i, n in enumerate(tries)]
    assert first_back(devices, LOST, 60).name == taken


def test_one_without_room_is_passed_over_and_waited_for() -> None:
    refusals = iter([True, True, False])

    def accept(device: Device) -> None:
        if device.name == "RPC0" or next(refusals):
            raise DoesNotFit({"vae": 2 << 20}, {device.name: [Room(1 << 20)]})

    assert first_back([Away("RPC0"), Away("RPC1")], LOST, 60, accept).name == "RPC1"
    with pytest.raises(DoesNotFit, match="RPC0: vae takes 2 MiB, and there is room for 1 MiB"):
        first_back([Away("RPC0")], LOST, 60, accept)


def test_nobody_waits_for_ever_and_everybody_is_told() -> None:
    told: list[Absence] = []
    device = Away("RPC0", 1000)
    with pytest.raises(
        DeviceGone, match=r"RPC0 was lost \(there:1: .* while reading\).* within 7 s: RPC0: nobody"
    ) as e:
        first_back([device], LOST, 7, tell=told.append)
    assert (e.value.device, e.value.lost, e.value.seconds) == ("RPC0", LOST, 7)
    assert isinstance(e.value, DeviceLost)
    seconds = [absence.seconds for absence in told]
    assert seconds == sorted(seconds)
    assert max(b - a for a, b in pairwise(seconds)) <= 1
    assert seconds[-1] < 7
    assert {(absence.device, absence.patience) for absence in told} == {(device, 7)}


def test_without_patience_the_loss_is_the_error() -> None:
    with pytest.raises(ConnectionLost):
        first_back([Away("RPC0")], LOST, 0)


def test_who_waits_may_end_it() -> None:
    def enough(absence: Absence) -> None:
        if absence.seconds >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first_back([Away("RPC0", 1000)], LOST, 60, tell=enough)


def failing(times: int, error: SdrpcError) -> Callable[[], str]:
    left = [times]

    def work() -> str:
        left[0] -= 1
        if left[0] >= 0:
            raise error
        return "done"

    return work


def test_work_is_done_again_but_not_for_ever() -> None:
    again: list[Any] = []
    assert surviving(failing(LOSSES - 1, LOST), again.append) == "done"
    assert again == [LOST] * (LOSSES - 1)
    with pytest.raises(ConnectionLost):
        surviving(failing(LOSSES, LOST), again.append)
    with pytest.raises(UsageError):
        surviving(failing(1, UsageError("no")), lambda _: pytest.fail("nothing was lost"))
