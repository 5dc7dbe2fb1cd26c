"""The same graph on a device and in the reference interpreter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import gguf
import numpy as np

from sdrpc.engine import LocalDevice
from sdrpc.ggml.tensor import OUTPUT, Graph, Tensor, contiguous_strides, dims
from sdrpc.ggml.types import NUMPY_DTYPES, TYPES, Type
from tests.support import reference

TOLERANCE = {"exact": 1e-5, "fast": 2e-2}
"""Relative error (L2) against float64, by precision."""
ROUNDED = {"F32": 0.0, "F16": 1e-3, "BF16": 8e-3}
"""What rounding a result to its declared type may add."""

ALIGNMENT = 64


def error(got: np.ndarray, wanted: np.ndarray) -> float:
    """‖got − wanted‖ / ‖wanted‖; infinities and NaN must be the same in both."""
    got, wanted = got.astype(np.float64), wanted.astype(np.float64)
    finite = np.isfinite(wanted)
    if not np.array_equal(np.isfinite(got), finite) or not np.array_equal(
        got[~finite], wanted[~finite], equal_nan=True
    ):
        return float("inf")
    norm = float(np.linalg.norm(wanted[finite]))
    return float(np.linalg.norm(got[finite] - wanted[finite])) / (norm or 1.0)


class Leaves:
    """Tensors with contents, placed one after the other in one buffer whose key is not known yet (it is 1 here)."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.memory = bytearray()

    def raw(self, type: Type, ne: Sequence[int], data: bytes, name: str = "") -> Tensor:
        offset = len(self.memory)
        self.memory += data + bytes(-len(data) % ALIGNMENT)
        shape = dims(*ne)
        return Tensor(type, shape, contiguous_strides(type, shape), buffer=1, offset=offset, name=name)

    def array(self, values: np.ndarray, type: str = "F32", name: str = "") -> Tensor:
        if type in NUMPY_DTYPES:
            data = values.astype(NUMPY_DTYPES[type]).tobytes()
        else:
            quantized = gguf.quants.quantize(values.astype(np.float32), gguf.GGMLQuantizationType[type])
            data = quantized.tobytes()
        return self.raw(TYPES[type], values.shape[::-1], data, name)

    def normal(self, *ne: int, type: str = "F32", scale: float = 1.0, name: str = "") -> Tensor:
        return self.array(self.rng.standard_normal(ne[::-1]) * scale, type, name)

    def integers(self, low: int, high: int, *ne: int, type: str = "I32") -> Tensor:
        return self.array(self.rng.integers(low, high, ne[::-1]), type)


def place(
    nodes: Sequence[Tensor], key: int, start: int, keep: Sequence[Tensor]
) -> tuple[Graph, dict[Tensor, Tensor], int]:
    """``nodes`` on the buffer ``key`` instead of 1; those of ``keep`` become outputs, placed from ``start`` on."""
    new: dict[Tensor, Tensor] = {}

    def moved(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if tensor not in new:
            new[tensor] = replace(
                tensor, src=tuple(moved(s) for s in tensor.src), view_src=moved(tensor.view_src),
                buffer=key if tensor.buffer else 0,
            )  # fmt: skip
        return new[tensor]

    end = start
    for node in nodes:
        tensor = moved(node)
        assert tensor is not None
        if node in keep and not node.buffer:
            new[node] = replace(tensor, buffer=key, offset=end, flags=OUTPUT)
            end += (tensor.nbytes + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    return Graph(tuple(new[node] for node in nodes)), new, end


def at(node: Tensor, key: int, offset: int) -> Tensor:
    """``node`` in a buffer."""
    return replace(node, buffer=key, offset=offset)


def same(device: LocalDevice, node: Tensor, got: np.ndarray, wanted: np.ndarray) -> None:
    """Assert that ``device`` got what was wanted of ``node``, as well as its precision allows."""
    if wanted.dtype.kind == "i":
        np.testing.assert_array_equal(got, wanted)
    else:
        limit = TOLERANCE[device.precision.name] + ROUNDED[node.type.name]
        assert error(got, wanted) <= limit, f"{node}: {error(got, wanted):.2e}"


def check(device: LocalDevice, leaves: Leaves, nodes: Sequence[Tensor], *, runs: int = 2) -> Mapping[str, int]:
    """Run ``nodes`` (whose last one is the output) on ``device`` and in the reference, and compare the output.

    Returns the fusions that fired.
    """
    last = nodes[-1]
    buffer = device.allocate(len(leaves.memory) + last.nbytes + ALIGNMENT)
    try:
        graph, new, end = place(nodes, buffer.key, len(leaves.memory), [last])
        device.write(buffer, 0, leaves.memory)
        program = device.compile(graph, {buffer.key: buffer})
        memory = {buffer.key: bytearray(leaves.memory) + bytearray(end - len(leaves.memory))}
        wanted = reference.run(graph, memory)[new[last]]
        for _ in range(runs):
            program.run()
            held = {buffer.key: np.frombuffer(device.read(buffer, 0, end), np.uint8)}
            same(device, last, reference.read(new[last], held), wanted)
            if last.buffer:
                break  # it changed its own input
        return program.fusions
    finally:
        device.free(buffer)
