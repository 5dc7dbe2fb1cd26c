"""Graphs as bytes: the same graph back, the same digest for the same content, and errors for everything else."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from hashlib import blake2b
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdrpc.errors import GraphError
from sdrpc.ggml.build import leaf, mul_mat, node
from sdrpc.ggml.params import Clamp, MulMat, Scale
from sdrpc.ggml.serialize import DIGEST_BYTES, MAGIC, decode, digest, encode
from sdrpc.ggml.tensor import OUTPUT, Graph, Tensor, rewrite
from sdrpc.ggml.types import F16, F32
from tests.support.cases import CASES
from tests.support.feed import Feed, graph

START = len(MAGIC) + DIGEST_BYTES


def small() -> Graph:
    weight, x = leaf(F16, 4, 3, name="w", buffer=1), leaf(F32, 4, 2, name="x", buffer=2, offset=64)
    product = mul_mat(weight, x, name="y")
    scaled = replace(node("SCALE", product, params=Scale(0.1, -1e-30), flags=OUTPUT), buffer=3)
    return Graph((product, scaled))


def fields(tensors: tuple[Tensor, ...]) -> list[tuple[Any, ...]]:
    at = {tensor: i for i, tensor in enumerate(tensors)}
    return [
        (t.type, t.ne, t.nb, t.op, t.params, [s and at[s] for s in t.src], t.view_src and at[t.view_src],
         t.view_offset, t.buffer, t.offset, t.flags, t.name)
        for t in tensors
    ]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_graph_comes_back(name: str) -> None:
    before = graph(CASES[name](Feed()))
    after = decode(encode(before))
    assert fields(after.tensors) == fields(before.tensors)
    assert [type(t.params) for t in after.tensors] == [type(t.params) for t in before.tensors]
    assert digest(after) == digest(before)


def test_infinite_parameters_come_back() -> None:
    clamped = Graph((node("CLAMP", leaf(F32, 4, buffer=1), params=Clamp(-1.0, float("inf"))),))
    assert decode(encode(clamped)).nodes[0].params == Clamp(-1.0, float("inf"))


def test_the_digest_is_of_content_alone() -> None:
    assert digest(small()) == digest(small())
    assert digest(rewrite(small(), lambda _: {"name": "another"})) == digest(small())
    assert encode(small()) == encode(small())
    assert len(digest(small())) == 2 * DIGEST_BYTES


CHANGES: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "parameter": lambda t: {"params": Scale(0.1, 1e-30)} if t.op == "SCALE" else {},
    "precision": lambda t: {"params": MulMat(10)} if t.op == "MUL_MAT" else {},
    "type": lambda t: {"type": F16} if t.name == "y" else {},
    "shape": lambda t: {"ne": (4, 1, 2, 1)} if t.name == "x" else {},
    "strides": lambda t: {"nb": (4, 32, 64, 64)} if t.name == "x" else {},
    "place": lambda t: {"offset": 128} if t.name == "x" else {},
    "buffer": lambda t: {"buffer": 5} if t.name == "x" else {},
    "flags": lambda t: {"flags": 0},
    "operation": lambda t: {"op": "OUT_PROD"} if t.op == "MUL_MAT" else {},
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_digest_sees_every_change(change: str) -> None:
    assert digest(rewrite(small(), CHANGES[change])) != digest(small())


def test_the_digest_sees_the_order_of_sources() -> None:
    a, b = leaf(F32, 4, buffer=1), leaf(F32, 4, buffer=2)
    total = node("SUB", a, b)
    assert digest(Graph((replace(total, src=(b, a)),))) != digest(Graph((total,)))


@given(st.data())
def test_any_damage_is_seen(data: st.DataObject) -> None:
    good = encode(small())
    at = data.draw(st.integers(0, len(good) - 1))
    flipped = bytearray(good)
    flipped[at] ^= 1 << data.draw(st.integers(0, 7))
    for bad in (bytes(flipped), good[:at], good + b" "):
        with pytest.raises(GraphError, match="damaged"):
            decode(bad)


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    for bad in (data, MAGIC + data, _signed(data)):
        with pytest.raises(GraphError):
            decode(bad)


def _signed(body: bytes) -> bytes:
    """A body that somebody made on purpose: its digest is right."""
    return MAGIC + blake2b(body, digest_size=DIGEST_BYTES).digest() + body


def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(encode(small())[START:])
    return table


BODIES = [
    b"", b"[]", b"[" * 100_000, b"\xff", b"9" * 10_000, b'{"leaves":0}', b'{"leaves":"0","tensors":[]}',
    b'{"leaves":2,"tensors":[]}', b'{"leaves":0,"tensors":{}}',
]  # fmt: skip


def test_bodies_that_no_encoder_made() -> None:
    assert decode(_signed(json.dumps(_table()).encode())).nodes[0].op == "MUL_MAT"
    for body in BODIES:
        with pytest.raises(GraphError):
            decode(_signed(body))


JUNK = [None, True, -1, 2**63, 2**64, 1.5, "x", [], [1], {}, [None], [[]], ["x", "y", "z", "w"], "N" * 2000, [0] * 11]


@pytest.mark.parametrize("column", range(12))
@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: repr(junk)[:20])
def test_each_field_is_checked(column: int, junk: object) -> None:
    """Junk in one field is a GraphError, or (where it happens to be sound) still a graph of sound types."""
    table = _table()
    table["tensors"][3][column] = junk
    try:
        node = decode(_signed(json.dumps(table).encode())).nodes[-1]
    except GraphError:
        return
    assert isinstance(node.op, str)
    assert isinstance(node.name, str)
    assert all(type(n) is int and n >= 0 for n in (*node.ne, *node.nb, node.offset, node.buffer, node.view_offset))
    assert all(source is None or isinstance(source, Tensor) for source in node.src)


@pytest.mark.parametrize(
    ("column", "junk"),
    [
        (0, "F23"), (1, [1, 1, 1]), (2, [4, -4, 4, 4]), (3, ""), (4, []), (4, ["x", 1.0]), (4, [1.0, 1.0, 1.0]),
        (5, [4]), (5, [3]), (5, [-1]), (5, [True]), (6, 3), (7, -1), (8, "1"), (9, 2**63), (10, 2**31), (11, None),
    ],
)  # fmt: skip
def test_fields_that_are_wrong(column: int, junk: object) -> None:
    table = _table()
    table["tensors"][3][column] = junk
    with pytest.raises(GraphError, match="encoded graph"):
        decode(_signed(json.dumps(table).encode()))


def test_leaves_refer_to_nothing() -> None:
    table = _table()
    table["leaves"] = 3
    with pytest.raises(GraphError, match="wrong leaf"):
        decode(_signed(json.dumps(table).encode()))
