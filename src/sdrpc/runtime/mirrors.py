"""The same arrays on several devices, each of which computes what is computed with them.

Devices that evaluate one prompt each all need what a sampler makes of their predictions. So each of them does the
sampler's arithmetic, with the same numbers, and predictions are all that travels: from one device of a server to
another by the server itself, between servers through this process. There it waits for predictions and for nothing
else: all that follows from one is made while it is on its way, and sent right behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..device import Device, first_of
from .ahead import Ahead, DeviceArray
from .chain import Turn
from .elsewhere import Array, Elsewhere


class Mirrored(Elsewhere):
    """An array that has a copy on each of several devices."""

    def __init__(self, mirrors: Mirrors, copies: Sequence[DeviceArray]) -> None:
        self.mirrors, self.copies = mirrors, tuple(copies)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.copies[0].shape

    def read(self) -> Array:
        return self.copies[0].read()

    def rows(self, rows: Any) -> Mirrored | None:
        found = [copy.rows(rows) for copy in self.copies]
        there = [each for each in found if each is not None]
        return Mirrored(self.mirrors, there) if len(there) == len(found) else None

    def apply(self, op: str, *others: Any) -> Any:
        """On each device; by numpy where it is nothing for them."""
        made: list[DeviceArray] = []
        for number, copy in enumerate(self.copies):
            result = copy.apply(op, *(each.copies[number] if isinstance(each, Mirrored) else each for each in others))
            if not isinstance(result, DeviceArray):
                return result
            made.append(result)
        return Mirrored(self.mirrors, made)


class Mirrors:
    """Several ``devices`` that are told what to compute before it is their turn, with the same arrays on all of them.
    ``close`` frees what it has there."""

    def __init__(self, devices: Sequence[Device]) -> None:
        self.devices = tuple(devices)
        self.turns = Turn(devices)
        with self.turns:
            self._aheads = [Ahead(device, self.turns) for device in devices]
        self._travels = False
        """Whether arrays go through this process, because the devices do not copy them among themselves."""

    @property
    def there(self) -> bool:
        """Whether all devices are in the life in which this was made."""
        return all(ahead.life == ahead.device.life for ahead in self._aheads)

    def put(self, array: Array) -> Mirrored:
        """``array`` on all devices."""
        return Mirrored(self, [ahead.put(array) for ahead in self._aheads])

    def shared(self, arrays: Sequence[Any]) -> list[Mirrored]:
        """Each of the ``arrays``, which are here or on one of the devices, on all of them."""
        there = [array for array in arrays if isinstance(array, DeviceArray)]
        if len(there) < len(arrays):
            return [self.put(np.asarray(array)) for array in arrays]
        return self._sent(there)

    def _sent(self, arrays: Sequence[DeviceArray]) -> list[Mirrored]:
        with self.turns:
            copied = None if self._travels else self._copied(arrays)
            if copied is not None:
                return copied
            self._travels = True
            asked = [array.ahead.ask(array) for array in arrays]
            self._settle()
            return [
                Mirrored(self, [a if a.ahead is each else each.arriving(awaited, a.shape) for each in self._aheads])
                for a, awaited in zip(arrays, asked, strict=True)
            ]

    def _copied(self, arrays: Sequence[DeviceArray]) -> list[Mirrored] | None:
        """The same where the devices copy among themselves; else None."""
        found = []
        for array in arrays:
            copies = [array if array.ahead is ahead else ahead.copied(array) for ahead in self._aheads]
            there = [each for each in copies if each is not None]
            if len(there) < len(copies):
                return None
            found.append(Mirrored(self, there))
        return found

    def _settle(self) -> None:
        """Tell the devices what waits for predictions that were asked for before; each when its one comes, so that one
        which is late has all that follows before it is there itself."""
        while waiting := [(ahead, ahead.awaited) for ahead in self._aheads if ahead.awaited is not None]:
            ahead, _ = waiting[first_of([awaited for _, awaited in waiting if awaited is not None])]
            ahead.go_on()

    # --- how far the devices are: all that is told of it is told of the first

    def begin(self) -> None:
        """As :meth:`Ahead.begin`."""
        for ahead in self._aheads:
            ahead.begin()

    def then(self, told: Callable[[], None]) -> None:
        """As :meth:`Ahead.then`."""
        self._aheads[0].then(told)

    def tell(self) -> None:
        """As :meth:`Ahead.tell`."""
        self._aheads[0].tell()

    def close(self) -> None:
        """Free its memory on the devices that are still in the same life, in whose turns this is."""
        for ahead in self._aheads:
            if ahead.life == ahead.device.life:
                ahead.close()
