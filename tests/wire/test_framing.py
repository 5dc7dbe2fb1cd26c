"""Requests and answers of every command, in every dialect, with names of several lengths: against bytes written by
hand, whole, byte by byte and with other bytes behind them."""

from __future__ import annotations

from struct import pack
from typing import NamedTuple

import pytest

from sdrpc.errors import LocalProtocolError, RemoteProtocolError
from sdrpc.ggml.dialect import Dialect, dialects, newest
from sdrpc.wire import messages as m
from sdrpc.wire.framing import (
    BEAT,
    ERROR_MARK,
    FEEDS,
    ErrorReply,
    Received,
    RequestReader,
    encode_error,
    encode_reply,
    encode_request,
    read_error,
    read_reply,
)
from sdrpc.wire.limits import Limits
from sdrpc.wire.messages import COMMANDS, EXCHANGES, OURS, Command, message_layout, response_class
from sdrpc.wire.name_length import NameLength
from tests.support.stream import EndOfStream, Stream
from tests.wire.examples import DATA, DIALECTS, EXAMPLES, NAME_LENGTHS, TENSOR, commands, frame, message, payload

every_dialect = pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.version)
every_name_length = pytest.mark.parametrize("name_length", NAME_LENGTHS)
TRAILING = b"\x0fwhat comes next"


def read(stream: Stream, reader: RequestReader) -> tuple[Command, object]:
    """A request with its bulk data received behind it, as a server does."""
    received = stream.drive(reader.read())
    if received.bulk:
        data = bytes(received.message.data) + bytes(stream.receive(received.bulk))
        return received.command, received.message._replace(data=data)
    return received.command, received.message


def test_every_command_has_an_example_and_an_exchange() -> None:
    assert set(EXAMPLES) == set(EXCHANGES) == set(Command) - {Command.HELLO}
    assert {command: COMMANDS[type(example.message)] for command, example in EXAMPLES.items()} == {
        command: command for command in EXAMPLES
    }


@every_dialect
@every_name_length
def test_requests_are_the_bytes_written_by_hand(dialect: Dialect, name_length: int) -> None:
    for command in commands(dialect):
        encoded = b"".join(encode_request(message(command, dialect, name_length), dialect, name_length))
        assert encoded == frame(command, dialect, name_length), command.name


@every_dialect
@every_name_length
@pytest.mark.parametrize("piece", [1 << 30, 1])
@pytest.mark.parametrize("known", [False, True])
def test_requests_are_read(dialect: Dialect, name_length: int, piece: int, known: bool) -> None:
    for command in commands(dialect):
        names = NameLength(name_length, certain=True) if known else NameLength()
        reader = RequestReader(dialect, known=names, ours=OURS)
        stream = Stream(frame(command, dialect, name_length) + TRAILING, piece)
        assert read(stream, reader) == (command, message(command, dialect, name_length))
        assert stream.rest == TRAILING, command.name
        if command in (*FEEDS, Command.GRAPH_COMPUTE) or m.layout(EXCHANGES[command].request).records:
            assert reader.names == NameLength(name_length, certain=True), command.name


@every_dialect
def test_a_conversation_is_read_to_its_end(dialect: Dialect) -> None:
    stream = Stream(b"".join(frame(command, dialect, 160) for command in commands(dialect)))
    reader = RequestReader(dialect, ours=OURS)
    read_back = []
    while stream.rest:
        read_back.append(read(stream, reader)[0])
    assert read_back == commands(dialect)


@every_dialect
@pytest.mark.parametrize("piece", [1 << 30, 1])
def test_replies(dialect: Dialect, piece: int) -> None:
    for command in commands(dialect):
        example = EXAMPLES[command]
        parts = encode_reply(command, example.answer, dialect)
        if response_class(command, dialect) is None:
            assert parts == []
            with pytest.raises(ValueError, match="no answer"):
                next(read_reply(command, dialect))
            continue
        data = b"".join(parts)
        assert data == pack("<Q", len(example.reply)) + example.reply
        stream = Stream(data + TRAILING, piece)
        ends_with_bulk = message_layout(type(example.answer), dialect).bulk
        bulk = len(example.reply) if ends_with_bulk else 0
        reply = stream.drive(read_reply(command, dialect, bulk))
        expected = type(example.answer)(b"") if bulk else example.answer
        assert reply == expected
        assert stream.rest == (example.reply if bulk else b"") + TRAILING


@every_dialect
def test_commands_of_ours_are_unknown_to_others(dialect: Dialect) -> None:
    for command in OURS:
        stream = Stream(frame(command, dialect, 64))
        with pytest.raises(RemoteProtocolError, match=f"has no command {command.value}"):
            read(stream, RequestReader(dialect))


def test_which_commands_answer_is_the_dialects_to_say() -> None:
    empty = {Command.FREE_BUFFER, Command.BUFFER_CLEAR, Command.INIT_TENSOR, Command.MEMSET_TENSOR}
    silent = {
        *FEEDS, Command.GRAPH_COMPUTE, Command.GRAPH_RECOMPUTE, Command.COMM_ALLREDUCE, Command.COMM_FREE,
            Command.SET_RANGES,
    }  # fmt: skip
    for dialect in DIALECTS:
        without = {command for command in EXCHANGES if response_class(command, dialect) is None}
        assert without == (silent if dialect.acks_buffer_commands else silent | empty)


def test_tensor_data_is_passed_by_reference() -> None:
    data = memoryview(bytearray(DATA))
    request = encode_request(m.SetTensor(TENSOR, 0, 0, data), newest(), 64)
    assert request[-1] is data
    assert sum(map(len, request)) == len(frame(Command.SET_TENSOR, newest(), 64))
    assert encode_reply(Command.GET_TENSOR, m.GetTensorReply(data), newest())[-1] is data
    graph = b"\0" * 12
    assert encode_request(m.GraphCompute(graph), newest(), 64)[-1] is graph


@pytest.mark.parametrize(
    "message",
    [m.AllocBuffer(-1, 0), m.AllocBuffer(0, 2**64), m.BufferClear(1, 256), m.GetAllocSize(0, TENSOR, (TENSOR,))],
)
def test_what_does_not_fit_is_ours_to_refuse(message: NamedTuple) -> None:
    with pytest.raises(LocalProtocolError, match=type(message).__name__):
        encode_request(message, newest(), 64)


def test_sizes_count_bytes_of_any_memoryview() -> None:
    data = memoryview(bytearray(DATA)).cast("f")
    assert encode_reply(Command.GET_TENSOR, m.GetTensorReply(data), newest())[0] == pack("<Q", 32)


@every_dialect
def test_tensor_data_is_not_read(dialect: Dialect) -> None:
    size = len(payload(Command.SET_TENSOR, dialect, 64)) - len(DATA) + (1 << 40)
    tensor = TENSOR._replace(ne=(1 << 20, 1 << 18, 1, 1), nb=(4, 1 << 22, 1 << 30, 1 << 30))
    whole = b"".join(encode_request(m.SetTensor(tensor, 0, 0, b"\xff" * 4096), dialect, 64))
    stream = Stream(whole[:1] + pack("<Q", size) + whole[9:])
    received = stream.drive(RequestReader(dialect).read())
    assert received.bulk + len(received.message.data) == 1 << 40
    assert sum(stream.wanted) < 2048
    stream = Stream(whole[:1] + pack("<Q", size) + whole[9:])
    received = stream.drive(RequestReader(dialect, known=NameLength(64, certain=True)).read())
    assert (received.bulk, received.message.data) == (1 << 40, b"")


SIZES = (0, 1, 2**31, 2**61, 2**63, 2**64 - 1)


@every_dialect
@pytest.mark.parametrize("known", [NameLength(), NameLength(64, certain=True)])
def test_sizes_are_checked_before_anything_is_read(dialect: Dialect, known: NameLength) -> None:
    for command in commands(dialect):
        right = len(payload(command, dialect, 64))
        for size in {*SIZES, right - 1, right + 1} - {right}:
            if size < 0:
                continue
            stream = Stream(pack("<BQ", command, size))
            try:
                stream.drive(RequestReader(dialect, known=known).read())
            except RemoteProtocolError:
                assert stream.wanted == [9]
            except EndOfStream:  # within limits, for the two whose size is free: of tensor data nothing is asked for
                assert command in (*FEEDS, Command.GRAPH_COMPUTE), (command, size)
                assert stream.wanted[1] < 2048


def test_limits_are_the_callers() -> None:
    reader = RequestReader(newest(), Limits(graph_bytes=100))
    with pytest.raises(RemoteProtocolError, match="GRAPH_COMPUTE: 101 bytes instead of 0 to 100"):
        Stream(pack("<BQ", Command.GRAPH_COMPUTE, 101)).drive(reader.read())


@every_dialect
@pytest.mark.parametrize("number", [14, 17, 18, 19, 20, 21, 22, 23, 100, 255])
def test_unknown_commands(dialect: Dialect, number: int) -> None:
    if number in commands(dialect):
        return
    with pytest.raises(RemoteProtocolError, match="second HELLO" if number == 14 else f"no command {number}"):
        Stream(pack("<BQ", number, 24)).drive(RequestReader(dialect).read())


@pytest.mark.parametrize("size", [0, 7, 9, 2**20, 2**63, ERROR_MARK])
def test_answers_of_another_size(size: int) -> None:
    stream = Stream(pack("<Q", size) + bytes(100))
    with pytest.raises(RemoteProtocolError, match=f"an answer of {size} bytes instead of 8"):
        stream.drive(read_reply(Command.GET_ALIGNMENT, newest()))
    assert stream.wanted == [8]


@pytest.mark.parametrize("reason", ["", "no such buffer", "größer als 4 GiB"])
def test_error_replies(reason: str) -> None:
    stream = Stream(encode_error(reason) + TRAILING)
    assert stream.drive(read_reply(Command.GET_TENSOR, newest(), bulk=1 << 30, errors=True)) == ErrorReply(reason)
    assert stream.rest == TRAILING
    assert Stream(encode_error(reason)).drive(read_error()) == ErrorReply(reason)
    assert encode_error(reason) == b"\xff" * 8 + pack("<I", len(reason.encode())) + reason.encode()


@pytest.mark.parametrize("beats", [1, 3])
def test_beats_are_passed_over(beats: int) -> None:
    """Where a peer may send them: it may be at work for long before it answers, or refuses."""
    alignment = b"".join(encode_reply(Command.GET_ALIGNMENT, m.GetAlignmentReply(32), newest()))
    stream = Stream(BEAT * beats + alignment + TRAILING)
    assert stream.drive(read_reply(Command.GET_ALIGNMENT, newest(), errors=True)) == m.GetAlignmentReply(32)
    assert stream.rest == TRAILING
    assert Stream(BEAT * beats + encode_error("no")).drive(read_error()) == ErrorReply("no")
    with pytest.raises(RemoteProtocolError, match=f"an answer of {2**64 - 2} bytes"):
        Stream(BEAT + alignment).drive(read_reply(Command.GET_ALIGNMENT, newest()))


def test_error_replies_have_a_limit() -> None:
    assert len(encode_error("ä" * 100_000)) <= 12 + Limits().error_bytes
    stream = Stream(b"\xff" * 8 + pack("<I", 2**32 - 1))
    with pytest.raises(RemoteProtocolError, match="at most"):
        stream.drive(read_error())
    with pytest.raises(RemoteProtocolError, match="nobody asked for"):
        Stream(bytes(8)).drive(read_error())
    assert Stream(b"\xff" * 8 + pack("<I", 1) + b"\xff").drive(read_error()).reason == "\N{REPLACEMENT CHARACTER}"


def test_received_is_a_frozen_value() -> None:
    received = Received(Command.DEVICE_COUNT, m.DeviceCount())
    with pytest.raises(AttributeError):
        received.bulk = 1  # type: ignore[misc]


def test_dialects_differ_where_the_protocol_says_so() -> None:
    """One look at what the parametrised tests above rest on."""
    sizes = {version: len(payload(Command.SET_TENSOR, dialect, 64)) for version, dialect in dialects().items()}
    assert sizes.pop("7.0.0") == sizes.pop("8.0.0") == 232 + 64 + 1 + 8 + 32
    assert set(sizes.values()) == {232 + 64 + 8 + 32}
    sizes = {version: len(payload(Command.GRAPH_RECOMPUTE, dialect, 64)) for version, dialect in dialects().items()}
    assert sizes.pop("8.0.0") == 12
    assert set(sizes.values()) == {4}


def test_7_0_came_in_two_steps() -> None:
    """6.0 stands between: answers went and a GLU operation came, the cache flag was still to come."""
    before, six, after = (dialects()[version] for version in ("5.1.0", "6.0.0", "7.0.0"))
    assert before.ops == six.ops == after.ops
    assert len(six.ops) == 101
    assert (before.unary_ops, before.type_numbers, before.tensor_flags) == (
        six.unary_ops, six.type_numbers, six.tensor_flags
    )  # fmt: skip
    assert six.glu_ops == after.glu_ops == (*before.glu_ops, "SWIGLU_CLAMP")
    assert [d.acks_buffer_commands for d in (before, six, after)] == [True, False, False]
    assert [d.set_tensor_has_cache_flag for d in (before, six, after)] == [False, False, True]
    assert all(d.has_use_count and d.has_memset_tensor for d in (before, six, after))
