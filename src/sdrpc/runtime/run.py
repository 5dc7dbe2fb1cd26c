"""Lowered modules on devices: weights uploaded once, numbers in, numbers out. Needs numpy, not torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from ..checkpoints.expressions import cast
from ..checkpoints.numbers import unpacked
from ..device import Buffer, Content, Device, Program, Target
from ..errors import CheckpointError, UsageError
from ..ggml.memory_planner import aligned, bind, lay_out, place
from ..ggml.tensor import Graph, Tensor, rewrite
from ..ggml.types import F32, NUMPY_DTYPES, Type
from ..ggml.weight import View, Weight
from .lowered import Input, Lowered, Output, Parameter, result_dtype

Progress = Callable[[int, int], None]
"""Called with the bytes uploaded so far and in all."""

ROW_PADDING = 512
"""Elements to which CUDA backends pad rows of quantized matrices, beyond the last one too (ggml-cuda's
MATRIX_ROW_PADDING): a device that doesn't manage its memory gets that much room."""

SCRATCH = -1
"""Stands for the key of the buffer for nodes until its size is known."""

Place = tuple[Buffer, int]
"""A buffer and an offset into it, in bytes."""


def compiled(device: Device, graph: Graph, buffers: Mapping[int, Buffer], allocate: Callable[[int], Buffer]) -> Program:
    """``graph``, of which leaves and outputs have their places, as a program; on a device that does not find memory for
    nodes itself they get it from ``allocate``."""
    used = dict(buffers)
    if not device.target.managed:
        graph, size = place(graph, device.alignment, SCRATCH)
        scratch = allocate(size)
        used[scratch.key] = scratch
        graph = rewrite(graph, lambda tensor: {"buffer": scratch.key} if tensor.buffer == SCRATCH else {})
    return device.compile(graph, used)


def held_as(type: Type, target: Target) -> Type:
    """The type in which a device holds weights of ``type``: that one, or what it is unpacked to before it is sent."""
    return type if type.name in target.types else unpacked(type)


class _Placing(NamedTuple):
    """A weight that is to be uploaded, in the type of its leaf."""

    parameter: Parameter
    weight: Weight


@dataclass
class _Chunk:
    """What shares a buffer of ``size`` bytes: each weight with its offset and its bytes with padding."""

    size: int = 0
    members: list[tuple[_Placing, int, int]] = field(default_factory=list)

    def add(self, placing: _Placing, room: int, alignment: int) -> None:
        offset = aligned(self.size, alignment)
        self.members.append((placing, offset, room))
        self.size = offset + room


class WeightStore:
    """The weights of one part of a model on a device, shared by all graphs that read them.

    ``source`` is what errors name: the model's file. ``weights`` are asked for their bytes once, when a graph first
    needs them, and nothing of them is kept. They lie in as many buffers as the device's limit on one makes necessary.
    """

    def __init__(
        self,
        device: Device,
        weights: Mapping[str, Weight],
        progress: Progress | None = None,
        source: object = "the model",
    ) -> None:
        self.device = device
        self.releases = 0
        """How often the weights were given up: what was bound to their places before is bound to nothing."""
        self._weights = weights
        self._progress = progress
        self._source = source
        self._places: dict[tuple[str, Type], Place] = {}
        self._placed: dict[tuple[str, Type], Parameter] = {}
        self._buffers: list[Buffer] = []

    def places(self, parameters: Iterable[Parameter]) -> dict[Tensor, Place]:
        """Where each parameter's leaf is, after uploading what is not there yet.

        Raises :class:`CheckpointError` for a weight that is missing, misshapen or of the wrong size, before anything
        is uploaded, and :class:`OutOfMemory`.
        """
        parameters = tuple(parameters)
        new = self._new(parameters)
        if new:
            self._upload(new)
        return {parameter.leaf: self._places[_key(parameter)] for parameter in parameters}

    def needed(self, parameters: Iterable[Parameter]) -> int:
        """Bytes of the device's memory that :meth:`places` would take for what is not there yet.

        Raises :class:`CheckpointError` as that does.
        """
        return sum(chunk.size for chunk in self._chunks(self._new(parameters)))

    @property
    def resident(self) -> bool:
        """Whether there are weights on the device."""
        return bool(self._places)

    def has(self, name: str) -> bool:
        """Whether it is where the weight ``name`` comes from."""
        return name in self._weights

    def renew(self, names: Collection[str]) -> None:
        """Weights of these ``names`` are others now, of the same types and shapes: what is on the device is sent there
        again, each to its place. If that fails, all are given up, since nobody knows what is there."""
        again: dict[int, list[Content]] = {}
        for key, parameter in self._placed.items():
            if parameter.name in names:
                buffer, offset = self._places[key]
                member = _Placing(parameter, self._checked(parameter)), offset, parameter.leaf.nbytes
                again.setdefault(buffer.key, []).extend(self._contents(member))
        try:
            self._send([(buffer, again[buffer.key]) for buffer in self._buffers if buffer.key in again])
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Free the weights' memory until :meth:`places` is called again: then they are uploaded once more."""
        self.releases += 1
        for buffer in self._buffers:
            self.device.free(buffer)
        self._buffers.clear()
        self._places.clear()
        self._placed.clear()

    def close(self) -> None:
        """Free the weights' memory for good."""
        self.release()

    def _new(self, parameters: Iterable[Parameter]) -> list[_Placing]:
        """What has no place yet."""
        new = {_key(p): p for p in parameters if _key(p) not in self._places}
        return [_Placing(parameter, self._checked(parameter)) for parameter in new.values()]

    def _checked(self, parameter: Parameter) -> Weight:
        """The parameter's weight, in the type that the graph reads."""
        weight = self._weights.get(parameter.name)
        if weight is None:
            raise CheckpointError(self._source, "missing", parameter.name)
        if tuple(weight.shape) != parameter.shape:
            reason = f"has the shape {list(weight.shape)}, not {list(parameter.shape)}"
            raise CheckpointError(self._source, reason, parameter.name)
        if parameter.leaf.type not in (weight.type, unpacked(weight.type), F32):
            raise CheckpointError(self._source, f"is {weight.type}, not {parameter.leaf.type}", parameter.name)
        return cast(weight, parameter.leaf.type)

    def _chunks(self, new: Iterable[_Placing]) -> list[_Chunk]:
        """What goes into one buffer each, in order."""
        chunks: list[_Chunk] = []
        for placing in new:
            leaf = placing.parameter.leaf
            room = leaf.nbytes + (0 if self.device.target.managed else _row_padding(leaf))
            if not chunks or aligned(chunks[-1].size, self.device.alignment) + room > self.device.max_size:
                chunks.append(_Chunk())
            chunks[-1].add(placing, room, self.device.alignment)
        return chunks

    def _upload(self, new: Sequence[_Placing]) -> None:
        chunks = self._chunks(new)
        buffers: list[Buffer] = []
        try:
            for chunk in chunks:
                buffers.append(self.device.allocate(chunk.size))  # noqa: PERF401 (what was allocated is freed below)
            inside = [[content for member in chunk.members for content in self._contents(member)] for chunk in chunks]
            self._send(list(zip(buffers, inside, strict=True)))
        except BaseException:
            for buffer in buffers:
                self.device.free(buffer)
            raise
        self._buffers += buffers
        for chunk, buffer in zip(chunks, buffers, strict=True):
            self._places |= {_key(p.parameter): (buffer, at) for p, at, _ in chunk.members}
            self._placed |= {_key(p.parameter): p.parameter for p, _, _ in chunk.members}

    def _send(self, contents: Sequence[tuple[Buffer, Sequence[Content]]]) -> None:
        """Write into each buffer what belongs there."""
        total = sum(content.size for _, inside in contents for content in inside)
        report = self._progress or (lambda *_: None)
        done = 0

        def sent(before: int, now: int) -> None:
            report(before + now, total)

        report(0, total)
        for buffer, inside in contents:
            self.device.upload(buffer, inside, partial(sent, done))
            done += sum(content.size for content in inside)

    def _contents(self, member: tuple[_Placing, int, int]) -> Iterator[Content]:
        """A weight's bytes at its offset, with zeros behind them where it has more room."""
        (parameter, weight), offset, room = member
        size = parameter.leaf.nbytes
        yield Content(offset, size, partial(self._pieces, parameter.name, weight, size), weight.origin)
        if room > size:
            yield Content(offset + size, room - size, View(memoryview(bytes(room - size))))

    def _pieces(
        self, name: str, weight: Weight, size: int, start: int = 0, stop: int | None = None
    ) -> Iterator[memoryview]:
        """The weight's bytes, and an error if they are not as many as they must be."""
        wanted = (size if stop is None else stop) - start
        given = 0
        for piece in weight.pieces(start, stop):
            given += len(piece)
            if given <= wanted:
                yield piece
        if given != wanted:
            reason = f"has {start + given} bytes, not {size}"
            raise CheckpointError(self._source, reason, name)


class Executable:
    """A lowered module on a device. Call it with arrays by input name; it returns the outputs' arrays in order.

    ``weights`` are uploaded for this graph alone, or come from a store that several graphs share (whose owner closes
    it); those that ``adapters`` has come from there. It takes its memory now, or ``later``, when it first runs. Float
    outputs are float32, integers int64. Use it as a context manager, or :meth:`close` it.
    """

    def __init__(
        self,
        lowered: Lowered,
        device: Device,
        weights: Mapping[str, Weight] | WeightStore,
        progress: Progress | None = None,
        adapters: WeightStore | None = None,
        later: bool = False,
    ) -> None:
        self.lowered = lowered
        self.device = device
        self._shared = isinstance(weights, WeightStore)
        self._store = weights if isinstance(weights, WeightStore) else WeightStore(device, weights, progress)
        self._adapters = adapters
        self._buffers: list[Buffer] = []
        self._bound_at: tuple[int, int] | None = None
        """How often the stores had given up their weights when it was bound; None: it is bound to nothing."""
        self._program: Program | None = None
        self._sent: dict[Tensor, np.ndarray] = {}
        self._runs = 0
        """Rises with every run, and when what the last one gave is freed."""
        if later:
            return
        try:
            self._bind()
        except BaseException:
            self.close()
            raise

    def __call__(self, **inputs: Any) -> tuple[np.ndarray, ...]:
        """Run the graph. Only inputs that changed since the last call are sent. Weights that the store gave up since
        then are uploaded again.

        Raises :class:`UsageError` for inputs that the graph does not have or of another shape, and what the device
        raises.
        """
        return tuple(self.results(**inputs))

    def results(self, **inputs: Any) -> Iterator[np.ndarray]:
        """Run the graph as a call does; its outputs are read from the device when they are asked for, one by one.

        Raises :class:`UsageError` when the next one is asked for after the graph ran again or its memory was freed.
        """
        missing = {entry.name for entry in self.lowered.inputs} - inputs.keys()
        if missing:
            raise UsageError(f"input {', '.join(sorted(missing))} is missing")
        self.prepare(inputs)
        return self.started()

    def started(self) -> Iterator[np.ndarray]:
        """Run the graph with what its inputs hold; its outputs as :meth:`results` gives them."""
        self.start()
        return self._read(self._runs)

    def _read(self, run: int) -> Iterator[np.ndarray]:
        for output in self.lowered.outputs:
            if run != self._runs:
                raise UsageError("these results are gone: the graph ran again, or its memory was freed")
            yield self._result(output)

    def prepare(self, inputs: Mapping[str, Any], crossing: Container[str] = ()) -> dict[str, list[Place]]:
        """Send ``inputs`` as far as they changed, for :meth:`start`. Returns the places of all others, by name, which
        the caller has to fill, dense: with numbers in float32, or with those of another graph's output of this type,
        as they are, where it is ``crossing``. Raises :class:`UsageError` as a call does."""
        if self._bound_at != self._releases():
            self._free()
            self._bind()
        for leaf, data in self._feeds(inputs):
            sent = self._sent.pop(leaf, None)  # a write that fails leaves us not knowing what is there
            if sent is None or not _equal(sent, data):
                self.device.write(self._io, self._offsets[leaf], data.data)
                sent = data.copy()
            self._sent[leaf] = sent
        others = [entry for entry in self.lowered.inputs if entry.name not in inputs]
        for entry in others:
            for leaf in entry.leaves:
                self._sent.pop(leaf, None)
                if leaf.type != F32 and entry.name not in crossing:
                    raise UsageError(f"input {entry.name} is {leaf.type}: it can't be filled on the device")
        return {entry.name: [(self._io, self._offsets[leaf]) for leaf in entry.leaves] for entry in others}

    def start(self) -> None:
        """Run the graph with what its inputs hold."""
        if self._program is not None:
            self._program.run()
        self._runs += 1

    def outputs(self) -> list[tuple[tuple[int, ...], Place]]:
        """The shape and place of each output, of which the numbers are there, in float32, when the device has run.
        Raises :class:`UsageError` where that is not so."""
        found = []
        for output in self.lowered.outputs:
            if not isinstance(output.source, Tensor) or output.source.type != F32:
                raise UsageError("an output of the graph is no float32 array of its device")
            found.append((tuple(output.shape), (self._io, self._offsets[output.source])))
        return found

    def output(self, number: int) -> tuple[Place, int]:
        """Where output ``number``, which the graph computes, is when it has run, and its bytes."""
        source = self.lowered.outputs[number].source
        if not isinstance(source, Tensor):
            raise UsageError(f"output {number} of the graph is a constant")
        return (self._io, self._offsets[source]), source.nbytes

    def suspend(self) -> None:
        """Free the graph's memory until it is run again; the weights are their store's."""
        self._free()
        self._program, self._bound_at = None, None

    def close(self) -> None:
        """Free the graph's memory, and the weights unless they come from a store."""
        self._free()
        if not self._shared:
            self._store.close()

    def __enter__(self) -> Executable:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _releases(self) -> tuple[int, int]:
        return self._store.releases, 0 if self._adapters is None else self._adapters.releases

    def _weights(self) -> dict[Tensor, Place]:
        """Where the weights are, after uploading what is not there yet."""
        ours, theirs = self._store, self._adapters
        if theirs is None:
            return ours.places(self.lowered.weights)
        added = [parameter for parameter in self.lowered.weights if theirs.has(parameter.name)]
        rest = [parameter for parameter in self.lowered.weights if not theirs.has(parameter.name)]
        return ours.places(rest) | theirs.places(added)

    def _free(self) -> None:
        for buffer in self._buffers:
            self.device.free(buffer)
        self._buffers.clear()
        self._sent.clear()
        self._runs += 1

    def _bind(self) -> None:
        """Give every leaf, output and, on devices that don't do it themselves, node its place; compile."""
        lowered, device = self.lowered, self.device
        weights = self._weights()
        self._bound_at = self._releases()
        ours = {leaf: None for entry in lowered.inputs for leaf in entry.leaves}
        ours |= {constant.leaf: None for constant in lowered.constants}
        ours |= {output.source: None for output in lowered.outputs if isinstance(output.source, Tensor)}
        offsets, size = lay_out((tensor.nbytes for tensor in ours), device.alignment)
        self._offsets = dict(zip(ours, offsets, strict=True))
        self._io = self._allocate(size)
        places = {tensor: (self._io, offset) for tensor, offset in self._offsets.items()} | weights
        buffers = {buffer.key: buffer for buffer, _ in places.values()}
        graph = bind(lowered.graph, {tensor: (buffer.key, offset) for tensor, (buffer, offset) in places.items()})
        for constant in lowered.constants:
            device.write(self._io, self._offsets[constant.leaf], _raw(constant.array))
        self._program = compiled(device, graph, buffers, self._allocate) if graph.nodes else None

    def _allocate(self, size: int) -> Buffer:
        buffer = self.device.allocate(max(size, 1))
        self._buffers.append(buffer)
        return buffer

    def _feeds(self, inputs: Mapping[str, Any]) -> Iterable[tuple[Tensor, np.ndarray]]:
        """Each leaf of an input that is given, and its bytes, not copied where they are the caller's."""
        unknown = inputs.keys() - {entry.name for entry in self.lowered.inputs}
        if unknown:
            raise UsageError(f"the graph has no input {', '.join(sorted(unknown))}")
        for entry in self.lowered.inputs:
            if entry.name not in inputs:
                continue
            array = np.asarray(inputs[entry.name])
            if array.shape != entry.shape:
                raise UsageError(f"input {entry.name} has the shape {list(array.shape)}, not {list(entry.shape)}")
            for leaf in entry.leaves:
                yield leaf, _encoded(entry, array, leaf.type)

    def _result(self, output: Output) -> np.ndarray:
        if not isinstance(output.source, Tensor):
            return output.source.astype(result_dtype(output.dtype))
        data = self.device.read(self._io, self._offsets[output.source], output.source.nbytes)
        array = np.frombuffer(data, NUMPY_DTYPES[output.source.type.name]).reshape(output.shape)
        return array.astype(result_dtype(output.dtype))


def _encoded(entry: Input, array: np.ndarray, type: Type) -> np.ndarray:
    dtype = NUMPY_DTYPES[type.name]
    if dtype.kind == "i" and array.size:
        limits = np.iinfo(dtype)
        if array.dtype.kind not in "iub" or array.min() < limits.min or array.max() > limits.max:
            raise UsageError(f"input {entry.name} must be integers of 32 bits, not {array.dtype}")
    encoded = array.astype(dtype, copy=False)
    if array.dtype.kind in "iu" and not np.array_equal(encoded, array):
        raise UsageError(f"input {entry.name} has integers that float32, in which devices compute, can't hold")
    return _bytes(encoded)


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays of bytes are equal, eight at a time where that is possible."""
    if a.size == b.size and a.size % 8 == 0:
        a, b = a.view(np.uint64), b.view(np.uint64)
    return np.array_equal(a, b)


def _key(parameter: Parameter) -> tuple[str, Type]:
    return parameter.name, parameter.leaf.type


def _row_padding(leaf: Tensor) -> int:
    missing = -leaf.ne[0] % ROW_PADDING
    return 0 if leaf.type.plain else leaf.type.row_bytes(missing)


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _raw(array: np.ndarray) -> memoryview:
    return _bytes(array).data
