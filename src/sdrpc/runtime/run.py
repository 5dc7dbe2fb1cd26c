"""Lowered modules on devices: weights uploaded once, numbers in, numbers out. Needs numpy, not torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np

from ..device import Buffer, Bytes, Content, Device
from ..errors import CheckpointError, UsageError
from ..ggml.memory_planner import bind, lay_out, place
from ..ggml.tensor import Tensor, rewrite
from ..ggml.types import F32, NUMPY_DTYPES, Type
from ..ggml.weight import Weight
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


class WeightStore:
    """The weights of one part of a model on a device, shared by all graphs that read them.

    ``source`` is what errors name: the model's file. ``weights`` are asked for their bytes once, when a graph first
    needs them, and nothing of them is kept.
    """

    def __init__(
        self,
        device: Device,
        weights: Mapping[str, Weight],
        progress: Progress | None = None,
        source: object = "the model",
    ) -> None:
        self.device = device
        self._weights = weights
        self._progress = progress
        self._source = source
        self._places: dict[tuple[str, Type], Place] = {}
        self._buffers: list[Buffer] = []

    def places(self, parameters: Iterable[Parameter]) -> dict[Tensor, Place]:
        """Where each parameter's leaf is, after uploading what is not there yet.

        Raises :class:`CheckpointError` for a weight that is missing, misshapen or of the wrong size, before anything
        is uploaded, and :class:`OutOfMemory`.
        """
        parameters = tuple(parameters)
        new = {_key(p): (p, self._checked(p)) for p in parameters if _key(p) not in self._places}
        if new:
            self._upload(list(new.values()))
        return {parameter.leaf: self._places[_key(parameter)] for parameter in parameters}

    def close(self) -> None:
        """Free the weights' memory. Graphs that read them can't run any more."""
        for buffer in self._buffers:
            self.device.free(buffer)
        self._buffers.clear()
        self._places.clear()

    def _checked(self, parameter: Parameter) -> Weight:
        weight = self._weights.get(parameter.name)
        if weight is None:
            raise CheckpointError(self._source, "missing", parameter.name)
        if tuple(weight.shape) != parameter.shape:
            reason = f"has the shape {list(weight.shape)}, not {list(parameter.shape)}"
            raise CheckpointError(self._source, reason, parameter.name)
        if weight.type != parameter.leaf.type and parameter.leaf.type != F32:
            raise CheckpointError(self._source, f"is {weight.type}, not {parameter.leaf.type}", parameter.name)
        return weight

    def _upload(self, new: Sequence[tuple[Parameter, Weight]]) -> None:
        leaves = [parameter.leaf for parameter, _ in new]
        sizes = [leaf.nbytes + (0 if self.device.target.managed else _row_padding(leaf)) for leaf in leaves]
        offsets, size = lay_out(sizes, self.device.alignment)
        buffer = self.device.allocate(size)
        self._buffers.append(buffer)
        contents = []
        for (parameter, weight), offset, room in zip(new, offsets, sizes, strict=True):
            contents.append(self._content(parameter, weight, offset))
            padding = room - parameter.leaf.nbytes
            if padding:
                contents.append(Content(offset + parameter.leaf.nbytes, padding, partial(bytes, padding)))
        total = sum(content.size for content in contents)
        report = self._progress or (lambda *_: None)
        report(0, total)
        self.device.upload(buffer, contents, lambda done: report(done, total))
        self._places |= {_key(parameter): (buffer, at) for (parameter, _), at in zip(new, offsets, strict=True)}

    def _content(self, parameter: Parameter, weight: Weight, offset: int) -> Content:
        wanted, size = parameter.leaf.type, parameter.leaf.nbytes

        def data() -> Bytes:
            made = _bytes_of(weight, wanted)
            if memoryview(made).nbytes != size:
                reason = f"has {memoryview(made).nbytes} bytes, not {size}"
                raise CheckpointError(self._source, reason, parameter.name)
            return made

        origin = weight.origin
        if origin and wanted != weight.type:
            origin = origin.made(wanted.name)
        return Content(offset, size, data, origin)


class Executable:
    """A lowered module on a device. Call it with arrays by input name; it returns the outputs' arrays in order.

    ``weights`` are uploaded for this graph alone, or come from a store that several graphs share (whose owner closes
    it). Float outputs are float32, integers int64. Use it as a context manager, or :meth:`close` it.
    """

    def __init__(
        self,
        lowered: Lowered,
        device: Device,
        weights: Mapping[str, Weight] | WeightStore,
        progress: Progress | None = None,
    ) -> None:
        self.lowered = lowered
        self.device = device
        self._own = None if isinstance(weights, WeightStore) else WeightStore(device, weights, progress)
        store = weights if isinstance(weights, WeightStore) else self._own
        self._buffers: list[Buffer] = []
        self._sent: dict[Tensor, np.ndarray] = {}
        try:
            self._bind(store.places(lowered.weights))  # type: ignore[union-attr]
        except BaseException:
            self.close()
            raise

    def __call__(self, **inputs: Any) -> tuple[np.ndarray, ...]:
        """Run the graph. Only inputs that changed since the last call are sent.

        Raises :class:`UsageError` for inputs that the graph does not have or of another shape, and what the device
        raises.
        """
        for leaf, data in self._feeds(inputs):
            sent = self._sent.pop(leaf, None)  # a write that fails leaves us not knowing what is there
            if sent is None or not np.array_equal(sent, data):
                self.device.write(self._io, self._offsets[leaf], data.data)
                sent = data.copy()
            self._sent[leaf] = sent
        if self._program is not None:
            self._program.run()
        return tuple(self._result(output) for output in self.lowered.outputs)

    def close(self) -> None:
        """Free the graph's memory, and the weights unless they come from a store."""
        for buffer in self._buffers:
            self.device.free(buffer)
        self._buffers.clear()
        if self._own is not None:
            self._own.close()

    def __enter__(self) -> Executable:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _bind(self, weights: Mapping[Tensor, Place]) -> None:
        """Give every leaf, output and, on devices that don't do it themselves, node its place; compile."""
        lowered, device = self.lowered, self.device
        ours = {leaf: None for entry in lowered.inputs for leaf in entry.leaves}
        ours |= {constant.leaf: None for constant in lowered.constants}
        ours |= {output.source: None for output in lowered.outputs if isinstance(output.source, Tensor)}
        offsets, size = lay_out((tensor.nbytes for tensor in ours), device.alignment)
        self._offsets = dict(zip(ours, offsets, strict=True))
        self._io = self._allocate(size)
        places = {tensor: (self._io, offset) for tensor, offset in self._offsets.items()} | dict(weights)
        buffers = {buffer.key: buffer for buffer, _ in places.values()}
        graph = bind(lowered.graph, {tensor: (buffer.key, offset) for tensor, (buffer, offset) in places.items()})
        if not device.target.managed:
            graph, size = place(graph, device.alignment, SCRATCH)
            scratch = self._allocate(size)
            buffers[scratch.key] = scratch
            graph = rewrite(graph, lambda tensor: {"buffer": scratch.key} if tensor.buffer == SCRATCH else {})
        for constant in lowered.constants:
            device.write(self._io, self._offsets[constant.leaf], _raw(constant.array))
        self._program = device.compile(graph, buffers) if graph.nodes else None

    def _allocate(self, size: int) -> Buffer:
        buffer = self.device.allocate(max(size, 1))
        self._buffers.append(buffer)
        return buffer

    def _feeds(self, inputs: Mapping[str, Any]) -> Iterable[tuple[Tensor, np.ndarray]]:
        """Each input leaf and its bytes, not copied where they are the caller's."""
        unknown = inputs.keys() - {entry.name for entry in self.lowered.inputs}
        if unknown:
            raise UsageError(f"the graph has no input {', '.join(sorted(unknown))}")
        for entry in self.lowered.inputs:
            if entry.name not in inputs:
                raise UsageError(f"input {entry.name} is missing")
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
    return _bytes(array.astype(dtype, copy=False))


def _key(parameter: Parameter) -> tuple[str, Type]:
    return parameter.name, parameter.leaf.type


def _row_padding(leaf: Tensor) -> int:
    missing = -leaf.ne[0] % ROW_PADDING
    return 0 if leaf.type.plain else leaf.type.row_bytes(missing)


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _raw(array: np.ndarray) -> memoryview:
    return _bytes(array).data


def _bytes_of(weight: Weight, type: Type) -> Bytes:
    """The weight's bytes as they are, or as F32."""
    data = weight.data()
    if weight.type == type:
        return data
    if weight.type.name == "BF16":
        return _raw((np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32))
    if weight.type.plain:
        return _raw(np.frombuffer(data, NUMPY_DTYPES[weight.type.name]).astype(np.float32))
    import gguf

    blocks = np.frombuffer(data, np.uint8).reshape(*weight.shape[:-1], -1)
    return _raw(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[weight.type.name]))
