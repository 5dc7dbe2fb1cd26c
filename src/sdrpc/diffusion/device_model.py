"""A model's components on devices: captured or found in the cache, uploaded when they are first needed, run."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from threading import Lock
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ..checkpoints.deltas import Delta, merged
from ..device import Device
from ..errors import Cancelled, DeviceLost, DoesNotFit
from ..families.base import F32, ModuleSpec
from ..families.lora import Lora
from ..families.model import Model, ModelComponent
from ..ggml.types import Type
from ..ggml.weight import Weight
from ..runtime.adapters import STRENGTHS, Adapters, Changes, adapted, adapters
from ..runtime.ahead import Ahead, DeviceArray
from ..runtime.cache import Cache, key
from ..runtime.lost import RETRY_SECONDS, Absence, first_back, surviving
from ..runtime.lowered import Lowered
from ..runtime.run import Executable, WeightStore
from .events import Cancel, Event, OnEvent, Stage
from .stage_timer import StageTimer

T = TypeVar("T")

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


class Telling:
    """Who wants to know what happens, and whether it shall stop; another one in each call of a session."""

    def __init__(self) -> None:
        self.on_event: OnEvent = lambda _: None
        self.cancel: Cancel = lambda: False

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


class DeviceComponent:
    """A component on the first of ``devices``, or on another one of them where that does not do. Each combination of
    module and input shapes is one graph; all share the uploaded weights."""

    def __init__(
        self, component: ModelComponent, devices: Sequence[Device], cache: Cache, timer: StageTimer, telling: Telling
    ) -> None:
        self.component, self.devices = component, tuple(devices)
        self._cache, self._timer, self._telling = cache, timer, telling
        self._weights: dict[str, Weight] = {}
        self._began, self._sent_before = 0.0, 0
        self._adapter_weights: dict[str, Weight] = {}
        self._settle(self.devices[0])
        self._programs: OrderedDict[_Name, Executable] = OrderedDict()
        self._applied: tuple[Sequence[tuple[Changes, float]], bool] = (), False
        self._adapted = True
        self._adapters = adapters(())
        self._merges: dict[str, list[tuple[Delta, float]]] = {}
        self.last_used = 0
        """Rises with each use of any component: which one was used longest ago."""

    @property
    def name(self) -> str:
        return self.component.name

    @property
    def taken(self) -> tuple[Weight, ...]:
        """The weights that were uploaded, now or before."""
        return tuple(self._weights.values())

    @property
    def resident(self) -> bool:
        """Whether it has memory on its device."""
        return bool(self._programs) and self._life == self.device.life

    @property
    def nbytes(self) -> int:
        """Bytes of its weights on the device, as they are stored."""
        return self.component.found.nbytes()

    def run(self, module: ModuleSpec, inputs: Mapping[str, np.ndarray]) -> Iterator[F32]:
        """Run the module; its outputs, float32, are read when they are asked for. Raises :class:`CheckpointError` and
        what the device raises."""
        program, inputs = self._program(module, inputs)
        return (output.astype(np.float32, copy=False) for output in program.results(**inputs))

    def run_ahead(self, ahead: Ahead, module: ModuleSpec, inputs: Shaped) -> list[DeviceArray]:
        """As :meth:`run`, with inputs on the device, and the outputs left there."""
        program, inputs = self._program(module, inputs)
        return ahead.run(program, inputs)

    def _program(self, module: ModuleSpec, inputs: Shaped) -> tuple[Executable, dict[str, Any]]:
        """The module's program for such inputs, and these with what its adapters are told."""
        if not self._adapted:
            self._adapt(*self._applied)
            self._adapted = True
        name = _Name(module.digest, tuple(array.shape for array in inputs.values()), self._adapters.shape)
        if name not in self._programs:
            self._programs[name] = self._prepared(module, inputs)
        self._programs.move_to_end(name)
        while len(self._programs) > GRAPHS:
            self._programs.popitem(last=False)[1].close()
        program = self._programs[name]
        adapted = any(entry.name == STRENGTHS for entry in program.lowered.inputs)
        return program, {**inputs, **({STRENGTHS: self._adapters.strengths} if adapted else {})}

    def adapt(self, applied: Sequence[tuple[Changes, float]], merge: bool) -> None:
        """Compute from now on with these changes of its weights, each with its strength, instead of others.

        ``merge``: into the weights, of which those that change are sent again; else beside them: then the changes'
        matrices are sent, and nothing where just strengths differ. That happens when it is run.
        """
        self._applied, self._adapted = (applied, merge), False

    def _adapt(self, applied: Sequence[tuple[Changes, float]], merge: bool) -> None:
        self._began, self._sent_before = time.perf_counter(), self.device.sent or 0
        self._merge(applied if merge else ())
        self._add(adapters(() if merge else applied))

    def _add(self, added: Adapters) -> None:
        before, weights = self._adapters, added.weights
        self._adapters = added
        if added.shape != before.shape:
            for name in [name for name in self._programs if name.adapters == before.shape != ()]:
                self._programs.pop(name).close()
            self._adapter_store.release()
            self._adapter_weights.clear()
            self._adapter_weights |= weights
            return
        others = {name for name, weight in weights.items() if weight is not self._adapter_weights[name]}
        self._adapter_weights |= weights
        if others:
            self._adapter_store.renew(others)

    def _merge(self, applied: Sequence[tuple[Changes, float]]) -> None:
        merges: dict[str, list[tuple[Delta, float]]] = {}
        for changes, strength in applied:
            for name, change in changes.items():
                merges.setdefault(name, []).append((change, strength))
        others = {name for name in merges.keys() | self._merges.keys() if merges.get(name) != self._merges.get(name)}
        self._merges = merges
        self._weights |= self._taken({name: w.shape for name, w in self._weights.items() if name in others})
        if others:
            self._store.renew(others)

    def _taken(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Weight]:
        """The weights of these names and shapes, with what is merged into them."""
        found = self.component.found.take(shapes)
        return {n: merged(w, self._merges[n]) if n in self._merges else w for n, w in found.items()}

    def release(self) -> None:
        """Free what it has on the device."""
        for program in self._programs.values():
            program.close()
        self._programs.clear()
        self._store.close()
        self._adapter_store.close()

    def settle(self, device: Device) -> None:
        """Have its weights and graphs on ``device`` from now on, as it is in this life."""
        if device is not self.device or device.life != self._life:
            self.release()
            self._settle(device)

    def _settle(self, device: Device) -> None:
        self.device, self._life = device, device.life
        self._store = WeightStore(device, self._weights, self._uploaded, self.component.found.checkpoint.path)
        self._adapter_store = WeightStore(device, self._adapter_weights, self._uploaded, "the LoRAs")

    def _prepared(self, module: ModuleSpec, inputs: Shaped) -> Executable:
        def capture() -> Lowered:
            with self._telling.stage("capture", self.name):
                return captured(module, inputs, self.device, types)

        types = {name: weight.type for name, weight in self.component.found.tensors.items()}
        wanted = key(
            self.device.target,
            module=module.digest,
            inputs={name: [str(array.dtype), *array.shape] for name, array in inputs.items()},
            types={name: stored.name for name, stored in types.items()},
        )
        with self._timer("capture"), _ONE_AT_A_TIME:
            lowered = self._cache.load(wanted, capture)
        with self._timer("upload"):
            self._began, self._sent_before = time.perf_counter(), self.device.sent or 0
            self._weights |= self._taken({p.name: p.shape for p in lowered.weights})
            return Executable(adapted(lowered, self._adapters), self.device, self._store, adapters=self._adapter_store)

    def _uploaded(self, done: int, total: int) -> None:
        seconds = time.perf_counter() - self._began
        sent = None if self.device.sent is None else self.device.sent - self._sent_before
        self._telling.on_event(Event("upload", self.name, done, total, sent, seconds=seconds))
        self._telling.check()


class _Name(NamedTuple):
    """What decides a program: the module, the inputs' shapes, and those of adapters."""

    module: str
    inputs: tuple[tuple[int, ...], ...]
    adapters: Hashable


def captured(module: ModuleSpec, inputs: Shaped, device: Device, types: Mapping[str, Type]) -> Lowered:
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
    return lower(capture(built.eval(), examples, by_name), device.target, types)


class DeviceModel:
    """A model with its components on devices, by name. Close it when done.

    Weights stay where they are until another component needs the room: then those that were used longest ago leave.
    """

    def __init__(
        self,
        model: Model,
        placement: Mapping[str, Sequence[Device]],
        cache: Cache,
        timer: StageTimer,
        retry: float = RETRY_SECONDS,
    ) -> None:
        self.model = model
        self.retry = retry
        """Seconds to wait for a device that was lost."""
        self.telling = Telling()
        self.components = {
            name: DeviceComponent(component, placement[name], cache, timer, self.telling)
            for name, component in model.components.items()
        }
        self._uses = 0
        self._aheads: dict[str, Ahead] = {}

    def check_fits(self) -> None:
        """Give each component the first of its devices that has room for its weights; nothing has been uploaded then.

        Raises :class:`DoesNotFit`, with the numbers of the first one, when none has.
        """
        for component in self.components.values():
            self._surviving(component, partial(self._choose, component))

    def adapt(self, loras: Sequence[tuple[Lora, float]], merge: bool) -> None:
        """Draw with these LoRAs from now on, each with its strength; ``merge``: into the weights."""
        for name, component in self.components.items():
            applied = [(lora.components[name], strength) for lora, strength in loras if name in lora.components]
            component.adapt(applied, merge)

    def run(self, name: str, options: Mapping[str, Any], inputs: Mapping[str, np.ndarray]) -> tuple[F32, ...]:
        """The outputs of component ``name``, float32; ``options`` are added to its module's configuration.

        A device that is lost meanwhile is waited for, or another one of the component's takes its place: weights are
        uploaded again, and the outputs are those that it would have given.
        """
        self.telling.check()
        component = self.components[name]
        module = component.component.module(**options)

        def work() -> tuple[F32, ...]:
            with component.device.turns, self._listening(component):
                component.settle(component.device)
                return tuple(self._started(component, module, inputs))

        return self._surviving(component, work)

    def ahead(self, name: str) -> Ahead | None:
        """For arrays that stay on component ``name``'s device; None where that does not queue what it is told."""
        device = self.components[name].device
        if not device.queues:
            return None
        found = self._aheads.get(name)
        if found is None or (found.device, found.life) != (device, device.life):
            with device.turns:
                found = self._aheads[name] = Ahead(device)
        return found

    def run_ahead(self, name: str, options: Mapping[str, Any], inputs: Shaped, ahead: Ahead) -> list[DeviceArray]:
        """As :meth:`run`, with inputs on the device, and the outputs left there. A device that is lost is an error."""
        self.telling.check()
        component = self.components[name]
        with component.device.turns, self._listening(component):
            component.settle(component.device)
            self._begin(component)
            found = component.run_ahead(ahead, component.component.module(**options), inputs)
        ahead.tell()
        return found

    def stream(self, name: str, options: Mapping[str, Any], inputs: Mapping[str, np.ndarray]) -> Iterator[F32]:
        """As :meth:`run`, but an output is read from the device when it is asked for, so that they need not fit into
        this machine's memory together. That has to be before the component runs again."""
        component = self.components[name]
        module = component.component.module(**options)
        outputs: Iterator[F32] = iter(())
        place: tuple[Device, int] | None = None
        """Where ``outputs`` are: a device in one of its lives."""
        given = 0

        def following() -> F32 | None:
            nonlocal outputs, place
            with component.device.turns, self._listening(component):
                component.settle(component.device)
                if place != (component.device, component.device.life):
                    outputs = islice(self._started(component, module, inputs), given, None)
                    place = component.device, component.device.life
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
        """The outputs of a component that runs on its device, for which room is made first."""
        self._begin(component)
        return component.run(module, inputs)

    def _begin(self, component: DeviceComponent) -> None:
        """A component is used: it has room on its device."""
        if not component.resident:
            self._make_room(component)
        self._uses += 1
        component.last_used = self._uses

    def unused(self) -> dict[str, list[str]]:
        """Per file, the names of the tensors that no component uses; complete once a picture was drawn."""
        found = self.model.unused([weight for component in self.components.values() for weight in component.taken])
        return {str(path): names for path, names in found.items()}

    def close(self) -> None:
        """Free everything on the devices."""
        for ahead in self._aheads.values():
            if ahead.life == ahead.device.life:
                with ahead.device.turns:
                    ahead.close()
        self._aheads.clear()
        for component in self.components.values():
            with component.device.turns:
                component.release()

    def _on(self, device: Device) -> list[DeviceComponent]:
        return [component for component in self.components.values() if component.device is device]

    def _choose(self, component: DeviceComponent) -> None:
        """Settle on the first device with room, if it has none yet."""
        refusals: list[DoesNotFit] = []
        for device in (component.device, *component.devices):
            try:
                with device.turns:
                    self._check_room(component, device)
                    component.settle(device)
                return
            except DoesNotFit as refusal:
                refusals.append(refusal)
        raise refusals[0]

    def _check_room(self, component: DeviceComponent, device: Device) -> None:
        """Raises :class:`DoesNotFit` when the weights are more than the device has room for without all others'."""
        if component.resident and component.device is device:
            return
        room = device.memory().free + sum(c.nbytes for c in self._on(device) if c.resident)
        if component.nbytes > room:
            raise DoesNotFit(device.name, component.name, component.nbytes, room)

    # --- devices that are lost

    def _surviving(self, component: DeviceComponent, work: Callable[[], T]) -> T:
        """``work`` with the component, done again when that loses its device."""

        def have_again(lost: DeviceLost) -> None:
            before, began = component.device, time.monotonic()
            choices = (before, *(device for device in component.devices if device is not before))
            found = first_back(choices, lost, self.retry, lambda device: self._check_room(component, device), absent)
            with found.turns:
                component.settle(found)
            stage: Stage = "reconnected" if found is before else "moved"
            seconds = time.monotonic() - began
            self.telling.on_event(Event(stage, component.name, 1, 1, seconds=seconds, device=found.name))

        def absent(absence: Absence) -> None:
            self._tell_waiting(component, absence)

        return surviving(work, have_again)

    @contextmanager
    def _listening(self, component: DeviceComponent) -> Iterator[None]:
        """Tell when the component's device says nothing for long, and when it does again."""
        device, longest = component.device, 0.0

        def silent(seconds: float) -> None:
            nonlocal longest
            if seconds < QUIET_SECONDS:
                speaks()
                return
            longest = seconds
            self._tell_waiting(component, Absence(device, "it does not answer", seconds, self.retry))

        def speaks() -> None:
            nonlocal longest
            if longest:
                event = Event("reconnected", component.name, 1, 1, seconds=longest, device=device.name)
                longest = 0.0
                self.telling.on_event(event)

        with device.watched(silent):
            yield
        speaks()

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
        """Let weights leave the component's device, those that were used longest ago first, until its own fit."""
        device = component.device
        others = sorted((c for c in self._on(device) if c.resident), key=lambda c: c.last_used)
        while others and device.memory().free < component.nbytes + WORKING_ROOM:
            other = others.pop(0)
            other.release()
            self.telling.on_event(Event("release", other.name, other.nbytes, other.nbytes))
