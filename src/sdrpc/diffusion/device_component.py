"""A component on devices: captured or found in the cache, uploaded when it is first needed, run."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from ..checkpoints.deltas import Delta, can_merge, merged
from ..checkpoints.expressions import cast
from ..checkpoints.numbers import unpacked
from ..device import Device, Target
from ..errors import DoesNotFit, Room
from ..families.base import F32, ModuleSpec
from ..families.model import ModelComponent
from ..ggml.types import Type
from ..ggml.weight import Held, Weight
from ..runtime.adapters import STRENGTHS, Adapters, Changes, adapted, adapters
from ..runtime.ahead import Ahead, DeviceArray
from ..runtime.cache import Cache, key
from ..runtime.chain import Chain, Chained
from ..runtime.cutting import Part, parts, positions, profile, whole
from ..runtime.lowered import Lowered
from ..runtime.run import Executable, WeightStore, held_as
from .events import Event
from .stage_timer import StageTimer
from .telling import Telling

log = logging.getLogger(__name__)


GRAPHS = 16
"""Graphs (sizes of pictures, lengths of texts) that a component keeps on its device."""

Shaped = Mapping[str, Any]
"""Inputs by name, arrays here or on the device, of which shapes and dtypes decide the graph."""

_ONE_AT_A_TIME = Lock()
"""Sessions in several threads: one captures a graph, the others find it. What captures (a module that is imported when
it is first used, torch's modes) is not made for several at once."""

UNCUT = "there is no place to cut it so that each part has room; a device with more is needed, or a quantized file"


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
