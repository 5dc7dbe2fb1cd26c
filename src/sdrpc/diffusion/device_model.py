"""A model's components on devices: captured or found in the cache, uploaded when they are first needed, run."""

from __future__ import annotations

import logging
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain, count, islice
from math import prod
from threading import Lock, RLock
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ..checkpoints.deltas import Delta, can_merge, merged
from ..checkpoints.expressions import cast
from ..checkpoints.numbers import unpacked
from ..device import Device, Target
from ..device_names import folded
from ..errors import Cancelled, DeviceLost, DoesNotFit, Room
from ..families.base import F32, ModuleSpec
from ..families.lora import Lora
from ..families.model import Model, ModelComponent
from ..ggml.types import Type
from ..ggml.weight import Held, Weight
from ..runtime.adapters import STRENGTHS, Adapters, Changes, adapted, adapters
from ..runtime.ahead import Ahead, DeviceArray
from ..runtime.cache import Cache, key
from ..runtime.chain import Chain, Chained, Lanes, devices_of
from ..runtime.cutting import Part, parts, positions, profile, whole
from ..runtime.lost import RETRY_SECONDS, Absence, first_back, surviving
from ..runtime.lowered import Lowered
from ..runtime.mirrors import Mirrors
from ..runtime.run import Executable, WeightStore, held_as
from .events import Cancel, Event, OnEvent, Stage
from .fitting import nearest
from .stage_timer import StageTimer

T = TypeVar("T")

log = logging.getLogger(__name__)

GRAPHS = 16
"""Graphs (sizes of pictures, lengths of texts) that a component keeps on its device."""


Shaped = Mapping[str, Any]
"""Inputs by name, arrays here or on the device, of which shapes and dtypes decide the graph."""

WORKING_ROOM = 1 << 30
"""Bytes that should stay free beside a component's weights, for what it computes with."""

QUIET_SECONDS = 10.0
"""A device that says nothing for so long, though it should, is worth a word."""

_ONE_AT_A_TIME = Lock()
"""Sessions in several threads: one captures a graph, the others find it. What captures (a module that is imported when
it is first used, torch's modes) is not made for several at once."""


UNCUT = "there is no place to cut it so that each part has room; a device with more is needed, or a quantized file"

LAYERS = 64
"""Parts that a component may be computed in, one after the other on one device."""


class Telling:
    """Who wants to know what happens, and whether it shall stop; another one in each call of a session. They hear of
    one thing after the other, from whichever thread."""

    def __init__(self) -> None:
        self.listener: OnEvent = lambda _: None
        self.cancel: Cancel = lambda: False
        self._one_at_a_time = RLock()

    def on_event(self, event: Event) -> None:
        """Something happened."""
        with self._one_at_a_time:
            self.listener(event)

    def check(self) -> None:
        """Raises :class:`Cancelled` when the caller wants no more."""
        if self.cancel():
            raise Cancelled

    @contextmanager
    def stage(self, stage: Stage, component: str = "") -> Iterator[None]:
        """Tells when a stage begins and when it is over."""
        began = time.perf_counter()
        self.on_event(Event(stage, component))
        yield
        self.on_event(Event(stage, component, 1, 1, seconds=time.perf_counter() - began))


class _Share:
    """What a component has on one device: the weights of one part of its graphs, and the adapters' matrices for it."""

    def __init__(
        self, device: Device, weights: dict[str, Weight], added: dict[str, Weight], told: _OnUpload, source: object
    ) -> None:
        self.device, self.life = device, device.life
        self._told = told
        self._began, self._sent_before = 0.0, 0
        self.weights = WeightStore(device, weights, self._uploaded, source)
        self.adapters = WeightStore(device, added, self._uploaded, "the LoRAs")

    @property
    def resident(self) -> bool:
        """Whether there are weights on the device, in this life of it."""
        return self.weights.resident and self.life == self.device.life

    def leave(self) -> None:
        """Free its memory, until it is needed again."""
        self.weights.release()
        self.adapters.release()
        self.life = self.device.life

    def _uploaded(self, done: int, total: int) -> None:
        if not done:
            self._began, self._sent_before = time.perf_counter(), self.device.sent or 0
        sent = None if self.device.sent is None else self.device.sent - self._sent_before
        self._told(self.device, done, total, sent, time.perf_counter() - self._began)


class DeviceComponent:
    """A component on the first of the ``choices``, or on another one of them where that does not do. Each combination
    of module and input shapes is one graph; all share the uploaded weights. Where it is on a chain of devices, each
    graph is cut, all of them between the same weights.

    ``make_room`` is called before it takes memory. ``waits``: where its weights are while nobody uses them, of
    :data:`.placement.WAITING`."""

    def __init__(
        self,
        component: ModelComponent,
        choices: Sequence[Chain],
        cache: Cache,
        timer: StageTimer,
        telling: Telling,
        make_room: Callable[[DeviceComponent], None],
        waits: str = "auto",
    ) -> None:
        self.component, self.choices, self.waits = component, tuple(dict.fromkeys(choices)), waits
        self._cache, self._timer, self._telling, self._make_room = cache, timer, telling, make_room
        self._weights: dict[str, Weight] = {}
        self._adapter_weights: dict[str, Weight] = {}
        self._programs: OrderedDict[_Name, Chained] = OrderedDict()
        self._applied: tuple[Sequence[tuple[Changes, float]], bool] = (), False
        self._adapted = True
        self._adapters = adapters(())
        self._merges: dict[str, list[tuple[Delta, float]]] = {}
        self.last_used = 0
        """Rises with each use of any component: which one was used longest ago."""
        self._settle(self.choices[0], ())

    @property
    def name(self) -> str:
        return self.component.name

    @property
    def taken(self) -> tuple[Weight, ...]:
        """The weights that were uploaded, now or before."""
        return tuple(self._weights.values())

    @property
    def resident(self) -> bool:
        """Whether it has its weights on its devices."""
        return all(share.resident for share in self._shares)

    @property
    def nbytes(self) -> int:
        """Bytes of its weights on its devices."""
        return self.nbytes_on(self.chain)

    def nbytes_on(self, place: Chain) -> int:
        """Bytes of its weights as the devices of ``place`` hold them."""
        return self.component.found.nbytes(lambda stored: held_as(stored, place.target))

    def needs(self, device: Device) -> int:
        """Bytes of its weights that are on ``device`` at one time, or will be."""
        sizes = [size for part, size in enumerate(self._sizes()) if self.chain.devices[part] is device]
        return max(sizes, default=0)

    def has(self, device: Device) -> int:
        """Bytes of its weights that are on ``device`` now."""
        return self.needs(device) if any(s.device is device and s.resident for s in self._shares) else 0

    def _sizes(self) -> list[int]:
        """Bytes of each part: those of the weights that are there, or a guess before a graph was cut."""
        if len(self._shares) == 1:
            return [self.nbytes]
        if not self._part_of:
            rooms = self._rooms or [1] * len(self._shares)
            return [self.nbytes * room // max(sum(rooms), 1) for room in rooms]
        sizes = [0] * len(self._shares)
        for name, part in self._part_of.items():
            sizes[part] += self._held(name)
        return sizes

    def _held(self, name: str) -> int:
        """Bytes of a weight on its device."""
        weight = self._weights[name]
        return held_as(weight.type, self._target).row_bytes(prod(weight.shape))

    def run(self, module: ModuleSpec, inputs: Mapping[str, np.ndarray]) -> Iterator[F32]:
        """Run the module; its outputs, float32, are read when they are asked for. Raises :class:`CheckpointError` and
        what the devices raise."""
        program = self._program(module, inputs)
        outputs = program.results({**inputs, STRENGTHS: self._adapters.strengths})
        return (output.astype(np.float32, copy=False) for output in outputs)

    def run_ahead(self, ahead: Ahead, module: ModuleSpec, inputs: Shaped) -> list[DeviceArray]:
        """As :meth:`run` where it is on one device, with inputs on it, and the outputs left there."""
        ((_, program),) = self._program(module, inputs).parts
        adapted = any(entry.name == STRENGTHS for entry in program.lowered.inputs)
        return ahead.run(program, {**inputs, **({STRENGTHS: self._adapters.strengths} if adapted else {})})

    def _program(self, module: ModuleSpec, inputs: Shaped) -> Chained:
        """The module's program for such inputs."""
        if not self._adapted:
            self._adapt(*self._applied)
            self._adapted = True
        name = _Name(module.digest, tuple(array.shape for array in inputs.values()), self._adapters.shape)
        if name in self._programs:
            if not self.resident:
                self._make_room(self)
        else:
            self._programs[name] = self._prepared(module, inputs)
        self._programs.move_to_end(name)
        while len(self._programs) > GRAPHS:
            self._programs.popitem(last=False)[1].close()
        return self._programs[name]

    def adapt(self, applied: Sequence[tuple[Changes, float]], merge: bool) -> None:
        """Compute from now on with these changes of its weights, each with its strength, instead of others.

        ``merge``: into the weights, of which those that change are sent again; else beside them: then the changes'
        matrices are sent, and nothing where just strengths differ. That happens when it is run.
        """
        self._applied, self._adapted = (applied, merge), False

    def _adapt(self, applied: Sequence[tuple[Changes, float]], merge: bool) -> None:
        self._merge(applied if merge else ())
        self._add(adapters(() if merge else applied))

    def _add(self, added: Adapters) -> None:
        before, weights = self._adapters, added.weights
        self._adapters = added
        if added.shape != before.shape:
            for name in [name for name in self._programs if name.adapters == before.shape != ()]:
                self._programs.pop(name).close()
            for share in self._shares:
                share.adapters.release()
            self._adapter_weights.clear()
            self._adapter_weights |= weights
            return
        others = {name for name, weight in weights.items() if weight is not self._adapter_weights[name]}
        self._adapter_weights |= weights
        for share in self._shares if others else ():
            share.adapters.renew(others)

    def _merge(self, applied: Sequence[tuple[Changes, float]]) -> None:
        merges: dict[str, list[tuple[Delta, float]]] = {}
        for changes, strength in applied:
            for name, inside in changes.items():
                merges.setdefault(name, []).extend((change, strength) for change in inside)
        others = {name for name in merges.keys() | self._merges.keys() if merges.get(name) != self._merges.get(name)}
        self._merges = merges
        stored = self.component.found.tensors
        if any(not can_merge(stored[name].type) for name in others & stored.keys()):
            self.release()  # they change their type
            self._weights.clear()
            self._part_of.clear()
            return
        self._weights |= self._taken({name: w.shape for name, w in self._weights.items() if name in others})
        for share in self._shares if others else ():
            share.weights.renew(others)

    def _taken(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Weight]:
        """The weights of these names and shapes, with what is merged into them."""
        found = self.component.found.take(shapes)
        weights = {n: self._with_merges(n, w) if n in self._merges else w for n, w in found.items()}
        return {n: replace(w, pieces=Held(w)) for n, w in weights.items()} if self.waits == "cpu" else weights

    def largest(self) -> int:
        """Bytes of its largest weight, which can't be on two devices."""
        held = [held_as(w.type, self._target).row_bytes(prod(w.shape)) for w in self.component.found.tensors.values()]
        return max(held, default=0)

    def _with_merges(self, name: str, weight: Weight) -> Weight:
        return merged(weight if can_merge(weight.type) else cast(weight, unpacked(weight.type)), self._merges[name])

    def _types(self) -> dict[str, Type]:
        """The types in which the device has the weights."""
        stored = {name: weight.type for name, weight in self.component.found.tensors.items()}
        changed = {name for name in self._merges if name in stored and not can_merge(stored[name])}
        target = self._target
        return {name: unpacked(t) if name in changed else held_as(t, target) for name, t in stored.items()}

    def release(self) -> None:
        """Free what it has on its devices."""
        for program in self._programs.values():
            program.close()
        self._programs.clear()
        for share in self._shares:
            share.leave()

    def leave(self, device: Device) -> None:
        """Free what it has on ``device``, until it runs again."""
        for part, share in enumerate(self._shares):
            if share.device is device:
                self._leave(part)

    def _leave(self, part: int) -> None:
        for program in self._programs.values():
            program.suspend(part)
        self._shares[part].leave()

    def settle(self, chain: Chain, rooms: Sequence[int] = ()) -> None:
        """Have its weights and graphs on ``chain`` from now on, as its devices are in this life. ``rooms``: bytes that
        each part of it may take, where the chain does not say so itself; what is there counts as room."""
        if chain != self.chain or chain.target != self._target:
            self.release()
            self._settle(chain, rooms)
        elif rooms and not chain.rooms and not self._part_of:
            self._rooms = tuple(rooms)
        for part, share in enumerate(self._shares):
            if share.life != share.device.life:
                self._leave(part)

    def _settle(self, chain: Chain, rooms: Sequence[int]) -> None:
        self.chain, self._target, self._rooms = chain, chain.target, chain.rooms or tuple(rooms)
        path = self.component.found.checkpoint.path
        self._shares = [
            _Share(device, self._weights, self._adapter_weights, self._uploaded, path) for device in chain.devices
        ]
        self._told_unpacked = False
        self._part_of: dict[str, int] = {}
        """The part of each weight that a graph which was cut reads."""

    def _prepared(self, module: ModuleSpec, inputs: Shaped) -> Chained:
        def capture() -> Lowered:
            with self._telling.stage("capture", self.name):
                return captured(module, inputs, self._target, types)

        types = self._types()
        self._tell_unpacked()
        wanted = key(
            self._target,
            module=module.digest,
            inputs={name: [str(array.dtype), *array.shape] for name, array in inputs.items()},
            types={name: stored.name for name, stored in types.items()},
        )
        with self._timer("capture"), _ONE_AT_A_TIME:
            lowered = self._cache.load(wanted, capture)
        with self._timer("upload"):
            self._weights |= self._taken({p.name: p.shape for p in lowered.weights})
            cut, devices = self._cut(lowered), self.chain.devices
            if not self.resident:
                self._make_room(self)
            executables: list[tuple[Part, Executable]] = []
            program = Chained(executables, self._leave)
            try:
                for part, share in zip(cut, self._shares, strict=True):
                    graph, later = adapted(part.lowered, self._adapters), len(set(devices)) < len(devices)
                    run = Executable(graph, share.device, share.weights, adapters=share.adapters, later=later)
                    executables.append((part, run))
            except BaseException:
                program.close()
                raise
            return program

    def _tell_unpacked(self) -> None:
        """Say once what it costs that the devices do not have a type of the file's, or that none has it."""
        if self._told_unpacked:
            return
        self._told_unpacked, found = True, self.component.found
        if strange := {w.type.name for w in found.tensors.values()} - self._target.types:
            what, size = ", ".join(sorted(strange)), found.nbytes()
            self._telling.on_event(Event("unpacked", self.name, size, self.nbytes, device=self.chain.name, reason=what))
        if plain := found.made_plain():
            what, size = ", ".join(sorted({before.format for _, before in plain})), sum(w.nbytes for w, _ in plain)
            was = sum(int(prod(w.shape) * before.bits / 8) for w, before in plain)
            self._telling.on_event(Event("unpacked", self.name, was, size, reason=what))

    def _cut(self, lowered: Lowered) -> Sequence[Part]:
        """A graph's parts, one for each device of the chain. Raises :class:`DoesNotFit` where it can't be cut so that
        they have room."""
        if len(self._shares) == 1:
            return [whole(lowered)]
        facts, known = profile(lowered), self._part_of
        taken = [0] * len(self._shares)
        for name, part in known.items():
            taken[part] += self._held(name)
        given = self._rooms or (2 * self.nbytes,) * len(taken)  # nobody asked whether it fits
        rooms = [max(room - size, 0) for room, size in zip(given, taken, strict=True)]
        cuts = positions(facts, rooms, known)
        if cuts is None:
            raise DoesNotFit({self.name: self.nbytes}, {self.chain.name: tuple(map(Room, self._rooms))}, UNCUT)
        found = parts(lowered, cuts)
        for number, each in enumerate(found):
            for weight in each.lowered.weights:
                known.setdefault(weight.name, number)
        _tell_cut(self.name, self.chain, found, [int(facts.crossing[cut]) for cut in cuts])
        return found

    def _uploaded(self, device: Device, done: int, total: int, sent: int | None, seconds: float) -> None:
        where = device.name if len(self._shares) > 1 else ""
        self._telling.on_event(Event("upload", self.name, done, total, sent, seconds=seconds, device=where))
        self._telling.check()


_OnUpload = Callable[[Device, int, int, "int | None", float], None]
"""Called with bytes done, of how many, bytes that were sent over a network, and the seconds that it took."""


def _tell_cut(component: str, chain: Chain, found: Sequence[Part], crossing: Sequence[int]) -> None:
    """Where a graph was cut, and what crosses, for the log."""
    where = [
        f"{device.name}: {len(part.lowered.graph.nodes)} nodes with {_mebibytes(part.nbytes)} of weights"
        for device, part in zip(chain.devices, found, strict=True)
    ]
    crosses = ", ".join(map(_mebibytes, crossing))
    log.info("%s is cut: %s; %s cross in each evaluation", component, ", ".join(where), crosses)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.2f} MiB"


class _Name(NamedTuple):
    """What decides a program: the module, the inputs' shapes, and those of adapters."""

    module: str
    inputs: tuple[tuple[int, ...], ...]
    adapters: Hashable


def captured(module: ModuleSpec, inputs: Shaped, target: Target, types: Mapping[str, Type]) -> Lowered:
    """The module's graph for inputs of these shapes and dtypes. Nothing is computed and no weight exists."""
    import torch

    from ..lowering.capture import capture, without_weights
    from ..lowering.lower import lower

    with without_weights():
        built, call = module.build()

    def by_name(module: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return call(module, **dict(zip(inputs, tensors, strict=True)))

    examples = {
        name: torch.empty(array.shape, dtype=getattr(torch, str(array.dtype)), device="meta")
        for name, array in inputs.items()
    }
    return lower(capture(built.eval(), examples, by_name), target, types)


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
        room, limit = device.memory().free + sum(other.has(device) for other in self._on(device)), self._limit(device)
        return Room(min(room, limit), limit < room)

    def _limit(self, device: Device) -> int:
        return limit_of(device, self._limits)

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
                there = sum(one.has(device) for one in self._on(device))
                return device.memory().free < more + WORKING_ROOM or self._limit(device) < there + more

            while others and is_full():
                other = others.pop(0)
                size = other.has(device)
                other.leave(device)
                why = "where another component needs the room"
                self.telling.on_event(Event("release", other.name, size, size, reason=why))


def limit_of(device: Device, limits: Mapping[str, int]) -> int:
    """Bytes of weights that a device may have at one time, with ``limits`` by name ("": all others)."""
    named = {folded(name): limit for name, limit in limits.items()}
    return named.get(folded(device.name), named.get("", sys.maxsize))


def weights_room(device: Device, limits: Mapping[str, int]) -> Room:
    """What of a device's memory weights may take now."""
    room, limit = beside_work(device.memory().free), limit_of(device, limits)
    return Room(min(room, limit), limit < room)


def beside_work(free: int) -> int:
    """What of so many free bytes weights may take, so that there is room to compute with them."""
    return max(free - WORKING_ROOM, free // 2)


def _of_each_lane(choices: Sequence[Lanes]) -> Iterator[list[Chain]]:
    """The chains of each lane, in order of preference: the first of the choices says how many lanes there are."""
    for lane in range(len(choices[0].chains)):
        yield [choice.chains[lane % len(choice.chains)] for choice in choices]
