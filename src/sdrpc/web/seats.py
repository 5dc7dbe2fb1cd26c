"""Seats: where pictures are drawn, each on devices of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, Protocol

from ..device import Device
from ..diffusion.events import Cancel, OnEvent
from ..diffusion.pictures import Picture, Video
from ..diffusion.request import Request, Settings
from ..diffusion.session import Session
from ..errors import SdrpcError
from ..families.model import Model, ModelFiles
from ..runtime.chain import Lanes, devices_of
from .devices import Shown
from .jobs import Kind

Placed = Mapping[str, Sequence[Lanes]]
"""Where each component may be, in order of preference."""

Place = Callable[[Model], Placed]
"""A model → where its components may be. Raises :class:`InvalidValue`."""

Fit = Callable[[Model, Placed, Collection[str]], Placed]
"""A model, where its components are, and those that stay there → where a plan has the others, made while the model's
weights are nowhere. Raises :class:`DoesNotFit`."""


class Opening(NamedTuple):
    """A model that is to be drawn with. ``options``: those of :class:`Session`, by name. ``placed``: where its
    components go, of a seat at devices of this process."""

    model: Model
    files: ModelFiles
    options: Mapping[str, Any]
    placed: Placed | None = None


class Drawing(Protocol):
    """What a seat draws with: a :class:`Session`, or what stands for one in another process."""

    @property
    def model(self) -> Model: ...

    def settings(self, request: Request, video: bool = False) -> Settings: ...

    def draw(self, settings: Settings, on_event: OnEvent, cancel: Cancel) -> Iterator[Picture]: ...

    def draw_video(self, settings: Settings, on_event: OnEvent, cancel: Cancel) -> Iterator[Video]: ...

    def close(self) -> None: ...


class Seat(ABC):
    """Where one picture is drawn at a time. ``kinds``: of jobs that can be made there."""

    name: str
    kinds: frozenset[Kind] = frozenset({Kind.PICTURES})
    lost: Sequence[Device] = ()
    """Devices of this process that it waits for."""

    def ready(self) -> bool:
        """Whether it can take a job now. May wait to find out."""
        return True

    def lose(self, devices: Sequence[Shown]) -> None:
        """One of these ``devices``, which it drew on, was lost: it is ready when they are there again."""

    @abstractmethod
    def open(self, opening: Opening) -> Drawing:
        """Something to draw with. Raises :class:`InvalidValue` where the devices that were asked for are not there."""

    @abstractmethod
    def devices(self, model: Model) -> Sequence[Shown]:
        """Those that ``model`` uses here."""


@dataclass
class OwnSeat(Seat):
    """A name, and where models go there: on devices of this process. ``upscaler``: where networks run that enlarge
    pictures; ``fit``: where components go that somebody leaves to a plan."""

    name: str
    place: Place
    upscaler: Callable[[], Device]
    fit: Fit
    kinds: frozenset[Kind] = frozenset(Kind)
    lost: Sequence[Device] = ()

    def ready(self) -> bool:
        self.lost = [device for device in self.lost if not _is_there(device)]
        return not self.lost

    def lose(self, devices: Sequence[Shown]) -> None:
        self.lost = [device for device in devices if isinstance(device, Device)]

    def open(self, opening: Opening) -> Session:
        placed = opening.placed or self.place(opening.model)
        return Session(opening.model, placed, upscaler=self.upscaler(), **opening.options)

    def devices(self, model: Model) -> Sequence[Device]:
        return devices_of(chain.from_iterable(self.place(model).values()))


def _is_there(device: Device) -> bool:
    """Whether a device that may have been lost can be had."""
    try:
        with device.turns:
            device.reopen()
    except SdrpcError:
        return False
    return True
