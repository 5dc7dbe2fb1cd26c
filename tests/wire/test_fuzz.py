"""The wire's invariant: any bytes give messages or RemoteProtocolError, never anything else, and nothing is asked for
that is larger than a limit."""

from __future__ import annotations

import random
from contextlib import suppress
from struct import pack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdrpc.errors import RemoteProtocolError
from sdrpc.ggml.dialect import Dialect, dialects
from sdrpc.ggml.tensor import Graph, Tensor
from sdrpc.wire.framing import REQUEST_HEADER, RequestReader, read_reply
from sdrpc.wire.graphs import COMPUTE, WORD, decode_graph, encode_graph
from sdrpc.wire.limits import MAX_NAME_LENGTH, Limits
from sdrpc.wire.messages import Command, response_class
from sdrpc.wire.records import record_bytes
from tests.support.stream import EndOfStream, Stream
from tests.wire.examples import DIALECTS, EXAMPLES, commands, frame
from tests.wire.test_graphs import GOOD, recording, same

LIMITS = Limits(graph_bytes=1 << 12)
MOST = max(LIMITS.graph_bytes, REQUEST_HEADER.size + 2 * record_bytes(MAX_NAME_LENGTH) * 11)
"""More than any reader may ask for at once: a graph, or the largest message of records, GET_ALLOC_SIZE with eleven."""
SOME = st.sampled_from(DIALECTS)


def read_all(data: bytes, dialect: Dialect) -> None:
    """Read requests until the bytes end or mean nothing. Whatever they say, no more is asked for than a limit allows:
    also by the request that ended it."""
    stream, reader = Stream(data), RequestReader(dialect, LIMITS)
    try:
        while True:
            received = stream.drive(reader.read())
            assert received.bulk <= LIMITS.tensor_bytes
            stream.skip(received.bulk)
            if received.command is Command.GRAPH_COMPUTE:
                decode_graph(received.message.payload, dialect, same)
    except (RemoteProtocolError, EndOfStream):
        pass
    assert max(stream.wanted) <= MOST


@given(st.binary(max_size=4096), SOME)
def test_any_bytes(data: bytes, dialect: Dialect) -> None:
    read_all(data, dialect)


@given(SOME, st.sampled_from(list(EXAMPLES)), st.integers(0, 2**64 - 1), st.binary(max_size=2048))
def test_any_payload(dialect: Dialect, command: Command, size: int, payload: bytes) -> None:
    read_all(pack("<BQ", command, size) + payload, dialect)
    read_all(pack("<BQ", command, len(payload)) + payload, dialect)


@settings(max_examples=300)
@given(SOME, st.data())
def test_conversations_with_wrong_bytes(dialect: Dialect, data: st.DataObject) -> None:
    order = data.draw(st.lists(st.sampled_from(commands(dialect)), min_size=1, max_size=4))
    length = data.draw(st.sampled_from([64, 160]))
    conversation = bytearray(b"".join(frame(command, dialect, length) for command in order))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(conversation) - 1))
        conversation[at] = data.draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))
    cut = data.draw(st.integers(0, len(conversation)))
    read_all(bytes(conversation), dialect)
    read_all(bytes(conversation[:cut]), dialect)


@given(SOME, st.sampled_from(list(EXAMPLES)), st.booleans(), st.binary(max_size=64), st.integers(0, 2**40))
def test_any_answer(dialect: Dialect, command: Command, errors: bool, data: bytes, bulk: int) -> None:
    if response_class(command, dialect) is None:
        return
    stream = Stream(data)
    try:
        stream.drive(read_reply(command, dialect, bulk if command is Command.GET_TENSOR else 0, errors))
    except (RemoteProtocolError, EndOfStream):
        assert all(size <= Limits().error_bytes for size in stream.wanted)


def is_sound(graph: Graph) -> None:
    """What whoever gets a decoded graph may rely on: rows are whole blocks, nodes come after what they read, once, and
    what is not computed here has no sources of its own."""
    done: set[Tensor] = set()
    for node in graph.nodes:
        assert node not in done
        for source in (*node.src, node.view_src):
            if source is not None and source not in done:
                assert source not in graph.nodes
                assert (source.op, source.src, source.view_src) == ("NONE", (), None)
        assert node.ne[0] % node.type.block == 0
        assert node.buffer or not node.offset
        done.add(node)


def facts(graph: Graph) -> list[object]:
    """All that a graph says, tensors as positions."""
    number: dict[Tensor | None, int] = {None: -1, **{tensor: i for i, tensor in enumerate(graph.tensors)}}
    return [
        (t.type, t.ne, [n % WORD for n in t.nb], t.op, repr(t.params), [number[s] for s in t.src], number[t.view_src],
         t.view_offset, t.buffer, t.offset, t.flags | COMPUTE, t.name)
        for t in graph.tensors
    ]  # fmt: skip


@settings(max_examples=300)
@given(st.data())
def test_graphs_with_wrong_words(data: st.DataObject) -> None:
    payload = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(payload) - 4))
        payload[at : at + 4] = pack("<I", data.draw(st.sampled_from([0, 1, 2, 3, 2**31, 2**32 - 1])))
    try:
        device, graph = decode_graph(bytes(payload), dialects()["7.0.0"], same)
    except RemoteProtocolError:
        return
    is_sound(graph)
    again = encode_graph(graph, device, dialects()["7.0.0"], 64, same)
    assert facts(decode_graph(again, dialects()["7.0.0"], same).graph) == facts(graph)


@pytest.mark.parametrize("seed", range(60))
def test_real_graphs_with_wrong_words(seed: int) -> None:
    """The CLIP graph of a real client, one to four of its words replaced."""
    chance, payload = random.Random(seed), bytearray(recording("clip"))
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(0, len(payload) - 4, 4)
        payload[at : at + 4] = pack("<I", chance.choice([0, 1, 5, 2**31, 2**32 - 1, chance.getrandbits(32)]))
    with suppress(RemoteProtocolError):
        is_sound(decode_graph(bytes(payload), dialects()["5.0.1"], same).graph)
