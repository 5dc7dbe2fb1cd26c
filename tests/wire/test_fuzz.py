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
from sdrpc.wire.framing import RequestReader, read_reply
from sdrpc.wire.graphs import decode_graph
from sdrpc.wire.limits import Limits
from sdrpc.wire.messages import Command, response_class
from tests.support.stream import EndOfStream, Stream
from tests.wire.examples import DIALECTS, EXAMPLES, commands, frame
from tests.wire.test_graphs import GOOD, recording, same

LIMITS = Limits(graph_bytes=1 << 16)
SOME = st.sampled_from(DIALECTS)


def read_all(data: bytes, dialect: Dialect) -> None:
    """Read requests until the bytes end or mean nothing."""
    stream, reader = Stream(data), RequestReader(dialect, LIMITS)
    try:
        while True:
            received = stream.drive(reader.read())
            stream.receive(received.bulk)
            if received.command is Command.GRAPH_COMPUTE:
                decode_graph(received.message.payload, dialect, same)
    except (RemoteProtocolError, EndOfStream):
        assert all(size <= LIMITS.graph_bytes for size in stream.wanted[:-1])


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


@settings(max_examples=300)
@given(st.data())
def test_graphs_with_wrong_words(data: st.DataObject) -> None:
    payload = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(payload) - 4))
        payload[at : at + 4] = pack("<I", data.draw(st.sampled_from([0, 1, 2, 3, 2**31, 2**32 - 1])))
    try:
        graph = decode_graph(bytes(payload), dialects()["7.0.0"], same).graph
    except RemoteProtocolError:
        return
    assert set(graph.leaves).isdisjoint(graph.nodes)


@pytest.mark.parametrize("seed", range(60))
def test_real_graphs_with_wrong_words(seed: int) -> None:
    """The CLIP graph of a real client, one to four of its words replaced."""
    chance, payload = random.Random(seed), bytearray(recording("clip"))
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(0, len(payload) - 4, 4)
        payload[at : at + 4] = pack("<I", chance.choice([0, 1, 5, 2**31, 2**32 - 1, chance.getrandbits(32)]))
    with suppress(RemoteProtocolError):
        decode_graph(bytes(payload), dialects()["5.0.1"], same)
