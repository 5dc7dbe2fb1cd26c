"""A device that checks graphs as ours do, keeps no bytes and computes nothing: it may have memory of any size."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import NamedTuple

from sdrpc.device import NOBODY, Buffer, Bytes, Client, Memory, Rows, ServedDevice, ServedProgram, Target, Watch
from sdrpc.errors import OutOfMemory
from sdrpc.ggml import validate
from sdrpc.ggml.tensor import Graph
from sdrpc.targets import SDRPC


class NullBuffer(NamedTuple):
    key: int
    size: int


class NullProgram(ServedProgram):
    def __init__(self, graph: Graph) -> None:
        self.graph, self.runs = graph, 0

    def run(self, watch: Watch | None = None, client: Client = NOBODY) -> None:
        self.runs += 1


class NullDevice(ServedDevice):
    name, description, alignment = "NULL", "nothing", 32

    def __init__(self, memory: int = 1 << 40) -> None:
        self.total, self.held = memory, 0
        self.programs: list[NullProgram] = []
        self.closed = False
        self._keys = count(1)

    @property
    def target(self) -> Target:
        return SDRPC

    @property
    def graphs(self) -> list[Graph]:
        return [program.graph for program in self.programs]

    def memory(self) -> Memory:
        return Memory(self.total - self.held, self.total)

    def allocate(self, size: int) -> NullBuffer:
        if size > self.total - self.held:
            raise OutOfMemory(self.name, size)
        self.held += size
        return NullBuffer(next(self._keys), size)

    def free(self, buffer: Buffer) -> None:
        self.held -= buffer.size

    def write(self, buffer: Buffer, offset: int, data: Bytes) -> None:
        assert 0 <= offset <= offset + len(data) <= buffer.size

    def read(self, buffer: Buffer, offset: int, size: int) -> Bytes:
        return bytes(size)

    def fill(self, buffer: Buffer, offset: int, size: int, value: int) -> None:
        assert 0 <= offset <= offset + size <= buffer.size

    def write_rows(self, buffer: Buffer, rows: Rows, data: Bytes) -> None:
        assert 0 <= rows.offset <= rows.offset + rows.extent <= buffer.size
        assert len(data) == rows.copies * rows.size

    def read_rows(self, buffer: Buffer, rows: Rows) -> Bytes:
        return bytes(rows.copies * rows.size)

    def copy(self, source: Buffer, source_offset: int, target: Buffer, target_offset: int, size: int) -> None:
        assert source_offset + size <= source.size

    def compile(
        self,
        graph: Graph,
        buffers: Mapping[int, Buffer],
        name: bytes | None = None,
        watch: Watch | None = None,
        client: Client = NOBODY,
    ) -> NullProgram:
        validate.check(graph, {key: buffer.size for key, buffer in buffers.items()}, max_bytes=self.total)
        self.programs.append(NullProgram(graph))
        return self.programs[-1]

    def stop(self, seconds: float) -> bool:
        self.closed = True
        return True
