"""A model's components on devices: which is where, who leaves for whom, and what happens when a device is lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import chain, count, islice
from typing import Any, TypeVar

import numpy as np

from ..device import Device
from ..errors import DeviceLost, DoesNotFit, Room
from ..families.base import F32, ModuleSpec
from ..families.lora import Lora
from ..families.model import Model
from ..runtime.ahead import Ahead, DeviceArray
from ..runtime.cache import Cache
from ..runtime.chain import Chain, Lanes, devices_of
from ..runtime.lost import RETRY_SECONDS, Absence, first_back, surviving
from ..runtime.mirrors import Mirrors
from .device_component import DeviceComponent, Shaped
from .events import Event, Stage
from .fitting import nearest
from .rooms import WORKING_ROOM, beside_work, limited
from .stage_timer import StageTimer
from .telling import Telling

T = TypeVar("T")

QUIET_SECONDS = 10.0
"""A device that says nothing for so long, though it should, is worth a word."""

LAYERS = 64
"""Parts that a component may be computed in, one after the other on one device."""


class DeviceModel:
    """A model with its components on devices, by name. Close it when done.

    Weights stay where they are until another component needs the room: then those that were used longest ago leave.
    """

    def __init__(
        self,
        model: Model,
        placement: Mapping[str, Sequence[Lanes]],
        cache: Cache,
        timer: StageTimer,
        retry: float = RETRY_SECONDS,
        limits: Mapping[str, int] | None = None,
        waits: Mapping[str, str] | None = None,
    ) -> None:
        self.model = model
        self._limits = limits or {}
        self.retry = retry
        """Seconds to wait for a device that was lost."""
        self.telling = Telling()
        self._lanes = {
            name: [
                DeviceComponent(
                    component, choices, cache, timer, self.telling, self._make_room, (waits or {}).get(name, "auto")
                )
                for choices in _of_each_lane(placement[name])
            ]
            for name, component in model.components.items()
        }
        self._uses = count(1)
        self._aheads: dict[DeviceComponent, Ahead] = {}
        self._mirrors: dict[tuple[DeviceComponent, ...], Mirrors] = {}

    def lanes(self, name: str) -> int:
        """On how many chains of devices, side by side, component ``name`` is."""
        return len(self._lanes[name])

    def cut(self, name: str) -> bool:
        """Whether component ``name`` is on several devices one after the other, or on one a part at a time."""
        return any(len(component.chain.devices) > 1 for component in self._lanes[name])

    def devices(self, name: str, lane: int) -> tuple[Device, ...]:
        """Where component ``name`` is in that lane, if its first choice does."""
        return self._component(name, lane).choices[0].devices

    def leave_devices(self, *names: str) -> None:
        """These components are not used for now: the weights of those that do not wait on their devices leave them."""
        for component in chain.from_iterable(self._lanes.get(name, ()) for name in names):
            if component.waits != "auto" and any(map(component.has, component.chain.devices)):
                size = component.nbytes
                with component.chain.turns:
                    for device in dict.fromkeys(component.chain.devices):
                        component.leave(device)
                why = "until it is used again"
                self.telling.on_event(Event("release", component.name, size, size, reason=why))

    def resident(self, names: Collection[str], lane: int) -> bool:
        """Whether those of these components that there are have their weights on their devices."""
        return all(self._component(name, lane).resident for name in names if name in self._lanes)

    def waits(self, name: str) -> bool:
        """Whether component ``name`` leaves its devices while it is not used."""
        return any(component.waits != "auto" for component in self._lanes[name])

    def _component(self, name: str, lane: int = 0) -> DeviceComponent:
        lanes = self._lanes[name]
        return lanes[lane % len(lanes)]

    @property
    def _components(self) -> Iterator[DeviceComponent]:
        return chain.from_iterable(self._lanes.values())

    def check_fits(self) -> None:
        """Give each component the first of its choices that has room for its weights; nothing has been uploaded then.

        Raises :class:`DoesNotFit`, with the numbers of all choices, when none has, and of all components that find no
        room in the same places.
        """
        refused: list[tuple[DeviceComponent, DoesNotFit]] = []
        for component in self._components:
            try:
                self._surviving(component, partial(self._choose, component))
            except DoesNotFit as refusal:
                refused.append((component, refusal))
        if refused:
            together = [(one, why) for one, why in refused if why.rooms.keys() == refused[0][1].rooms.keys()]
            largest, why = max(together, key=lambda pair: pair[0].nbytes)
            sizes = {name: size for _, each in together for name, size in each.sizes.items()}
            raise DoesNotFit(sizes, why.rooms, self._hint(largest))

    def adapt(self, loras: Sequence[tuple[Lora, float]], merge: bool) -> None:
        """Draw with these LoRAs from now on, each with its strength; ``merge``: into the weights."""
        for name, lanes in self._lanes.items():
            applied = [(lora.components[name], strength) for lora, strength in loras if name in lora.components]
            for component in lanes:
                component.adapt(applied, merge)

    def run(
        self, name: str, options: Mapping[str, Any], inputs: Mapping[str, np.ndarray], lane: int = 0
    ) -> tuple[F32, ...]:
        """The outputs of component ``name``, float32; ``options`` are added to its module's configuration. ``lane``:
        where, if it is on several chains of devices.

        A device that is lost meanwhile is waited for, or another one of the component's takes its place: weights are
        uploaded again, and the outputs are those that it would have given.
        """
        self.telling.check()
        component = self._component(name, lane)
        module = component.component.module(**options)

        def work() -> tuple[F32, ...]:
            with component.chain.turns, self._listening(component):
                component.settle(component.chain)
                return tuple(self._started(component, module, inputs))

        return self._surviving(component, work)

    def ahead(self, name: str, lane: int = 0, *beside: str, waited_for: bool = False) -> Ahead | None:
        """For arrays that stay on component ``name``'s device; None where that does not queue what it is told, unless
        it is ``waited_for`` anyway, or is several, or where one of the components ``beside``, which is given such
        arrays as well, is elsewhere."""
        component = self._component(name, lane)
        device = self._alone(component, beside)
        if device is None or not (device.queues or waited_for):
            return None
        found = self._aheads.get(component)
        if found is None or (found.device, found.life) != (device, device.life):
            with device.turns:
                found = self._aheads[component] = Ahead(device)
        return found

    def mirrors(self, name: str, lanes: Sequence[int], *beside: str) -> Mirrors | None:
        """For arrays that are on the devices of all these lanes of component ``name``; None where :meth:`ahead` would
        give that for one of them."""
        components = tuple(self._component(name, lane) for lane in lanes)
        devices = [self._alone(component, beside) for component in components]
        there = [device for device in devices if device is not None and device.queues]
        if len(there) < len(devices):
            return None
        found = self._mirrors.get(components)
        if found is None or found.devices != tuple(there) or not found.there:
            if found is not None:
                with found.turns:
                    found.close()
            found = self._mirrors[components] = Mirrors(there)
        return found

    def _alone(self, component: DeviceComponent, beside: Sequence[str]) -> Device | None:
        """The device that has all of ``component``, and of those ``beside``, if there is one."""
        device, *others = component.chain.devices
        if others or any(self._component(each).chain.devices != (device,) for each in beside):
            return None
        return device

    def run_ahead(
        self, name: str, options: Mapping[str, Any], inputs: Shaped, ahead: Ahead, lane: int = 0
    ) -> list[DeviceArray]:
        """As :meth:`run`, with inputs on the device, and the outputs left there. A device that is lost is an error."""
        self.telling.check()
        component = self._component(name, lane)
        with ahead.turns, self._listening(component):
            component.settle(component.chain)
            self._begin(component)
            found = component.run_ahead(ahead, component.component.module(**options), inputs)
        ahead.tell()
        return found

    def stream(self, name: str, options: Mapping[str, Any], inputs: Mapping[str, np.ndarray]) -> Iterator[F32]:
        """As :meth:`run`, but an output is read from the device when it is asked for, so that they need not fit into
        this machine's memory together. That has to be before the component runs again."""
        component = self._component(name)
        module = component.component.module(**options)
        outputs: Iterator[F32] = iter(())
        place: tuple[Chain, tuple[int, ...]] | None = None
        """Where ``outputs`` are: devices in one of their lives."""
        given = 0

        def following() -> F32 | None:
            nonlocal outputs, place
            with component.chain.turns, self._listening(component):
                component.settle(component.chain)
                if place != (component.chain, component.chain.life):
                    outputs = islice(self._started(component, module, inputs), given, None)
                    place = component.chain, component.chain.life
                return next(outputs, None)

        while True:
            self.telling.check()
            output = self._surviving(component, following)
            if output is None:
                return
            given += 1
            yield output

    def _started(
        self, component: DeviceComponent, module: ModuleSpec, inputs: Mapping[str, np.ndarray]
    ) -> Iterator[F32]:
        """The outputs of a component that runs on its devices."""
        self._begin(component)
        return component.run(module, inputs)

    def _begin(self, component: DeviceComponent) -> None:
        """A component is used: others leave before it."""
        component.last_used = next(self._uses)

    def unused(self) -> dict[str, list[str]]:
        """Per file, the names of the tensors that no component uses; complete once a picture was drawn."""
        found = self.model.unused([weight for component in self._components for weight in component.taken])
        return {str(path): names for path, names in found.items()}

    def close(self) -> None:
        """Free everything on the devices."""
        for ahead in self._aheads.values():
            if ahead.life == ahead.device.life:
                with ahead.device.turns:
                    ahead.close()
        self._aheads.clear()
        for mirrors in self._mirrors.values():
            with mirrors.turns:
                mirrors.close()
        self._mirrors.clear()
        for component in self._components:
            with component.chain.turns:
                component.release()

    def _on(self, device: Device) -> list[DeviceComponent]:
        """The components that have something on ``device``."""
        return [component for component in self._components if component.has(device)]

    def _choose(self, component: DeviceComponent) -> None:
        """Settle on the first choice with room, if it has none yet; where its weights need not stay on a device, also
        on one that has room for a part of them at a time."""
        refusals: list[DoesNotFit] = []
        for place in (component.chain, *component.choices):
            try:
                with place.turns:
                    component.settle(place, self._check_room(component, place))
                return
            except DoesNotFit as refusal:
                refusals.append(refusal)
        for place in component.choices if component.waits != "auto" else ():
            with place.turns:
                layers = self._in_turns(component, place)
                if layers is not None:
                    component.settle(layers)
                    return
        rooms = {place: each for refusal in refusals for place, each in refusal.rooms.items()}
        raise DoesNotFit(refusals[0].sizes, rooms, self._hint(component))

    def _room(self, device: Device) -> Room:
        """What a device has for a component's weights without all others'."""
        return limited(device, device.memory().free + self._there(device), self._limits)

    def _there(self, device: Device) -> int:
        """Bytes of weights that are on a device."""
        return sum(component.has(device) for component in self._on(device))

    def _check_room(self, component: DeviceComponent, place: Chain) -> tuple[int, ...]:
        """Bytes that each device of ``place`` has for the component's weights. Raises :class:`DoesNotFit` when they are
        too few."""
        if place.rooms is not None or (component.resident and component.chain == place):
            return ()
        rooms = tuple(map(self._room, place.devices))
        if (needed := component.nbytes_on(place)) > sum(room.size for room in rooms):
            raise DoesNotFit({component.name: needed}, {place.name: rooms}, self._hint(component))
        return tuple(room.size for room in rooms)

    def _hint(self, component: DeviceComponent) -> str:
        """What would do for a component that has too little room."""
        devices = devices_of(Lanes((place,)) for one in self._components for place in (one.chain, *one.choices))
        rooms = {device.name: self._room(device).size for device in devices}
        return nearest(component.name, component.nbytes, component.largest(), rooms)

    def _in_turns(self, component: DeviceComponent, place: Chain) -> Chain | None:
        """A device several times, for as many parts of a component as it has room for one of."""
        device, *others = place.devices
        free, limited = self._room(device)
        room = free if limited else beside_work(free)
        apart = room - component.largest()
        layers = -(-component.nbytes // apart) if apart > 0 else LAYERS + 1
        if others or layers > LAYERS:
            return None
        return Chain((device,) * layers, (room,) * layers)

    # --- devices that are lost

    def _surviving(self, component: DeviceComponent, work: Callable[[], T]) -> T:
        """``work`` with the component, done again when that loses a device."""

        def have_again(lost: DeviceLost) -> None:
            before, began = component.chain, time.monotonic()
            choices = (before, *(place for place in component.choices if place != before))
            found = first_back(choices, lost, self.retry, lambda place: self._check_room(component, place), absent)
            with found.turns:
                component.settle(found, self._check_room(component, found))
            stage: Stage = "reconnected" if found is before else "moved"
            seconds = time.monotonic() - began
            self.telling.on_event(Event(stage, component.name, 1, 1, seconds=seconds, device=found.name))

        def absent(absence: Absence) -> None:
            self._tell_waiting(component, absence)

        return surviving(work, have_again)

    @contextmanager
    def _listening(self, component: DeviceComponent) -> Iterator[None]:
        """Tell when a device of the component says nothing for long, and when it does again."""
        longest: dict[Device, float] = {}

        def silent(device: Device, seconds: float) -> None:
            if seconds < QUIET_SECONDS:
                speaks(device)
                return
            longest[device] = seconds
            self._tell_waiting(component, Absence(device, "it does not answer", seconds, self.retry))

        def speaks(device: Device) -> None:
            if seconds := longest.pop(device, 0.0):
                event = Event("reconnected", component.name, 1, 1, seconds=seconds, device=device.name)
                self.telling.on_event(event)

        devices = component.chain.devices
        with ExitStack() as stack:
            for device in devices:
                stack.enter_context(device.watched(partial(silent, device)))
            yield
        for device in devices:
            speaks(device)

    def _tell_waiting(self, component: DeviceComponent, absence: Absence) -> None:
        device, reason, seconds, patience = absence
        self.telling.on_event(
            Event(
                "waiting", component.name, int(seconds), max(int(patience), int(seconds) + 1), seconds=seconds,
                device=device.name, reason=reason,
            )
        )  # fmt: skip
        self.telling.check()

    def _make_room(self, component: DeviceComponent) -> None:
        """Let weights leave the component's devices, those that were used longest ago first, until its own fit."""
        for device in dict.fromkeys(component.chain.devices):
            others = [other for other in self._on(device) if other is not component]
            others.sort(key=lambda other: other.last_used)
            more = component.needs(device) - component.has(device)

            def is_full(device: Device = device, more: int = more) -> bool:
                room = self._room(device).size
                return device.memory().free < more + WORKING_ROOM or room < self._there(device) + more

            while others and is_full():
                other = others.pop(0)
                size = other.has(device)
                other.leave(device)
                why = "where another component needs the room"
                self.telling.on_event(Event("release", other.name, size, size, reason=why))


def _of_each_lane(choices: Sequence[Lanes]) -> Iterator[list[Chain]]:
    """The chains of each lane, in order of preference: the first of the choices says how many lanes there are."""
    for lane in range(len(choices[0].chains)):
        yield [choice.chains[lane % len(choice.chains)] for choice in choices]
