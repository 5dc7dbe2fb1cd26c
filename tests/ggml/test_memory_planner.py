"""The memory planner: no two values that live at one time share a byte."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdrpc.ggml.build import inplace, leaf, node, reshape, view
from sdrpc.ggml.memory_planner import aligned, bind, lay_out, place
from sdrpc.ggml.ops import ALIASES
from sdrpc.ggml.tensor import OUTPUT, Graph, Tensor, root
from sdrpc.ggml.types import F32
from sdrpc.ggml.validate import check
from tests.support import reference

LEAF = leaf(F32, 12, buffer=1)
SIZES = {1: 48}


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Random graphs of sums, larger and smaller values, names for bytes and writes in place."""
    values: list[Tensor] = [LEAF]
    nodes: list[Tensor] = []
    for _ in range(draw(st.integers(1, 25))):
        a = draw(st.sampled_from(values))
        kind = draw(st.sampled_from(["SQR", "REPEAT", "ADD", "reshape", "view", "inplace"]))
        n = a.elements
        if kind == "REPEAT" and n < 500:
            new = node("REPEAT", a, ne=(a.ne[0], a.ne[1] * draw(st.integers(1, 4)), *a.ne[2:]))
        elif kind == "ADD":
            new = node("ADD", a, draw(st.sampled_from([v for v in values if v.ne == a.ne])))
        elif kind == "reshape":
            new = reshape(a, n)
        elif kind == "view":
            new = view(reshape(a, n), draw(st.integers(1, n))) if a.view_src is None else view(a, a.ne[0])
        elif kind == "inplace" and root(a)[0] is not LEAF:
            new = inplace("SQR", a)
        else:
            new = node("SQR", a)
        if new.src[0] is not a:
            nodes.append(new.src[0])  # type: ignore[arg-type]
        if new.op not in ALIASES and draw(st.booleans()) and draw(st.booleans()):
            new = replace(new, flags=OUTPUT)
        nodes.append(new)
        values.append(new)
    return Graph(tuple(nodes))


@given(graphs(), st.sampled_from([4, 32, 256]))
def test_values_that_live_together_share_no_byte(graph: Graph, alignment: int) -> None:
    placed = place(graph, alignment, buffer=2)
    check(placed.graph, {**SIZES, 2: placed.size}, managed=False)
    born, died = _lifetimes(graph)
    owned = [(old, new) for old, new in zip(graph.nodes, placed.graph.nodes, strict=True) if old.view_src is None]
    for i, (old, new) in enumerate(owned):
        assert new.offset % alignment == 0
        assert new.offset + new.nbytes <= placed.size
        for other, moved in owned[:i]:
            if born[old] <= died[other] and born[other] <= died[old]:
                assert new.offset >= moved.offset + moved.nbytes or moved.offset >= new.offset + new.nbytes


def _lifetimes(graph: Graph) -> tuple[dict[Tensor, int], dict[Tensor, int]]:
    """When each value is computed and last read, found the slow way."""
    born = {node: i for i, node in enumerate(graph.nodes) if node.view_src is None}
    died = {}
    for value, birth in born.items():
        names = [node for node in graph.nodes if root(node)[0] is value]
        uses = [i for i, node in enumerate(graph.nodes) if node in names or any(s in names for s in node.src)]
        died[value] = len(graph.nodes) if any(node.is_output for node in names) else max(uses, default=birth)
    return born, died


@given(graphs())
def test_a_placed_graph_computes_the_same(graph: Graph) -> None:
    start = np.linspace(0.5, 1.0, 12, dtype=np.float32).view(np.uint8)
    outputs = [node for node in graph.nodes if node.is_output] or [graph.nodes[-1]]
    expected = reference.run(graph, {1: start.copy()}, keep=outputs)
    placed = place(graph, 32, buffer=2)
    moved = dict(zip(graph.nodes, placed.graph.nodes, strict=True))
    memory = {1: start.copy(), 2: np.full(placed.size, 0xFF, np.uint8)}
    got = reference.run(placed.graph, memory, keep=[moved[output] for output in outputs])
    for output in outputs:
        assert np.array_equal(expected[output], got[moved[output]])


def test_outputs_survive_to_the_end() -> None:
    kept = node("SQR", LEAF, flags=OUTPUT)
    name = replace(reshape(node("SQRT", kept), 3, 4), flags=OUTPUT)  # an output that is a name for a value
    value = name.src[0]
    assert value is not None
    tail = [node("SQR", name)]
    for _ in range(5):
        tail.append(node("SQR", tail[-1]))
    placed = place(Graph((kept, value, name, *tail)), 16, buffer=2)
    memory = {1: np.full(12, 2, np.float32).view(np.uint8), 2: np.zeros(placed.size, np.uint8)}
    reference.run(placed.graph, memory)
    assert (reference.read(placed.graph.nodes[0], memory) == 4).all()
    assert (reference.read(placed.graph.nodes[2], memory) == 2).all()


def test_memory_is_used_again() -> None:
    chain = [node("SQR", LEAF)]
    for _ in range(50):
        chain.append(node("SQR", chain[-1]))
    assert place(Graph(tuple(chain)), 32, buffer=2).size == 2 * 64


def test_the_last_gap_grows() -> None:
    first = node("SQR", LEAF)
    large = node("REPEAT", node("SUM", first), ne=(100,))
    total = large.src[0]
    assert total is not None
    placed = place(Graph((first, total, large)), 32, buffer=2)
    assert placed.size == 64 + 32 + 416
    second = node("REPEAT", node("SUM", large), ne=(120,))
    assert second.src[0] is not None
    assert place(Graph((first, total, large, second.src[0], second)), 32, buffer=2).size < 64 + 32 + 416 + 32 + 480


def test_bind_moves_names_with_their_bytes() -> None:
    weight = leaf(F32, 6, 4, name="w")
    part = view(weight, 6, 2, offset=48)
    inner = view(part, 3, offset=12)
    total = node("SUM", inner)
    graph = bind(Graph((part, inner, total)), {weight: (7, 128)})
    assert [(t.buffer, t.offset) for t in graph.tensors] == [(7, 128), (7, 176), (7, 188), (0, 0)]
    assert graph.nodes[1].view_src is graph.leaves[0]
    assert graph.nodes[2].src == (graph.nodes[1],)


@given(st.lists(st.integers(0, 1000)), st.sampled_from([1, 16, 128]))
def test_laid_out_things_do_not_overlap(sizes: list[int], alignment: int) -> None:
    offsets, size = lay_out(sizes, alignment)
    for offset, length, end in zip(offsets, sizes, (*offsets, size)[1:], strict=True):
        assert offset % alignment == 0
        assert 0 <= end - offset - length < alignment


@pytest.mark.parametrize(("size", "expected"), [(0, 0), (1, 32), (32, 32), (33, 64)])
def test_aligned(size: int, expected: int) -> None:
    assert aligned(size, 32) == expected
