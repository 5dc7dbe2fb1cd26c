"""Devices to run lowered graphs on: the living definition of the operations behind the Device interface."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import NamedTuple

import numpy as np

from sdrpc.device import Buffer, Bytes, Device, Memory, Program, Target
from sdrpc.ggml import validate
from sdrpc.ggml.tensor import Graph
from sdrpc.targets import SDRPC
from tests.support import reference


class Room(NamedTuple):
    key: int
    size: int


class ReferenceProgram(Program):
    def __init__(self, graph: Graph, memory: dict[int, np.ndarray]) -> None:
        self.graph, self.memory = graph, memory

    def run(self) -> None:
        reference.run(self.graph, self.memory, dtype=np.float32)


class ReferenceDevice(Device):
    """Computes in f32, slowly. ``written`` lists the sizes of all writes; every graph is checked before use."""

    name, description = "REF", "the reference interpreter"

    def __init__(self, target: Target = SDRPC) -> None:
        self._target = target
        self._keys = count(1)
        self.memory_of: dict[int, np.ndarray] = {}
        self.written: list[int] = []

    @property
    def target(self) -> Target:
        return self._target

    @property
    def alignment(self) -> int:
        return 32

    def memory(self) -> Memory:
        return Memory(1 << 40, 1 << 40)

    def allocate(self, size: int) -> Buffer:
        key = next(self._keys)
        self.memory_of[key] = np.full(size, 0xFF, np.uint8)  # NaN, where nobody writes
        return Room(key, size)

    def free(self, buffer: Buffer) -> None:
        del self.memory_of[buffer.key]

    def write(self, buffer: Buffer, offset: int, data: Bytes) -> None:
        source = np.frombuffer(data, np.uint8)
        self.written.append(source.size)
        assert offset + source.size <= buffer.size
        self.memory_of[buffer.key][offset : offset + source.size] = source

    def read(self, buffer: Buffer, offset: int, size: int) -> Bytes:
        return self.memory_of[buffer.key][offset : offset + size].tobytes()

    def compile(self, graph: Graph, buffers: Mapping[int, Buffer]) -> Program:
        validate.check(graph, {key: buffer.size for key, buffer in buffers.items()})
        assert {node.op for node in graph.nodes} <= self._target.ops
        assert self._target.managed or all(node.buffer for node in graph.nodes)
        return ReferenceProgram(graph, self.memory_of)
