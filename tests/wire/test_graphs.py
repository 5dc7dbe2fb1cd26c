"""GRAPH_COMPUTE: graphs that a real client sent, graphs of our own, and graphs that mean harm."""

from __future__ import annotations

import lzma
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from struct import pack
from typing import Any

import numpy as np
import pytest

from sdrpc.errors import LocalProtocolError, RemoteProtocolError, UnsupportedOperation
from sdrpc.ggml import params as p
from sdrpc.ggml.dialect import Dialect, dialects, newest
from sdrpc.ggml.tensor import OUTPUT, Graph, Tensor, contiguous_strides, dims
from sdrpc.ggml.types import F16, F32, TYPES
from sdrpc.wire.graphs import COMPUTE, decode_graph, encode_graph, split
from sdrpc.wire.records import Record, columns, decode_records
from tests.wire.examples import DIALECTS, NAME_LENGTHS, record

DATA = Path(__file__).parents[1] / "data"
RECORDED = dialects()["5.0.1"]
every_dialect = pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.version)


def recording(name: str) -> bytes:
    return lzma.decompress((DATA / f"sd15-128px-{name}.graph.xz").read_bytes())


def same(handle: int, address: int) -> tuple[int, int]:
    """Handles as keys, addresses as offsets: for both directions."""
    return handle, address


def tensor(*ne: int, op: str = "NONE", type: Any = F32, **more: Any) -> Tensor:
    shape = dims(*ne)
    return Tensor(type, shape, contiguous_strides(type, shape), op, **more)


def described(graph: Graph) -> list[tuple[Any, ...]]:
    """All that a graph says, with tensors replaced by their numbers; without the flag COMPUTE, which the wire adds."""
    numbers = {tensor: number for number, tensor in enumerate(graph.tensors)}

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return numbers[value]
        return tuple(map(plain, value)) if type(value) is tuple else value

    names = [field.name for field in fields(Tensor)]
    return [
        tuple(plain(getattr(one, name)) if name != "flags" else one.flags & ~COMPUTE for name in names)
        for one in graph.tensors
    ]


RECORDINGS = {"clip": (511, 709), "unet": (2538, 3227), "vae-decoder": (586, 727)}
UNET_OPS = {
    "IM2COL": 98, "RESHAPE": 792, "MUL_MAT": 282, "PERMUTE": 226, "CONT": 242, "ADD": 403, "GROUP_NORM": 61, "MUL": 125,
    "UNARY": 84, "SCALE": 1, "TIMESTEP_EMBEDDING": 1, "NORM": 48, "CPY": 64, "FLASH_ATTN_EXT": 32, "VIEW": 64,
    "CONCAT": 12, "UPSCALE": 3,
}  # fmt: skip


@pytest.mark.parametrize(("name", "counts"), RECORDINGS.items(), ids=RECORDINGS)
def test_graphs_of_a_real_client(name: str, counts: tuple[int, int]) -> None:
    payload = recording(name)
    assert split(payload, RECORDED).name_length == 160
    device, graph = decode_graph(payload, RECORDED, same)
    assert device == 0
    assert (len(graph.nodes), len(split(payload, RECORDED).tensors) // 392) == counts
    again = encode_graph(graph, device, RECORDED, 160, same)
    assert described(decode_graph(again, RECORDED, same).graph) == described(graph)


def test_operations_of_a_real_unet() -> None:
    graph = decode_graph(recording("unet"), RECORDED, same).graph
    assert Counter(node.op for node in graph.nodes) == UNET_OPS
    groups = {node.params for node in graph.nodes if node.op == "GROUP_NORM"}
    assert {params.groups for params in groups} == {32}
    assert {node.params.op for node in graph.nodes if node.op == "UNARY"} == {"SILU", "GELU"}
    assert all(node.flags & COMPUTE for node in graph.nodes)


def test_a_unet_is_decoded_in_100_ms() -> None:
    payload = recording("unet")
    times = []
    for _ in range(5):
        start = time.thread_time()  # not what other processes take
        decode_graph(payload, RECORDED, same)
        times.append(time.thread_time() - start)
    assert min(times) < 0.1


def small(dialect: Dialect) -> Graph:
    """A graph with a source that is none, a node in no buffer, a view, a cast to itself, and an output."""
    a = tensor(8, 4, name="a", buffer=5, offset=64)
    b = tensor(8, 4, type=F16, name="b", buffer=5, offset=4096)
    added = tensor(8, 4, op="ADD", src=(a, b), view_src=a, buffer=5, offset=64)
    viewed = tensor(4, op="VIEW", src=(added,), view_src=added, view_offset=16, params=p.View(16), buffer=5, offset=80)
    unary = tensor(4, op="UNARY", src=(viewed,), params=p.Unary("SILU"))
    cast = tensor(4, op="CPY", src=(unary,), type=F16)
    attention = tensor(4, op="SOFT_MAX", src=(cast, None, b), params=p.SoftMax(0.5), flags=OUTPUT, name="out", buffer=6)
    return Graph((added, viewed, unary, cast, attention))


@every_dialect
@pytest.mark.parametrize("name_length", NAME_LENGTHS)
def test_round_trip(dialect: Dialect, name_length: int) -> None:
    graph = small(dialect)
    payload = encode_graph(graph, 7, dialect, name_length, same)
    device, again = decode_graph(payload, dialect, same)
    assert device == 7
    assert described(again) == described(graph)
    assert encode_graph(again, 7, dialect, name_length, same) == payload


@every_dialect
def test_what_native_servers_need_to_see(dialect: Dialect) -> None:
    graph = small(dialect)
    parts = split(encode_graph(graph, 0, dialect, 64, lambda key, offset: (key * 100, key * 1000 + offset)), dialect)
    a, b, added, viewed, unary, cast, attention = decode_records(parts.tensors, 64)
    assert list(parts.node_ids) == [3, 4, 5, 6, 7]
    assert [one.id for one in (a, b, added, viewed, unary, cast, attention)] == list(range(1, 8))
    assert (a.buffer, a.data) == (500, 5064)
    assert (unary.buffer, unary.data) == (0, 0)
    assert (a.op, a.flags, added.flags, attention.flags) == (0, 0, COMPUTE, COMPUTE | OUTPUT)
    assert added.view_src == a.id
    assert (viewed.view_src, viewed.view_offs) == (added.id, 16)
    assert cast.src == (unary.id, cast.id, 0, 0, 0, 0, 0, 0, 0, 0)  # as ggml_cast has it
    assert attention.src[:3] == (cast.id, 0, b.id)
    uses = [one.use_count for one in (a, b, added, viewed, unary, cast, attention)]
    assert uses == ([1, 2, 1, 1, 1, 2, 0] if dialect.has_use_count else [0] * 7)


def test_strides_over_4_gib() -> None:
    """nb is cut to 32 bits on the wire, and restored where the tensor is dense."""
    big = tensor(1 << 20, 1 << 10, 3, 2, buffer=1)
    view = tensor(4, op="VIEW", src=(big,), view_src=big, buffer=1)
    payload = encode_graph(Graph((view,)), 0, newest(), 64, same)
    assert decode_records(split(payload, newest()).tensors, 64)[0].nb == (4, 1 << 22, 0, 0)
    assert decode_graph(payload, newest(), same).graph.leaves[0].nb == big.nb == (4, 1 << 22, 1 << 32, 3 << 32)


def test_resolve_is_asked_for_what_nodes_use_only() -> None:
    asked: list[tuple[int, int]] = []

    def resolve(handle: int, address: int) -> tuple[int, int]:
        asked.append((handle, address))
        return handle + 1, 16

    payload = Payload([Record(id=1, buffer=5, data=6, **PLAIN), Record(id=2, buffer=7, data=8, **PLAIN)], [2])
    (node,) = decode_graph(payload.bytes, newest(), resolve).graph.nodes
    assert asked == [(7, 8)]
    assert (node.buffer, node.offset) == (8, 16)


def test_memory_that_an_earlier_graph_filled_is_a_leaf() -> None:
    """A scheduler sends the ancestry of each part of a graph: tensors with operations that are no nodes."""
    records = [
        Record(id=1, buffer=5, op=2, src=(9,) + (0,) * 9, **PLAIN),
        Record(id=2, buffer=5, op=2, src=(1, 1) + (0,) * 8, **PLAIN),
        Record(id=9, op=2, **PLAIN),
    ]
    (node,) = decode_graph(Payload(records, [2]).bytes, newest(), same).graph.nodes
    leaf = node.src[0]
    assert leaf is not None
    assert node.src == (leaf, leaf)
    assert (leaf.op, leaf.src, leaf.buffer) == ("NONE", (), 5)


@every_dialect
def test_nodes_that_are_not_marked_are_memory(dialect: Dialect) -> None:
    """A branch that a client has not chosen: its nodes, whatever they are, keep the bytes that they have."""
    chosen, other = {"op": dialect.op_numbers["SQRT"]}, {"op": dialect.op_numbers["MAP_CUSTOM1"], "flags": 0}
    graph = decode_graph(
        Payload(chain(NONE, other, other, chosen), [2, 3, 4], dialect=dialect).bytes, dialect, same
    ).graph
    (node,) = graph.nodes
    (leaf,) = graph.leaves
    assert (node.op, node.src, leaf.op, leaf.src) == ("SQRT", (leaf,), "NONE", ())


def test_names_for_bytes_elsewhere_that_nobody_reads() -> None:
    """A scheduler sends the name of a view of another device's memory, of which this device has a copy."""
    view = {"op": newest().op_numbers["VIEW"], "buffer": 0, "data": 0}
    elsewhere = {"buffer": 0, "data": 0}
    graph = decode_graph(Payload(chain(elsewhere, view, view, SRC(5), NONE), [2, 3, 4]).bytes, newest(), same).graph
    assert [node.op for node in graph.nodes] == ["SQRT"]
    read = decode_graph(Payload(chain(elsewhere, view, view, NONE), [2, 3, 4]).bytes, newest(), same).graph
    assert [node.op for node in read.nodes] == ["VIEW", "VIEW", "SQRT"]


def test_results_without_elements() -> None:
    """ggml passes over them; what would read one means nothing, and is kept to be refused."""
    empty = {"ne": (4, 0, 1, 1)}
    graph = decode_graph(Payload(chain(NONE, empty, empty, SRC(1)), [2, 3, 4]).bytes, newest(), same).graph
    assert [node.ne[1] for node in graph.nodes] == [1]
    read = decode_graph(Payload(chain(NONE, empty, NONE), [2, 3]).bytes, newest(), same).graph
    assert [node.ne[1] for node in read.nodes] == [0, 1]


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_a_concat_with_nothing_is_a_copy(order: tuple[int, int]) -> None:
    """llama.cpp joins the last token's row with those of the tokens before it, of which there may be none."""
    empty, joined = (
        {"ne": (4, 0, 1, 1), "src": (0,) * 10},
        {"op": newest().op_numbers["CONCAT"], "src": order + (0,) * 8},
    )
    graph = decode_graph(Payload(chain(NONE, empty, joined), [2, 3]).bytes, newest(), same).graph
    (copy,) = graph.nodes
    assert (copy.op, copy.params, copy.src) == ("CONT", p.NO_PARAMS, graph.leaves)
    assert graph.leaves[0].ne == (4, 1, 1, 1)


@every_dialect
def test_clients_that_mark_nothing(dialect: Dialect) -> None:
    """Protocol 3.6.0 has no such mark, and its clients can't be told from those of 3.6.1."""
    nodes = [{"op": dialect.op_numbers["SQRT"], "flags": 0}] * 2
    graph = decode_graph(Payload(chain(NONE, *nodes), [2, 3], dialect=dialect).bytes, dialect, same).graph
    assert len(graph.nodes) == (2 if dialect.version.startswith("3.6") else 0)


PLAIN: dict[str, Any] = {"ne": (4, 1, 1, 1), "nb": (4, 16, 16, 16), "flags": COMPUTE}


class Payload:
    """A GRAPH_COMPUTE payload put together by hand."""

    def __init__(
        self, records: list[Record], nodes: list[int], name_length: int = 64, dialect: Dialect | None = None
    ) -> None:
        uid = pack("<Q", 2**64 - 1) if (dialect or newest()).has_graph_uids else b""
        self.head = pack("<I", 0) + uid + pack(f"<I{len(nodes)}QI", len(nodes), *nodes, len(records))
        self.bytes = self.head + b"".join(record(one, name_length) for one in records)


def chain(*changes: dict[str, Any]) -> list[Record]:
    """Tensors 1, 2, … each the square root of the one before, with changes."""
    sqrt = newest().op_numbers["SQRT"]
    plain = {**PLAIN, "buffer": 1, "data": 32}
    made = []
    for number, change in enumerate(changes, start=1):
        src = (number - 1, *[0] * 9)
        made.append(Record(id=number, op=sqrt if number > 1 else 0, src=src, **plain)._replace(**change))
    return made


NONE: dict[str, Any] = {}
SRC: Callable[[int], dict[str, Any]] = lambda number: {"src": (number, *[0] * 9)}  # noqa: E731

HOSTILE: dict[str, tuple[bytes, str]] = {
    "T27 node id 0": (Payload(chain(NONE, NONE), [0]).bytes, "node 0 has the unknown id 0"),
    "T27 tensor id 0": (Payload(chain(NONE, {"id": 0}), [1]).bytes, "tensor 1 'x': id 0"),
    "T28 a node twice": (Payload(chain(NONE, NONE), [2, 2]).bytes, "a node twice"),
    "T28 two tensors with one id": (Payload(chain(NONE, NONE, {"id": 2}), [2]).bytes, "tensor 2.*the same id"),
    "T29 unknown node": (Payload(chain(NONE, NONE), [2, 77]).bytes, "node 1 has the unknown id 77"),
    "T29 unknown source": (Payload(chain(NONE, SRC(55)), [2]).bytes, "source 0 has the unknown id 55"),
    "T29 unknown view_src": (Payload(chain(NONE, {"view_src": 56}), [2]).bytes, "view_src has the unknown id 56"),
    "T30 reads itself": (Payload(chain(NONE, SRC(2)), [2]).bytes, "source 0 is computed later, or is the node itself"),
    "T30 a view of itself": (Payload(chain(NONE, {"view_src": 2}), [2]).bytes, "view_src is computed later"),
    "T30 two that read each other": (Payload(chain(NONE, SRC(3), NONE), [2, 3]).bytes, "source 0 is computed later"),
    "nodes out of order": (Payload(chain(NONE, NONE, NONE), [3, 2]).bytes, "tensor 2.*is computed later"),
    "T17 type -1": (Payload(chain(NONE, {"type": 2**32 - 1}), [2]).bytes, "type 4294967295 does not exist"),
    "T17 a retired type": (Payload(chain(NONE, {"type": 4}), [2]).bytes, "type 4 does not exist"),
    "T18 part of a block": (Payload(chain({"type": 2, "ne": (31, 1, 1, 1)}, NONE), [2]).bytes, "31 elements a row"),
    "T32 operation numbers": (
        Payload(chain(NONE, {"op": 117}, {"op": 2**32 - 1}), [2, 3]).bytes,
        r"operations \[117, 4294967295\] do not exist in protocol 8.0.0",
    ),
    "T32 a unary operation's number": (
        Payload(chain(NONE, {"op": newest().op_numbers["UNARY"], "op_params": b"\xff" * 64}), [2]).bytes,
        "UNARY number -1 does not exist",
    ),
    "T35 data in no buffer": (Payload(chain({"buffer": 0}, NONE), [2]).bytes, "an address in no buffer"),
    "nodes without tensors": (pack("<IQIQI", 0, 0, 1, 1, 0), "1 nodes but no tensor"),
}  # fmt: skip


@pytest.mark.parametrize(("payload", "reason"), HOSTILE.values(), ids=HOSTILE)
def test_hostile(payload: bytes, reason: str) -> None:
    with pytest.raises(RemoteProtocolError, match="GRAPH_COMPUTE: .*" + reason.replace("'x'", "''")):
        decode_graph(payload, newest(), same)


GOOD = Payload(chain(NONE, NONE, NONE), [2, 3]).bytes
COUNTS = {
    "nothing": b"",
    "T25 no counts": GOOD[:19],
    "T25 2^32-1 nodes": GOOD[:12] + pack("<I", 2**32 - 1) + GOOD[16:],
    "T25 one node more": GOOD[:12] + pack("<I", 3) + GOOD[16:],
    "T25 one node fewer": GOOD[:12] + pack("<I", 1) + GOOD[16:],
    "T26 2^32-1 tensors": GOOD[:32] + pack("<I", 2**32 - 1) + GOOD[36:],
    "T26 no tensors": GOOD[:32] + pack("<I", 0) + GOOD[36:],
    "T26 one tensor": GOOD[:32] + pack("<I", 1) + GOOD[36:],
    "a byte short": GOOD[:-1],
    "a byte more": GOOD + b"\0",
}


@pytest.mark.parametrize("payload", COUNTS.values(), ids=COUNTS)
def test_counts_and_sizes(payload: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="GRAPH_COMPUTE"):
        decode_graph(payload, newest(), same)


def test_the_graph_that_these_were_made_of_is_good() -> None:
    assert len(decode_graph(GOOD, newest(), same).graph.nodes) == 2
    assert decode_graph(pack("<IQII", 9, 7, 0, 0), newest(), same) == (9, Graph(()))


def test_chains_of_any_depth() -> None:
    """T31: 100,000 nodes, each the only source of the next."""
    count = 100_000
    block = bytearray(record(chain(NONE, NONE)[1], 64) * count)
    table = columns(block, 64)
    table["id"] = np.arange(1, count + 1)
    table["src"][:, 0] = np.arange(count)
    nodes = np.arange(2, count + 1, dtype="<u8").tobytes()
    payload = pack("<IQI", 0, 0, count - 1) + nodes + pack("<I", count) + bytes(block)
    graph = decode_graph(payload, newest(), same).graph
    assert len(graph.nodes) == count - 1
    assert graph.nodes[-1].src == (graph.nodes[-2],)
    backwards = pack("<IQI", 0, 0, count - 1) + nodes[::-1] + pack("<I", count) + bytes(block)
    with pytest.raises(RemoteProtocolError):
        decode_graph(backwards, newest(), same)


def test_operations_that_nobody_computes_keep_their_names() -> None:
    """So that all of them can be listed at once (:mod:`sdrpc.ggml.validate`)."""
    numbers = newest().op_numbers
    payload = Payload(chain(NONE, {"op": numbers["CUSTOM"]}, {"op": numbers["SSM_SCAN"]}), [2, 3])
    graph = decode_graph(payload.bytes, newest(), same).graph
    assert [node.op for node in graph.nodes] == ["CUSTOM", "SSM_SCAN"]


def test_only_a_cast_reads_itself() -> None:
    records = chain(NONE, {"op": newest().op_numbers["CPY"], "src": (1, 2, *[0] * 8)})
    (node,) = decode_graph(Payload(records, [2]).bytes, newest(), same).graph.nodes
    assert len(node.src) == 1
    for change in ({"op": newest().op_numbers["ADD"]}, {"src": (2, 1, *[0] * 8)}, {"src": (1, 1, 2, *[0] * 7)}):
        wrong = [records[0], records[1]._replace(**change)]
        with pytest.raises(RemoteProtocolError, match="is computed later, or is the node itself"):
            decode_graph(Payload(wrong, [2]).bytes, newest(), same)


def test_names_that_are_no_text() -> None:
    records = chain({"name": b"\xff\xfe"}, {"name": b"n" * 64})
    graph = decode_graph(Payload(records, [2]).bytes, newest(), same).graph
    assert graph.leaves[0].name == "\N{REPLACEMENT CHARACTER}" * 2
    assert graph.nodes[0].name == "n" * 64


def test_what_resolve_raises_comes_through() -> None:
    def resolve(handle: int, address: int) -> tuple[int, int]:
        raise RemoteProtocolError(f"no buffer {handle}")

    with pytest.raises(RemoteProtocolError, match="no buffer 1"):
        decode_graph(GOOD, newest(), resolve)


def test_what_a_dialect_can_not_say() -> None:
    oldest = DIALECTS[0]
    newer = sorted(set(newest().ops) - set(oldest.ops))
    kinds = sorted(set(newest().type_numbers) - set(oldest.type_numbers))
    leaf = tensor(TYPES[kinds[0]].block, type=TYPES[kinds[0]], buffer=1)
    graph = Graph(tuple(replace(tensor(4, src=(leaf,)), op=op) for op in newer))
    with pytest.raises(UnsupportedOperation, match=f"protocol {oldest.version} has no .*") as raised:
        encode_graph(graph, 0, oldest, 64, same)
    for word in (*newer, kinds[0]):
        assert word in str(raised.value)


def test_operands_have_a_limit() -> None:
    leaf = tensor(4, buffer=1)
    with pytest.raises(LocalProtocolError, match="11 operands"):
        encode_graph(Graph((tensor(4, op="ADD", src=(leaf,) * 11),)), 0, newest(), 64, same)
