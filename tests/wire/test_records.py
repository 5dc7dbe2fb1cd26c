"""rpc_tensor: sizes, bytes, names."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdrpc.errors import LocalProtocolError, RemoteProtocolError
from sdrpc.wire.records import (
    Record,
    clip_name,
    columns,
    decode_records,
    encode_records,
    is_name_length,
    record_bytes,
    record_dtype,
)
from tests.wire.examples import NAME_LENGTHS, TENSOR, record

U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
RECORDS = st.builds(
    Record,
    id=U64,
    type=U32,
    buffer=U64,
    ne=st.tuples(U32, U32, U32, U32),
    nb=st.tuples(U32, U32, U32, U32),
    op=U32,
    op_params=st.binary(min_size=64, max_size=64),
    flags=st.integers(-(2**31), 2**31 - 1),
    src=st.tuples(*[U64] * 10),
    view_src=U64,
    view_offs=U64,
    data=U64,
    name=st.binary(max_size=63).map(lambda name: name.replace(b"\0", b"_")),
    use_count=st.integers(-(2**31), 2**31 - 1),
)


@pytest.mark.parametrize("name_length", [*NAME_LENGTHS, 8, 512])
def test_sizes_are_those_of_the_protocol(name_length: int) -> None:
    assert record_dtype(name_length).itemsize == record_bytes(name_length) == 232 + name_length
    assert len(record(TENSOR, name_length)) == 232 + name_length


def test_offsets_are_those_of_the_packed_struct() -> None:
    fields = record_dtype(64).fields
    assert fields is not None
    offsets = {name: field[1] for name, field in fields.items()}
    assert offsets == {
        "id": 0, "type": 8, "buffer": 12, "ne": 20, "nb": 36, "op": 52, "op_params": 56, "flags": 120, "src": 124,
        "view_src": 204, "view_offs": 212, "data": 220, "name": 228, "use_count": 292,
    }  # fmt: skip


@pytest.mark.parametrize("length", [0, -8, 7, 63, 520])
def test_odd_name_lengths(length: int) -> None:
    assert not is_name_length(length)
    with pytest.raises(ValueError, match="in no rpc_tensor"):
        record_dtype(length)


@given(st.lists(RECORDS, max_size=5), st.sampled_from([64, 128, 160, 72]))
def test_round_trip_against_bytes_written_by_hand(records: list[Record], name_length: int) -> None:
    block = encode_records(records, name_length)
    assert block == b"".join(record(one, name_length) for one in records)
    assert decode_records(block, name_length) == records


def test_no_byte_is_left_to_chance() -> None:
    empty = Record()
    assert encode_records([empty] * 3, 160) == bytes(3 * 392)


def test_boundaries() -> None:
    top = Record(
        2**64 - 1, 2**32 - 1, 2**64 - 1, (2**32 - 1,) * 4, (2**32 - 1,) * 4, 2**32 - 1, b"\xff" * 64, -1,
        (2**64 - 1,) * 10, 2**64 - 1, 2**64 - 1, 2**64 - 1, b"n" * 63, -1,
    )  # fmt: skip
    assert decode_records(encode_records([top], 64), 64) == [top]


@pytest.mark.parametrize(
    "change", [{"ne": (2**32, 1, 1, 1)}, {"nb": (-1, 1, 1, 1)}, {"id": 2**64}, {"flags": 2**31}, {"src": (0,) * 11}]
)
def test_numbers_that_do_not_fit_are_ours_to_refuse(change: dict[str, Any]) -> None:
    with pytest.raises(LocalProtocolError, match="fits no rpc_tensor"):
        encode_records([TENSOR._replace(**change)], 64)


def test_names_end_at_the_first_zero_or_at_their_length() -> None:
    block = bytearray(record(TENSOR, 64))
    block[228 : 228 + 64] = b"ab\0garbage".ljust(64, b"x")
    assert decode_records(block, 64)[0].name == b"ab"
    block[228 : 228 + 64] = b"\xff" * 64
    assert decode_records(block, 64)[0].name == b"\xff" * 64


@pytest.mark.parametrize(
    ("name", "clipped"),
    [
        (b"x" * 63, b"x" * 63),
        (b"x" * 64, b"x" * 63),
        (("x" * 62 + "ää").encode(), b"x" * 62),
        (("x" * 61 + "ää").encode(), ("x" * 61 + "ä").encode()),
    ],
)
def test_long_names_are_cut_between_characters(name: bytes, clipped: bytes) -> None:
    assert clip_name(name, 64) == clipped
    assert decode_records(encode_records([Record(name=name)], 64), 64)[0].name == clipped


def test_columns_share_the_memory() -> None:
    block = bytearray(record(TENSOR, 64) * 2)
    table = columns(block, 64)
    block[0] ^= 0xFF
    assert int(table["id"][0]) == TENSOR.id ^ 0xFF
    assert np.shares_memory(table, np.frombuffer(block, np.uint8))


@pytest.mark.parametrize("size", [1, 295, 297])
def test_part_of_a_record(size: int) -> None:
    with pytest.raises(RemoteProtocolError, match="no whole number of rpc_tensors"):
        decode_records(bytes(size), 64)
