"""Patches that number operations otherwise are told apart by graphs: those that a real sd-cli sent, and small ones."""

from __future__ import annotations

import lzma
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np
import pytest

from sdrpc.errors import GraphError, RemoteProtocolError
from sdrpc.ggml import params
from sdrpc.ggml.dialect import Dialect, dialects
from sdrpc.server import Limits
from sdrpc.server.session import Session
from sdrpc.server.version_memory import families
from sdrpc.wire import graphs, messages
from sdrpc.wire.records import columns
from tests.engine.recorded import DATA, PARTS
from tests.support.client import RawClient
from tests.support.null import NullDevice

RECORDED = dialects()["5.0.1"]
HUGE = 1 << 40
ROOM = 1 << 32
"""Behind the highest address of a recorded buffer: more than any of its tensors has."""


class Client:
    """One that speaks ``dialect`` to a session that takes it for one of ``versions``."""

    def __init__(self, dialect: Dialect, versions: Sequence[Dialect]) -> None:
        self.dialect, self.device = dialect, NullDevice(HUGE)
        self.session = Session([self.device], Limits(), str)
        self.session.versions = tuple(versions)

    @property
    def versions(self) -> list[str]:
        """What the session still takes it for."""
        return [dialect.version for dialect in self.session.versions]

    def buffer(self, size: int) -> tuple[int, int]:
        handle = self.session.answer(messages.AllocBuffer(0, size)).remote_ptr
        return handle, self.session.answer(messages.BufferGetBase(handle)).base_ptr

    def compute(self, payload: bytes) -> None:
        self.session.answer(messages.GraphCompute(payload))

    def nodes(self, *made: dict[str, Any]) -> bytes:
        """A graph of nodes that follow a leaf, tensor 1, of 8 × 8 numbers, which most of them read."""
        buffer = self.buffer(1 << 16)
        raw = RawClient.__new__(RawClient)
        raw.dialect, raw.name_length = self.dialect, 64
        leaf = raw.record(buffer, (8, 8), id=1)
        records = [
            raw.record(buffer, **{"ne": (8, 8), "src": (1,), "at": 4096 * number, "id": number + 1, **fields})
            for number, fields in enumerate(made, 1)
        ]
        return raw.graph([record.id for record in records], [leaf, *records])


RELU = {"op": "UNARY", "params": params.Unary("RELU")}


def payload_of(part: str) -> bytes:
    return lzma.decompress((DATA / f"sd15-128px-{part}.graph.xz").read_bytes())


def retold(payload: bytes, client: Client) -> bytes:
    """A recorded graph as ``client`` would send it: operations by its numbers, tensors in buffers that it has."""
    parts = graphs.split(payload, RECORDED)
    table = columns(parts.tensors, parts.name_length).copy()
    numbers = np.array([client.dialect.op_numbers.get(op, -1) for op in RECORDED.ops])
    table["op"] = numbers[table["op"]]
    for handle in set(table["buffer"].tolist()) - {0}:
        inside = table["buffer"] == handle
        low, high = (int(bound) for bound in (table["data"][inside].min(), table["data"][inside].max()))
        low -= low % 4096
        own, base = client.buffer(high - low + ROOM)
        table["data"][inside] += np.uint64((base - low) % 2**64)
        table["buffer"][inside] = own
    start = len(payload) - len(parts.tensors)
    return payload[:start] + bytes(table.data)


def operations(payload: bytes) -> list[str]:
    """Of the nodes of a recorded graph, in their order."""
    parts = graphs.split(payload, RECORDED)
    table = columns(parts.tensors, parts.name_length)
    by_id = dict(zip(table["id"].tolist(), table["op"].tolist(), strict=True))
    return [RECORDED.ops[by_id[node]] for node in parts.node_ids.tolist()]


def alike(dialect: Dialect, other: Dialect, ops: set[str]) -> bool:
    """Whether these operations have the same numbers in both."""
    return all(dialect.op_numbers[op] == other.op_numbers.get(op) for op in ops)


FAMILIES = {name: family for name, family in families().items() if len(family) > 1}
TOLD_APART = [(name, dialect.version) for name, family in FAMILIES.items() for dialect in family]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("family", "version"), TOLD_APART)
def test_what_a_real_client_sent_as_each_patch_would_number_it(part: str, family: str, version: str) -> None:
    """Though its own is taken to be the least likely: the graph is read as it was meant, and only patches remain that
    number its operations alike."""
    dialect, recorded = dialects()[version], payload_of(part)
    versions = [*(other for other in FAMILIES[family] if other is not dialect), dialect]
    client = Client(dialect, versions)
    client.compute(retold(recorded, client))
    (graph,) = client.device.graphs
    meant = operations(recorded)
    assert [node.op for node in graph.nodes] == meant
    assert client.versions == [other.version for other in versions if alike(dialect, other, set(meant))]


def test_graphs_that_mean_the_same_leave_it_open_and_later_ones_decide() -> None:
    family = families()["4.0"]
    client = Client(dialects()["4.0.1"], family)
    client.compute(client.nodes({"op": "ADD", "src": (1, 1)}))
    assert client.versions == ["4.0.3", "4.0.2", "4.0.1", "4.0.0"]
    client.compute(client.nodes(RELU))
    assert client.versions == ["4.0.1"]
    assert [node.op for graph in client.device.graphs for node in graph.nodes] == ["ADD", "UNARY"]


def test_the_likeliest_stays_first_as_long_as_nothing_speaks_against_it() -> None:
    for order in permutations(families()["4.0"]):
        client = Client(dialects()["4.0.2"], order)
        client.compute(client.nodes({"op": "ADD", "src": (1, 1)}))
        assert client.versions == [dialect.version for dialect in order]


QUANTIZE = {"type": "I8", "ne": (8, 12), "words": (4,)}


@pytest.mark.parametrize("family", ["5.0", "7.0", "8.0"])
@pytest.mark.parametrize("number", [101, 102, 104])
def test_a_forks_operation_is_told_by_what_it_gives_whatever_its_number(number: int, family: str) -> None:
    """stable-diffusion.cpp's QUANTIZE_I8_CONVROT was 101, then 102, then another."""
    client = Client(families()[family][0], families()[family])
    client.compute(client.nodes(RELU, {"op": number, **QUANTIZE}))
    (graph,) = client.device.graphs
    assert graph.nodes[1].op == "QUANTIZE_I8_CONVROT"
    assert graph.nodes[1].params == params.Rotation(4)


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "another type": ({"type": "F32", "ne": (8, 8)}, r"QUANTIZE_I8_CONVROT \(declared as F32, but the result is I8\)"),
    "another shape": ({"ne": (8, 11)}, r"QUANTIZE_I8_CONVROT \(declared shape \[8, 11, 1, 1\]"),
    "another rotation": ({"words": (1024,)}, r"QUANTIZE_I8_CONVROT \(rotation of 1024 numbers\)"),
    "two sources": ({"src": (1, 1)}, r"QUANTIZE_I8_CONVROT \(wrong number of sources: 2\)"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_can_not_be_told_is_refused_with_the_candidates_named(name: str) -> None:
    fields, reason = OTHERS[name]
    client = Client(RECORDED, families()["5.0"])
    candidates = rf"'t': operation 101: .*: {reason}.*; REGULAR_HADAMARD \(what it computes is not known here\)"
    with pytest.raises(RemoteProtocolError, match=candidates):
        client.compute(client.nodes(RELU, {"op": 101, **QUANTIZE, **fields}))


def test_numbers_that_nobody_has_had_are_none() -> None:
    client = Client(RECORDED, families()["5.0"])
    with pytest.raises(RemoteProtocolError, match=r"operations \[117\] do not exist in protocol 5\.\d\.\d"):
        client.compute(client.nodes(RELU, {"op": 117, **QUANTIZE}))
    client = Client(dialects()["4.0.3"], families()["4.0"])
    with pytest.raises(RemoteProtocolError, match=r"operations \[101\] do not exist in protocol 4\.0\.\d"):
        client.compute(client.nodes({"op": "ADD", "src": (1, 1)}, {"op": 101, **QUANTIZE}))


def test_a_graph_that_makes_sense_in_no_patch_is_blamed_in_the_likeliest() -> None:
    for version in ("3.6.0", "3.6.1"):
        first = dialects()[version]
        client = Client(first, [first, *(d for d in families()["3.6"] if d is not first)])
        with pytest.raises(GraphError, match=r"node 0 \(UNARY"):
            client.compute(client.nodes({**RELU, "ne": (9, 9)}))
        assert client.versions == [version]
        with pytest.raises(RemoteProtocolError, match=f"protocol {version}"):
            client.compute(client.nodes({"op": 200}))


def test_what_was_read_otherwise_is_not_run_again() -> None:
    """A graph that made sense in a wrong patch as well is read anew when a later one has told the right patch."""
    wrong, right = dialects()["4.0.3"], dialects()["4.0.2"]
    client = Client(right, families()["4.0"])
    number = right.op_numbers["UNARY"]
    other = wrong.ops[number]
    assert other != "UNARY"
    raw = client.nodes(RELU)
    ambiguous = client.nodes({"op": "ADD", "src": (1, 1)})
    client.compute(ambiguous)
    client.compute(raw)
    client.compute(ambiguous)
    assert client.versions == ["4.0.2"]
    assert len(client.device.graphs) == 2, "what means the same in the right patch stays"
    client.session.versions = (wrong, right)
    client.session._graphs._narrow([wrong])
    client.compute(ambiguous)
    assert len(client.device.graphs) == 2
    with pytest.raises(GraphError):
        client.compute(raw)
