"""Devices that compute one graph together, one after the other, and graphs that were cut for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ..device import Device, Later, Span, Target
from ..errors import UsageError
from .cutting import Part
from .run import Executable, Place


@dataclass(frozen=True)
class Chain:
    """``devices`` that a component's graphs are cut for, in the order in which they compute; mostly there is one. One
    that is there several times computes several parts, whose weights take turns on it. ``rooms``: bytes of weights that
    each part may have; None: as many as its device has room for."""

    devices: tuple[Device, ...]
    rooms: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.devices:
            raise UsageError("a component needs a device")

    @property
    def name(self) -> str:
        """As users write it: ``RPC0&RPC1``."""
        return "&".join(dict.fromkeys(device.name for device in self.devices))

    @property
    def life(self) -> tuple[int, ...]:
        """That of each device."""
        return tuple(device.life for device in self.devices)

    @property
    def sent(self) -> int | None:
        """Bytes of tensors that were sent over a network; None where there is none."""
        known = [device.sent for device in self.devices if device.sent is not None]
        return sum(known) if known else None

    @property
    def target(self) -> Target:
        """Which graphs all of the devices take."""
        targets = [device.target for device in self.devices]
        least = min(targets, key=lambda target: (target.managed, len(target.ops)))
        return replace(least, types=frozenset.intersection(*(target.types for target in targets)))

    @cached_property
    def turns(self) -> Turn:
        """To use all of the devices. Everybody takes them in the same order, so nobody waits for another in a ring."""
        return Turn(self.devices)

    def reopen(self) -> None:
        """Have those devices again that were lost. Raises :class:`sdrpc.errors.ConnectionFailed` and its like."""
        for device in self.devices:
            device.reopen()


@dataclass(frozen=True)
class Lanes:
    """``chains`` that each have all of a component, side by side: they compute different inputs at the same time."""

    chains: tuple[Chain, ...]

    def __post_init__(self) -> None:
        devices = [device for chain in self.chains for device in set(chain.devices)]
        if not self.chains or len(set(devices)) < len(devices):
            raise UsageError(f"{self.name or 'nothing'}: what is side by side has to be different devices")

    @property
    def name(self) -> str:
        """As users write it: ``RPC0|RPC1``."""
        return "|".join(chain.name for chain in self.chains)


Placed = Device | Chain | Lanes
"""Where a component may be."""


def lanes(placed: Placed) -> Lanes:
    """``placed`` as what it is in general."""
    if isinstance(placed, Lanes):
        return placed
    return Lanes((placed if isinstance(placed, Chain) else Chain((placed,)),))


def choices(placed: Placed | Sequence[Placed]) -> tuple[Lanes, ...]:
    """One place, or several in order of preference."""
    several = (placed,) if isinstance(placed, Device | Chain | Lanes) else placed
    return tuple(lanes(each) for each in several)


def devices_of(places: Iterable[Lanes]) -> list[Device]:
    """The devices of ``places``."""
    return list(dict.fromkeys(device for place in places for some in place.chains for device in some.devices))


class Turn:
    """A turn at several devices; for one thread after the other, as :class:`sdrpc.device.Turns`."""

    def __init__(self, devices: Sequence[Device]) -> None:
        self._turns = sorted({device.turns for device in devices}, key=id)

    def __enter__(self) -> None:
        for taken, turns in enumerate(self._turns):
            try:
                turns.__enter__()
            except BaseException:
                for mine in reversed(self._turns[:taken]):
                    mine.__exit__()
                raise

    def __exit__(self, *_: object) -> None:
        for turns in reversed(self._turns):
            turns.__exit__()


PIECE = 4 << 20
"""Bytes of a value that are sent on while those behind them come."""


class _Crossing(NamedTuple):
    """A value on the device that has computed it."""

    device: Device
    place: Place
    nbytes: int


def _cross(values: Sequence[tuple[_Crossing, Sequence[Place]]], device: Device) -> None:
    """Bring each value to its places on another ``device``."""
    asked: deque[tuple[Later, list[Place]]] = deque()
    for (source, (buffer, offset), nbytes), there in values:
        span = Span(source, buffer, offset, nbytes)
        if all(source.copy_to(span, Span(device, *at, nbytes)) for at in there):
            continue
        for start in range(0, nbytes, PIECE):
            awaited = source.read_later(buffer, offset + start, min(PIECE, nbytes - start))
            asked.append((awaited, [(target, at + start) for target, at in there]))
    while asked:
        awaited, places = asked.popleft()
        data = awaited.wait()
        for place in places:
            device.write(*place, data)


class Chained:
    """A graph whose ``parts`` are on devices, as an :class:`Executable` is a whole one.

    Values cross a cut once in each run, as the numbers that they are: from one device of a server to another without
    coming here, else through here, each sent on when it has come. Parts on one device take turns: ``leave`` is called
    with the number of each that has to go before another one runs there, and what it gives is read before.
    """

    def __init__(self, parts: Sequence[tuple[Part, Executable]], leave: Callable[[int], None]) -> None:
        self.parts = parts
        self._leave = leave

    def results(self, inputs: Mapping[str, Any]) -> Iterator[np.ndarray]:
        """As :meth:`Executable.results`, but ``inputs`` may have more than the graph's. Outputs of the last part are
        read from its device when they are asked for."""
        values, found, there = dict(inputs), dict[int, np.ndarray](), dict[str, _Crossing]()
        for number, (part, program) in enumerate(self.parts[:-1]):
            results = self._run(number, values, there)
            given = len(part.gives)
            if self._in_turns or part.results:
                read = list(results)
                found |= zip(part.results, read[given:], strict=True)
                values |= zip(part.gives, read[:given], strict=True) if self._in_turns else ()
            if not self._in_turns:
                there |= {name: _Crossing(program.device, *program.output(n)) for n, name in enumerate(part.gives)}
        rest = self._run(len(self.parts) - 1, values, there)
        return self._in_order(found, rest)

    @property
    def _in_turns(self) -> bool:
        return len({id(program.device) for _, program in self.parts}) < len(self.parts)

    def _in_order(self, found: Mapping[int, np.ndarray], rest: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for number in sorted((*found, *self.parts[-1][0].results)):
            yield found[number] if number in found else next(rest)

    def _run(self, number: int, values: Mapping[str, Any], there: Mapping[str, _Crossing]) -> Iterator[np.ndarray]:
        program = self.parts[number][1]
        for other, (_, theirs) in enumerate(self.parts):
            if other != number and theirs.device is program.device:
                self._leave(other)
        wanted = {entry.name for entry in program.lowered.inputs}
        here = {name: value for name, value in values.items() if name in wanted}
        if missing := wanted - here.keys() - there.keys():
            raise UsageError(f"input {', '.join(sorted(missing))} is missing")
        places = program.prepare(here, there)
        _cross([(there[name], places[name]) for name in places], program.device)
        return program.started()

    def suspend(self, number: int) -> None:
        """Free what part ``number`` has on its device until it runs again."""
        self.parts[number][1].suspend()

    def close(self) -> None:
        """Free its memory."""
        for _, program in self.parts:
            program.close()
