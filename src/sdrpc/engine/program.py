"""A graph made ready to run: compiled once per content, bound to buffers, run many times."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple, cast

import torch
from torch import Tensor

from sdrpc.errors import UnsupportedOperation
from sdrpc.ggml.tensor import Graph

from .blocks import quantize
from .deadline import Deadline
from .errors import translated
from .footprint import check_work, peak_bytes
from .forms import fits
from .fuse import Report, fuse
from .intervals import Intervals
from .last_resort import LastResort
from .memory import LocalBuffer, typed
from .operations import EngineOp
from .ops import KERNELS, moves_blocks
from .pieces import stoppable
from .precision import Precision, assign
from .rounding import rounded
from .values import Value, ordered, trace
from .weights import Source, Weight, WeightFormat, Weights, convert

CPU = torch.device("cpu")
WEIGHTS = (EngineOp.WEIGHT, EngineOp.OPPORTUNISTIC_WEIGHT)


@dataclass(frozen=True)
class Compiled:
    """What a graph computes, whatever buffers it will run on: the values that are stored (``roots``) in order, the
    numbers of the buffers that places count, sizes of scratch memories, how often each fusion fired, the bytes that a
    run takes at most besides its buffers, and the dtype of its products, None where they are exact."""

    roots: tuple[Value, ...]
    buffers: tuple[int, ...]
    scratch: Mapping[int, int]
    fusions: Report
    peak: int
    narrow: torch.dtype | None

    @cached_property
    def stores(self) -> Sequence[tuple[int, int, int]]:
        """What a run writes to: memory, and bytes from … to."""
        return sorted({(p.memory, p.offset, p.end) for v in self.roots for p in [v.store or v.place] if p is not None})

    @property
    def written(self) -> Sequence[int]:
        """Which of its ``buffers`` a run writes to, by position."""
        return sorted({memory for memory, _, _ in self.stores if memory >= 0})


def compile_graph(graph: Graph, precision: Precision, numbers: Mapping[int, int]) -> Compiled:
    """Trace ``graph``, which has been validated, fuse it and give its values dtypes. ``numbers`` count its buffers by
    key. Raises :class:`UnsupportedOperation` that names the node for what torch can't do here."""
    traced = trace(graph)
    for value in ordered(traced.roots):
        _supported(value)
    roots, report = fuse(rounded(traced.roots) if precision.rounds else traced.roots)
    buffers = tuple(numbers[key] for key in traced.buffers)
    suited = precision.suited(roots)
    roots = assign(roots, suited)
    check_work(roots)
    peak = peak_bytes(roots) + sum(traced.scratch.values())
    return Compiled(roots, buffers, traced.scratch, report, peak, suited.narrow)


def _supported(value: Value) -> None:
    if value.op is not EngineOp.LEAF and value.op not in KERNELS:
        raise UnsupportedOperation("operation not supported", value.node)


class Step(NamedTuple):
    """``registers[out] = run(*registers[args])``, written to ``store`` if there is one; then ``free`` are forgotten."""

    run: Callable[..., Tensor]
    args: tuple[int, ...]
    out: int
    dtype: torch.dtype | None
    store: Tensor | None
    free: tuple[int, ...]
    node: str


class Bound:
    """A compiled graph on its buffers. Not thread-safe: the device's worker runs it."""

    def __init__(
        self, compiled: Compiled, buffers: Sequence[LocalBuffer], weights: Weights, device: torch.device
    ) -> None:
        self.buffers = tuple(buffers)
        self.storages = tuple(buffer.storage for buffer in buffers)
        """Where their bytes are: views, and what is recorded, hold these addresses."""
        self.compiled = compiled
        self._weights, self.device = weights, device
        memory: dict[int, Tensor] = {i: storage.data for i, storage in enumerate(self.storages)}
        for number, size in compiled.scratch.items():
            memory[number] = torch.zeros(size, dtype=torch.uint8, device=device)
        self._memory = memory
        self._dropped, self._versions = 0, [0] * len(buffers)
        self.weights: dict[int, Weight] = {}
        """Converted weights by the register that they go to."""
        self.fixed: list[Tensor | None] = []
        """The registers before a run: views of the buffers."""
        self.program: list[Step] = []
        self._touched, self._alone = touched(ordered(compiled.roots))
        self._build()

    def _build(self) -> None:
        values = ordered(self.compiled.roots)
        last = {source: i for i, value in enumerate(values) for source in value.src if source is not None}
        number = {value: i for i, value in enumerate(values)}
        dying: dict[int, list[int]] = {}
        for source, i in last.items():
            if source.op is not EngineOp.LEAF:
                dying.setdefault(i, []).append(number[source])
        for i, value in enumerate(values):
            if value.op is EngineOp.LEAF:
                assert value.place is not None  # noqa: S101
                self.fixed.append(typed(self._memory[value.place.memory], value.place))
                continue
            self.fixed.append(None)
            store = None if value.store is None else typed(self._memory[value.store.memory], value.store)
            args = tuple(len(values) if s is None else number[s] for s in _trimmed(value.src))
            self.program.append(
                Step(self._function(value, i), args, i, value.dtype, store, tuple(dying.get(i, ())), value.node)
            )
        self.fixed.append(None)  # what a missing operand reads

    def _function(self, value: Value, register: int) -> Callable[..., Tensor]:
        if value.op in WEIGHTS:
            return self._weight(value, register)
        run = _on(self.device, value)
        if self.device == CPU:
            return run
        return LastResort(value.op, self.device, run, partial(_on, CPU, value), KERNELS[value.op].in_place)

    def _weight(self, value: Value, register: int) -> Callable[[Tensor], Tensor]:
        place, wanted = value.place, cast(WeightFormat, value.params)
        assert place is not None  # noqa: S101
        if place.memory < 0:
            return partial(convert, type=value.type, ne=value.ne, format=wanted)
        buffer = self.buffers[place.memory]
        source = Source(buffer.storage.key, place.offset, place.end, place.type, place.ne, place.nb, wanted)
        opportunistic, can_lie = value.op is EngineOp.OPPORTUNISTIC_WEIGHT, value in self._alone and fits(source)
        made = self.weights[register] = Weight(self._weights, source, opportunistic, buffer, can_lie)
        return made

    def begin(self) -> bool:
        """Another run begins. Whether converted weights that the last one used are gone: their bytes were written, or
        somebody wanted them as they came."""
        self._weights.begin()
        for memory, start, end in self.compiled.stores:
            if memory >= 0:
                self._weights.unmark(self.buffers[memory], start, end)
        versions = [storage.forms.version for storage in self.storages]
        if (self._weights.dropped, versions) == (self._dropped, self._versions):
            return False
        lying = {each.source for each in self.weights.values() if each.lies}
        for number, storage in enumerate(self.storages):
            if number in self._touched:
                storage.forms.suit(storage.data, lying, self._touched[number])
        self._dropped = self._weights.dropped
        self._versions = [storage.forms.version for storage in self.storages]
        changed = [each for each in self.weights.values() if each.has_changed()]
        return bool(changed)

    def __len__(self) -> int:
        return len(self.program)

    def run(self, deadline: Deadline) -> None:
        """Run the program."""
        self.begin()
        self.steps(deadline)

    def steps(self, deadline: Deadline | None = None) -> None:
        """Run all steps. Raises :class:`ComputeError` when ``deadline`` passes meanwhile."""
        try:
            self._steps_in_order(deadline)
        finally:
            self.stored()

    def record(self) -> None:
        """Run all steps for a recording: nothing happens now, so nothing that comes out of it may be kept."""
        for each in self.weights.values():
            each.may_keep = False
        try:
            self._steps_in_order(None)
        finally:
            for each in self.weights.values():
                each.may_keep = True

    def stored(self) -> None:
        """Forget what was converted from bytes that the program has written."""
        for memory, start, end in self.compiled.stores:
            if memory >= 0:
                self._weights.drop(self.storages[memory].key, start, end)

    def _steps_in_order(self, deadline: Deadline | None) -> None:
        registers = list(self.fixed)
        for run, args, out, dtype, store, free, node in self.program:
            operands = [registers[i] for i in args]
            if deadline is not None:
                deadline.node = node
            try:
                result = run(*operands)
                if result.dtype is not dtype and dtype is not None:
                    result = result.to(dtype)
                if store is not None:
                    store.copy_(result)
            except Exception as error:
                with translated(str(self.device), node):
                    raise error
            registers[out] = result
            for i in free:
                registers[i] = None
            if deadline is not None:
                deadline.check()


def touched(values: Sequence[Value]) -> tuple[dict[int, Intervals], frozenset[Value]]:
    """Which bytes of each memory ``values`` read or write, and which of them are weights that nothing else of them
    shares a byte with."""
    uses: list[tuple[int, int, int, Value]] = []
    for value in values:
        if value.op is EngineOp.LEAF:
            continue
        weight = value.op in WEIGHTS
        places = [value.place] if weight else [value.store, value.place]
        places += [] if weight else [each.place for each in value.src if each is not None and each.op is EngineOp.LEAF]
        uses += [(each.memory, each.offset, each.end, value) for each in places if each is not None]
    uses.sort(key=lambda each: each[:3])
    ranges: dict[int, Intervals] = {}
    alone: list[Value] = []
    last, behind = -1, 0
    for i, (memory, start, end, value) in enumerate(uses):
        behind = behind if memory == last else 0
        shares = start < behind or (i + 1 < len(uses) and uses[i + 1][0] == memory and uses[i + 1][1] < end)
        if value.op in WEIGHTS and not shares:
            alone.append(value)
        ranges.setdefault(memory, Intervals()).assign(max(start, behind), end, 0)
        last, behind = memory, max(behind, end)
    return ranges, frozenset(alone)


def _on(device: torch.device, value: Value) -> Callable[..., Tensor]:
    """What computes ``value`` of operands that are on ``device``."""
    kernel = KERNELS[value.op]
    if kernel.takes_device:
        run: Callable[..., Tensor] = partial(kernel.function, value, device)
    else:
        run = stoppable(kernel.function, value, device)
    if value.type.plain or moves_blocks(value) or kernel.in_place:
        return run
    return lambda *operands: quantize(run(*operands), value.type)


def _trimmed(src: tuple[Value | None, ...]) -> tuple[Value | None, ...]:
    """Operands without the missing ones at the end."""
    while src and src[-1] is None:
        src = src[:-1]
    return src
