"""Finding out the length of names: from sizes, from content, and what a change of mind means."""

from __future__ import annotations

from struct import pack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdrpc.errors import RemoteProtocolError
from sdrpc.ggml.dialect import Dialect, dialects, newest
from sdrpc.wire.framing import RequestReader
from sdrpc.wire.messages import OURS, Command, SetTensor, SetTensor2d, layout
from sdrpc.wire.name_length import ALL, COMMON, UNKNOWN, NameLength, learn, learn_feed
from sdrpc.wire.records import Record
from tests.support.stream import Stream
from tests.wire.examples import DIALECTS, TENSOR, commands, frame, record

every_dialect = pytest.mark.parametrize("dialect", DIALECTS, ids=lambda dialect: dialect.version)
BY_SIZE = (
    Command.INIT_TENSOR, Command.GET_TENSOR, Command.COPY_TENSOR, Command.GET_ALLOC_SIZE, Command.MEMSET_TENSOR,
    Command.SET_TENSOR_HASH, Command.GET_TENSOR_2D, Command.COMM_ALLREDUCE,
)  # fmt: skip


def set_tensor(tensor: Record, data: bytes, dialect: Dialect, length: int, offset: int = 0) -> bytes:
    """The payload of a SET_TENSOR."""
    flag = b"\0" if dialect.set_tensor_has_cache_flag else b""
    return record(tensor, length) + flag + pack("<Q", offset) + data


def learnt(payload: bytes, dialect: Dialect) -> NameLength:
    return learn_feed(UNKNOWN, SetTensor, payload[:1024], len(payload), dialect)


@every_dialect
def test_one_size_one_length(dialect: Dialect) -> None:
    for length in ALL:
        for command in BY_SIZE:
            if command not in commands(dialect):
                continue
            size = len(frame(command, dialect, length)) - 9
            assert learn(UNKNOWN, command, size, dialect) == NameLength(length, certain=True)
            for wrong in (size - 1, size + 1):
                with pytest.raises(RemoteProtocolError, match="no length of names"):
                    learn(UNKNOWN, command, wrong, dialect)


@every_dialect
@pytest.mark.parametrize("length", [*COMMON, 32, 256])
@pytest.mark.parametrize("data", [bytes(32), b"\xff" * 32, bytes(range(32))], ids=["zeros", "ones", "numbers"])
@pytest.mark.parametrize("name", [b"", b"w", b"x" * 31, "größe".encode()])
def test_a_whole_tensor_is_certain(dialect: Dialect, length: int, data: bytes, name: bytes) -> None:
    tensor = TENSOR._replace(name=name)
    assert learnt(set_tensor(tensor, data, dialect, length), dialect) == NameLength(length, certain=True)


BIG = TENSOR._replace(ne=(1024, 1024, 1, 1), nb=(4, 4096, 1 << 22, 1 << 22))


@every_dialect
@pytest.mark.parametrize("length", COMMON)
@pytest.mark.parametrize("offset", [0, 4096, 1 << 21])
def test_part_of_a_tensor(dialect: Dialect, length: int, offset: int) -> None:
    """A short name's zeros may be a shorter one's data: right, but not certain."""
    data = b"\x3f\x80\x01\x02" * 256
    found = learnt(set_tensor(BIG, data, dialect, length, offset), dialect)
    assert found == NameLength(length, certain=length == min(COMMON))


@pytest.mark.parametrize("length", [*COMMON, 32, 256])
@pytest.mark.parametrize("data", [bytes(4096), b"\x3f\x80\x01\x02" * 1024], ids=["zeros", "numbers"])
@pytest.mark.parametrize("rows", [(4096, 1, 0), (2048, 2, 8192), (1, 4096, 1024)])
def test_rows_are_certain(length: int, data: bytes, rows: tuple[int, int, int]) -> None:
    """SET_TENSOR_2D says how many bytes there are: with another length that would have to be so by chance."""
    payload = record(BIG, length) + pack("<QQQQ", 64, *rows) + data
    found = learn_feed(UNKNOWN, SetTensor2d, payload[:1024], len(payload), newest())
    assert found == NameLength(length, certain=True)


def test_zeros_in_a_part_of_a_tensor_leave_a_guess_that_is_corrected() -> None:
    dialect = newest()
    payload = set_tensor(BIG, bytes(4096), dialect, 64)
    reader = RequestReader(dialect)
    reader.names = guess = learnt(payload, dialect)
    assert guess == NameLength(160, certain=False)
    Stream(frame(Command.GET_TENSOR, dialect, 64)).drive(reader.read())
    assert reader.names == NameLength(64, certain=True)


def test_a_long_name_is_not_data() -> None:
    """The other way round: parts of tensors full of zeros whose names are long are read right at once."""
    tensor = BIG._replace(name=b"n" * 159)
    assert learnt(set_tensor(tensor, bytes(4096), newest(), 160), newest()) == NameLength(160, certain=True)


def test_a_stride_over_4_gib_is_cut() -> None:
    """A dense tensor of 4 GiB whose upper strides have lost all their bits."""
    tensor = TENSOR._replace(ne=(1 << 20, 1 << 10, 1, 1), nb=(4, 1 << 22, 0, 0), name=b"huge")
    payload = set_tensor(tensor, b"\xff" * 1024, newest(), 128)
    size = len(payload) - 1024 + (1 << 32)
    assert learn_feed(UNKNOWN, SetTensor, payload, size, newest()) == NameLength(128, certain=True)


@every_dialect
@pytest.mark.parametrize(
    "change",
    [
        {"name": b"\x01\x02"},
        {"type": 4},  # a retired type
        {"type": 2**32 - 1},
        {"ne": (0, 1, 1, 1)},
        {"type": 2, "ne": (31, 1, 1, 1)},  # Q4_0: part of a block
        {"ne": (1, 1, 1, 1), "nb": (4, 4, 4, 4)},  # smaller than the data
    ],
)
def test_nonsense_has_no_length(dialect: Dialect, change: dict[str, object]) -> None:
    payload = set_tensor(TENSOR._replace(**change), b"\xff" * 32, dialect, 64)  # type: ignore[arg-type]
    with pytest.raises(RemoteProtocolError, match="no length of names"):
        learnt(payload, dialect)


@pytest.mark.parametrize("command", [*BY_SIZE, Command.GRAPH_COMPUTE])
def test_mixed_lengths_break_the_protocol(command: Command) -> None:
    reader = RequestReader(newest(), ours=OURS)
    Stream(frame(Command.INIT_TENSOR, newest(), 128)).drive(reader.read())
    with pytest.raises(RemoteProtocolError, match="names of 64 bytes after names of 128"):
        Stream(frame(command, newest(), 64)).drive(reader.read())


def test_commands_without_records_teach_nothing() -> None:
    assert learn(UNKNOWN, Command.ALLOC_BUFFER, 12, newest()) == UNKNOWN
    assert learn(NameLength(64), Command.GRAPH_COMPUTE, 12, newest()) == NameLength(64)


def test_padding_is_zero_where_there_is_no_use_count() -> None:
    payload = bytearray(set_tensor(TENSOR, bytes(32), dialects()["5.0.1"], 64))
    payload[232 + 64 - 1] = 1
    with pytest.raises(RemoteProtocolError, match="no length of names"):
        learnt(bytes(payload), dialects()["5.0.1"])
    with_count = set_tensor(TENSOR._replace(use_count=2**24), bytes(32), newest(), 64)
    assert learnt(with_count, newest()).value == 64


@given(st.binary(max_size=1024), st.sampled_from(DIALECTS), st.integers(0, 2**44))
def test_any_bytes_have_a_length_or_none(data: bytes, dialect: Dialect, more: int) -> None:
    try:
        found = learn_feed(UNKNOWN, SetTensor, data, len(data) + more, dialect)
    except RemoteProtocolError:
        return
    assert found.value in ALL
    assert len(data) + more >= layout(SetTensor, dialect.switches).size(found.value)
