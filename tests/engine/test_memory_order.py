"""Random graphs that use memory in every way: afterwards all of it holds what the sequential interpreter left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sdrpc.engine import LocalDevice
from sdrpc.ggml import build as b
from sdrpc.ggml.ops import ALIASES
from sdrpc.ggml.params import ArgSort, Concat, Scale
from sdrpc.ggml.rules.base import injective
from sdrpc.ggml.tensor import Graph, Tensor
from sdrpc.ggml.types import F16, F32
from tests.engine.compare import at
from tests.support import reference

WORDS = 512
SHAPES = [(4, 6), (6, 4), (24,), (2, 3, 4), (4, 3, 2), (12, 2), (8, 3), (3, 8)]
ALIKE = 1e-5


class Builder:
    """A graph that grows by drawn steps, on one buffer of :data:`WORDS` floats."""

    def __init__(self, draw: Callable[[st.SearchStrategy[int]], int], key: int) -> None:
        self.draw, self.key = draw, key
        self.nodes: list[Tensor] = []
        self.known: list[Tensor] = [self.leaf(), self.leaf()]

    def upto(self, n: int) -> int:
        return self.draw(st.integers(0, n - 1))

    def leaf(self) -> Tensor:
        shape = SHAPES[self.upto(len(SHAPES))]
        return b.leaf(F32, *shape, buffer=self.key, offset=4 * self.upto(WORDS - 24))

    def pick(self) -> Tensor:
        """Mostly a recent tensor; sometimes a stale one, or memory that something may have been written over."""
        if self.upto(6) == 0:
            self.known.append(self.leaf())
        return self.known[-1 - self.upto(min(len(self.known), 8))]

    def add(self, node: Tensor) -> None:
        self.nodes.append(node)
        self.known.append(node)

    def placed(self, node: Tensor) -> Tensor:
        """``node`` somewhere in the buffer, over whatever is there, or in no buffer."""
        if self.upto(3) == 0:
            return node
        return replace(node, buffer=self.key, offset=4 * self.upto(WORDS - node.elements))

    def step(self) -> None:
        STEPS[self.upto(len(STEPS))](self)

    # steps

    def unary(self) -> None:
        self.add(self.placed(b.node("SIN", self.pick())))

    def unary_inplace(self) -> None:
        x = self.pick()
        if injective(x.type, x.ne, x.nb):
            self.add(b.inplace("SCALE", x, params=Scale(0.5, 0.25)))

    def binary(self) -> None:
        x, y = self.pick(), self.pick()
        if x.ne == y.ne:
            self.add(self.placed(b.node("ADD", x, y)))
        elif x.elements == y.elements:
            self.add(self.placed(b.node("ADD", b_cont(self, x), b_cont(self, y, x))))

    def binary_inplace(self) -> None:
        x, y = self.pick(), self.pick()
        if x.ne == y.ne:
            self.add(b.inplace("SUB", x, y))

    def copy_into(self) -> None:
        x, into = self.pick(), self.pick()
        if x.elements == into.elements:
            self.add(b.cpy(x, into))

    def cont(self) -> None:
        self.add(self.placed(b.cont(self.pick())))

    def cast(self) -> None:
        half = b.cast(self.pick(), F16)
        self.nodes.append(half)
        self.add(self.placed(b.cast(half, F32)))

    def concat(self) -> None:
        x = self.pick()
        if x.elements <= 24:
            self.add(self.placed(b.node("CONCAT", x, x, params=Concat(self.upto(2)))))

    def reshape(self) -> None:
        x = self.pick()
        fitting = [shape for shape in SHAPES if np.prod(shape) == x.elements]
        if x.contiguous and fitting:
            self.add(b.reshape(x, *fitting[self.upto(len(fitting))]))

    def permute(self) -> None:
        axes = [(1, 0, 2, 3), (2, 0, 1, 3), (0, 2, 1, 3), (1, 2, 0, 3)][self.upto(4)]
        self.add(b.permute(self.pick(), *axes))

    def part(self) -> None:
        x = self.pick()
        smaller = [n - self.upto(2) if n > 1 else n for n in x.ne]
        offset = sum(x.nb[i] for i in range(4) if smaller[i] < x.ne[i] and self.upto(2))
        self.add(b.view(x, *smaller, nb=x.nb[1:], offset=offset))


def b_cont(builder: Builder, x: Tensor, like: Tensor | None = None) -> Tensor:
    node = b.cont(x, *(like or x).ne)
    builder.nodes.append(node)
    return node


STEPS: list[Callable[[Builder], None]] = [
    Builder.unary, Builder.unary_inplace, Builder.binary, Builder.binary_inplace, Builder.copy_into, Builder.cont,
    Builder.cast, Builder.concat, Builder.reshape, Builder.permute, Builder.part,
]  # fmt: skip


@settings(max_examples=400)
@given(st.data())
def test_memory_is_as_if_nodes_ran_in_order(exact: LocalDevice, data: st.DataObject) -> None:
    buffer = exact.allocate(4 * WORDS)
    try:
        builder = Builder(data.draw, buffer.key)
        for _ in range(data.draw(st.integers(1, 14))):
            builder.step()
        computed = [node for node in builder.nodes if node.op not in ALIASES]
        if not computed:
            return
        graph = Graph(tuple(builder.nodes))
        filled = np.sin(np.arange(WORDS, dtype=np.float32) * 0.7 + 1)
        exact.write(buffer, 0, filled.tobytes())
        memory = {buffer.key: bytearray(filled.tobytes())}
        program = exact.compile(graph, {buffer.key: buffer})
        for _ in range(2):  # the second run reads what the first one left
            program.run()
            reference.run(graph, memory, dtype=np.float32)
            got = np.frombuffer(exact.read(buffer, 0, 4 * WORDS), np.float32)
            wanted = np.frombuffer(memory[buffer.key], np.float32)
            np.testing.assert_allclose(got, wanted, rtol=ALIKE, atol=ALIKE)
    finally:
        exact.free(buffer)


def run_both(device: LocalDevice, graph_of: Callable[[int], list[Tensor]], words: int = WORDS) -> None:
    buffer = device.allocate(4 * words)
    try:
        graph = Graph(tuple(graph_of(buffer.key)))
        filled = np.sin(np.arange(words, dtype=np.float32) + 1)
        device.write(buffer, 0, filled.tobytes())
        memory = {buffer.key: bytearray(filled.tobytes())}
        device.compile(graph, {buffer.key: buffer}).run()
        reference.run(graph, memory)
        np.testing.assert_allclose(
            np.frombuffer(device.read(buffer, 0, 4 * words), np.float32),
            np.frombuffer(memory[buffer.key], np.float32), rtol=ALIKE, atol=ALIKE,
        )  # fmt: skip
    finally:
        device.free(buffer)


def test_a_leaf_that_is_overwritten_before_its_copy_is_used(exact: LocalDevice) -> None:
    def graph(key: int) -> list[Tensor]:
        x = b.leaf(F32, 8, buffer=key)
        early = b.cont(x)
        over = at(b.node("COS", x), key, 0)
        return [early, over, at(b.node("ADD", early, over), key, 256)]

    run_both(exact, graph)


def test_an_old_name_of_overwritten_bytes_reads_the_new_ones(exact: LocalDevice) -> None:
    def graph(key: int) -> list[Tensor]:
        first = at(b.node("SIN", b.leaf(F32, 8, buffer=key)), key, 128)
        second = at(b.node("COS", b.leaf(F32, 8, buffer=key, offset=64)), key, 128)
        return [first, second, at(b.node("SQR", first), key, 256)]

    run_both(exact, graph)


def test_bytes_of_two_writers_are_read_from_memory(exact: LocalDevice) -> None:
    def graph(key: int) -> list[Tensor]:
        x = b.leaf(F32, 8, buffer=key)
        low, high = at(b.node("SIN", x), key, 128), at(b.node("COS", x), key, 160)
        both = b.leaf(F32, 16, buffer=key, offset=128)
        return [low, high, at(b.node("SQR", both), key, 128)]

    run_both(exact, graph)


def test_copy_into_a_column_of_a_value_in_no_buffer(exact: LocalDevice) -> None:
    def graph(key: int) -> list[Tensor]:
        value = b.node("SIN", b.leaf(F32, 6, 4, buffer=key))
        column = b.view(value, 1, 4, nb=value.nb[1:], offset=8)
        copied = b.cpy(b.leaf(F32, 1, 4, buffer=key, offset=128), column)
        return [value, column, copied, at(b.node("SQR", value), key, 512)]

    run_both(exact, graph)


def test_rows_set_in_the_middle_of_a_graph(exact: LocalDevice) -> None:
    def graph(key: int) -> list[Tensor]:
        cache = at(b.node("SIN", b.leaf(F32, 4, 6, buffer=key)), key, 256)
        rows = b.node("ARGSORT", b.leaf(F32, 3, buffer=key, offset=128), params=ArgSort(0))
        written = b.inplace("SET_ROWS", b.leaf(F32, 4, 3, buffer=key, offset=160), rows, cache, into=2)
        return [cache, rows, written, at(b.node("SQR", cache), key, 512), at(b.node("COS", written), key, 768)]

    run_both(exact, graph)


def test_strides_that_overlap_are_read_but_not_written(exact: LocalDevice) -> None:
    def graph(key: int) -> list[Tensor]:
        x = at(b.node("SIN", b.leaf(F32, 16, buffer=key)), key, 128)
        windows = b.view(x, 4, 7, nb=(8,))
        return [x, windows, at(b.cont(windows), key, 512)]

    run_both(exact, graph)
