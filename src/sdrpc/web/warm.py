"""The model that a seat keeps on its devices from one job to the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ..errors import SdrpcError
from ..families.model import Model
from ..runtime.chain import devices_of
from .devices import Shown
from .placements import Chosen
from .seats import Drawing, Opening, Placed, Seat
from .shelf import Shelf


@dataclass(frozen=True)
class Adapters:
    """Where LoRAs are found by name, and how they are applied (of :data:`sdrpc.diffusion.request.APPLY_MODES`);
    ``words``: where learnt words are."""

    folder: Path
    mode: str
    words: Path | None = None


class Warm:
    """The session of a seat, with the model of its last job. ``chosen``: a model's name → what somebody put where;
    ``place``: a model and its name → where its components are to be, asked while its weights are nowhere."""

    def __init__(
        self,
        seat: Seat,
        shelf: Shelf,
        chosen: Callable[[str], Chosen],
        place: Callable[[str, Model], Placed | None],
        retry: float,
        adapters: Adapters,
        memory: Mapping[str, Any],
    ) -> None:
        self._seat, self._shelf, self._chosen, self._place = seat, shelf, chosen, place
        self._retry, self._adapters, self._memory = retry, adapters, memory
        self._session: Drawing | None = None
        self._wanted: Chosen = {}
        self._used = 0.0
        self.model: str | None = None
        self.devices: Sequence[Shown] = ()
        """Those that its components are on."""

    @property
    def idle_seconds(self) -> float:
        """Since the last job was over; 0 where there is nothing to put aside."""
        return time.monotonic() - self._used if self._session else 0.0

    def session(self, name: str) -> Drawing:
        """A session with the model called ``name``, where it is to be now. Raises what :meth:`Shelf.open` and
        :meth:`Seat.open` raise."""
        _, model = self._shelf.open(name)
        wanted = self._chosen(name)
        if self._session is None or (self.model, self._wanted) != (name, wanted):
            self.close()
            placed = self._place(name, model)
            adapters = self._adapters
            options = {
                "retry": self._retry, "lora_dir": adapters.folder, "lora_apply_mode": adapters.mode,
                "embd_dir": adapters.words, **self._memory,
            }  # fmt: skip
            self._session = self._seat.open(Opening(model, self._shelf.find(name)[1], options, placed))
            self.model, self._wanted = name, wanted
            self.devices = self._seat.devices(model) if placed is None else devices_of(chain(*placed.values()))
        return self._session

    def rest(self) -> None:
        """A job is over: it is idle from now on."""
        self._used = time.monotonic()

    def close(self) -> None:
        session, self._session, self.model = self._session, None, None
        if session:
            with suppress(SdrpcError):  # a device that is gone has freed it
                session.close()
