"""Bytes to an accelerator and back, through memory of the host that it reads itself."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from threading import Condition
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdrpc.device import Later

PIECE = 1 << 20
PIECES = 16
LARGE_PIECE = 4 << 20
"""What a server receives at a time (:data:`sdrpc.content.PIECE`)."""
LARGE_PIECES = 16
"""Of memory that bytes are received into: each is in the hands of a client's thread for as long as the client takes to
send, so beyond these there is none, and whoever comes then takes ordinary memory."""


class Slot(NamedTuple):
    """Pinned memory, and the moment from which on nobody reads it any more."""

    memory: Tensor
    free: torch.cuda.Event


@dataclass(frozen=True, eq=False)
class Reading(Later):
    """Bytes on their way from the device."""

    memory: Tensor
    done: torch.cuda.Event

    def ready(self) -> bool:
        return bool(self.done.query())  # type: ignore[no-untyped-call]

    def wait(self) -> memoryview:
        self.done.synchronize()
        host: np.ndarray = self.memory.numpy()
        return host.data


class Staging:
    """Pinned memory for one CUDA (or ROCm) device; any thread may use it.

    A copy from ordinary memory waits for all that the device has to do. From here it is only queued, so that a client
    can be steps ahead of the device; at most ``PIECES`` copies wait, then :meth:`write` does.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._slots: deque[Slot] = deque()
        self._large: deque[Slot] = deque()
        self._made = self._large_made = 0
        self._changed = Condition()

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        """The device's usual stream."""
        return torch.cuda.default_stream(self._device)

    def write(self, target: Tensor, data: memoryview) -> None:
        """Copy ``data`` to ``target`` (uint8, of as many elements), after all that is queued. ``data`` may change when
        this returns."""
        source = np.frombuffer(data, np.uint8)
        with torch.cuda.device(self._device):
            for start in range(0, len(source), PIECE):
                piece = source[start : start + PIECE]
                slot = self._take()
                try:
                    slot.free.synchronize()
                    np.copyto(slot.memory.numpy()[: len(piece)], piece)
                    target[start : start + len(piece)].copy_(slot.memory[: len(piece)], non_blocking=True)
                    slot.free.record()
                finally:
                    self._give(slot)

    @contextmanager
    def lent(self, size: int) -> Iterator[Slot | None]:
        """A slot of ``size`` bytes or more, which nobody else uses within the context. None for more than there is in a
        piece, or where all such memory is in use."""
        slot = self._take_large() if size <= LARGE_PIECE else None
        if slot is None:
            yield None
            return
        try:
            if not slot.free.query():  # type: ignore[no-untyped-call]
                slot.free.synchronize()
            yield slot
        finally:
            with self._changed:
                self._large.append(slot)

    @contextmanager
    def filled(self, size: int, fill: Callable[[memoryview], None]) -> Iterator[Tensor | None]:
        """``size`` bytes of pinned memory in which ``fill`` has put something, to be copied from within the context on
        the device's usual stream. None where :meth:`lent` has nothing: then nothing was done."""
        with self.lent(size) as slot:
            if slot is None:
                yield None
                return
            fill(slot.memory.numpy().data[:size])
            yield slot.memory[:size]
            slot.free.record(self._stream)

    def read_to(self, slot: Slot, source: Tensor) -> None:
        """Copy ``source`` (uint8) to the start of ``slot`` when all that is queued before is done: it is there once the
        slot is free."""
        slot.memory[: len(source)].copy_(source, non_blocking=True)
        slot.free.record(self._stream)

    def read(self, source: Tensor) -> memoryview:
        """The bytes of ``source`` (uint8) when all that is queued before is done."""
        return self.read_soon(source).wait()

    def read_soon(self, source: Tensor) -> Reading:
        """The same, without waiting."""
        with torch.cuda.device(self._device):
            memory = torch.empty(source.shape, dtype=torch.uint8, pin_memory=True)
            memory.copy_(source, non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
        return Reading(memory, done)

    def _take(self) -> Slot:
        """The slot that was used longest ago."""
        with self._changed:
            if self._made < PIECES:
                made = _slot(PIECE)
                self._made += 1  # not of one that the system refuses: who comes next would wait for it
                return made
            self._changed.wait_for(lambda: self._slots)
            return self._slots.popleft()

    def _give(self, slot: Slot) -> None:
        with self._changed:
            self._slots.append(slot)
            self._changed.notify()

    def _take_large(self) -> Slot | None:
        """The slot that was used longest ago, unless a new one is free sooner."""
        with self._changed:
            if self._large and (self._large_made == LARGE_PIECES or self._large[0].free.query()):  # type: ignore[no-untyped-call]
                return self._large.popleft()
            if self._large_made == LARGE_PIECES:
                return None
            made = _slot(LARGE_PIECE)
            self._large_made += 1
            return made


def _slot(size: int) -> Slot:
    return Slot(torch.empty(size, dtype=torch.uint8, pin_memory=True), torch.cuda.Event())  # type: ignore[no-untyped-call]
