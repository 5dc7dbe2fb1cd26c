"""What to do when a device is lost in the middle of something: wait for it, and do that again.

Only a server can be lost: it dies, is started again, sleeps, or drops off the network. What was on it is gone then, or
as good as gone. So whoever works on a device does it in pieces that can be done again from nothing: one run of a graph,
with the upload of its weights before it. Its inputs are here and its result is the same every time; what was finished
before is not done again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import count
from typing import NamedTuple, Protocol, TypeVar

from ..errors import (
    ConnectionFailed,
    DeviceGone,
    DeviceLost,
    DoesNotFit,
    OutOfMemory,
    OverQuota,
    RemoteError,
    SdrpcError,
    VersionMismatch,
)

RETRY_SECONDS = 60.0
"""How long to wait for a device that was lost, unless somebody says otherwise."""

LOSSES = 5
"""So often the same piece of work may lose its device, one time after the other: work that kills its server each time
is not for it."""

_PAUSE = (0.1, 2.0)
"""Seconds between two tries: at first, and at most. Each pause is half as long again as the one before."""

NOT_YET = (ConnectionFailed, DeviceLost, DoesNotFit, OutOfMemory, OverQuota, RemoteError, VersionMismatch)
"""What may change while one waits for a device."""

T = TypeVar("T")


class Place(Protocol):
    """A device, or several that are used together."""

    @property
    def name(self) -> str: ...

    @property
    def turns(self) -> AbstractContextManager[None]: ...

    def reopen(self) -> None: ...


P = TypeVar("P", bound=Place)


class Absence(NamedTuple):
    """``device`` is not there for a ``reason``; it has been waited for so many ``seconds``, of at most ``patience``."""

    device: Place
    reason: str
    seconds: float
    patience: float


Tell = Callable[[Absence], None]


def surviving(work: Callable[[], T], have_again: Callable[[DeviceLost], object]) -> T:
    """``work()``, done again after ``have_again`` each time that it loses its device."""
    for losses in count(1):
        try:
            return work()
        except DeviceLost as lost:
            if losses == LOSSES:
                raise
            have_again(lost)
    raise AssertionError


def first_back(
    choices: Sequence[P],
    lost: DeviceLost,
    patience: float,
    accept: Callable[[P], object] = lambda _: None,
    tell: Tell = lambda _: None,
) -> P:
    """Wait for a device after the first of ``choices`` was lost, and return the first of them that is there and that
    ``accept`` has nothing against, as long as it takes, but at most ``patience`` seconds (0: don't wait).

    ``accept`` raises what speaks against a device, in the device's turn. ``tell`` is told about each second how long
    it has been; it may raise to end the waiting. Raises :class:`DeviceGone`; ``lost`` itself when there is no patience;
    :class:`DoesNotFit` or :class:`OutOfMemory` when a device is back but has too little room.
    """
    if patience <= 0:
        raise lost
    began = time.monotonic()
    pause, most = _PAUSE
    why: SdrpcError = lost
    while True:
        found, refusal = _first(choices, accept)
        if found is not None:
            return found
        why = refusal or why
        left = patience - (time.monotonic() - began)
        if left <= 0:
            back = isinstance(why, DoesNotFit | OutOfMemory)
            raise why if back else DeviceGone(choices[0].name, lost, patience, why) from lost
        until = time.monotonic() + min(pause, left)
        while (rest := until - time.monotonic()) > 0:
            tell(Absence(choices[0], str(why), time.monotonic() - began, patience))
            time.sleep(min(rest, 1.0))
        pause = min(pause * 1.5, most)


def _first(choices: Sequence[P], accept: Callable[[P], object]) -> tuple[P, None] | tuple[None, SdrpcError | None]:
    """The first device that is there and accepted; else what speaks against the first of all."""
    against: SdrpcError | None = None
    for device in choices:
        try:
            with device.turns:
                device.reopen()
                accept(device)
            return device, None
        except NOT_YET as refusal:
            against = against or refusal
    return None, against
