"""``rpc_tensor``: one tensor as it crosses the wire, for any length N of its name.

    id u64 | type u32 | buffer u64 | ne u32[4] | nb u32[4] | op u32 | op_params i32[16] | flags i32 | src u64[10]
    | view_src u64 | view_offs u64 | data u64 | name char[N] | use_count i32

The last word is padding before protocol 5.1 (``Dialect.has_use_count``); the size is 232 + N bytes either way.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..device import Bytes
from ..errors import RemoteProtocolError
from ..ggml.tensor import MAX_DIMS, MAX_SRC, Dims
from .limits import MAX_NAME_LENGTH

FIXED_BYTES = 232
"""Bytes of a record beside its name."""

NAME_STEP = 8
"""Records are a multiple of 8 bytes long (ggml asserts it), and so are the names."""

Columns = NDArray[np.void]
"""Records as a structured array of :func:`record_dtype`."""


class Record(NamedTuple):
    """One ``rpc_tensor`` as it came: numbers not yet checked against any table. ``op_params`` are its 64 bytes."""

    id: int = 0
    type: int = 0
    buffer: int = 0
    ne: Dims = (0, 0, 0, 0)
    nb: Dims = (0, 0, 0, 0)
    op: int = 0
    op_params: bytes = bytes(64)
    flags: int = 0
    src: tuple[int, ...] = (0,) * MAX_SRC
    view_src: int = 0
    view_offs: int = 0
    data: int = 0
    name: bytes = b""
    use_count: int = 0


@cache
def record_dtype(name_length: int) -> np.dtype[np.void]:
    """The packed layout of a record with names of ``name_length`` bytes (a multiple of 8)."""
    if not is_name_length(name_length):
        raise ValueError(f"a name of {name_length} bytes is in no rpc_tensor")
    return np.dtype(
        [
            ("id", "<u8"), ("type", "<u4"), ("buffer", "<u8"), ("ne", "<u4", MAX_DIMS), ("nb", "<u4", MAX_DIMS),
            ("op", "<u4"), ("op_params", "V64"), ("flags", "<i4"), ("src", "<u8", MAX_SRC), ("view_src", "<u8"),
            ("view_offs", "<u8"), ("data", "<u8"), ("name", f"S{name_length}"), ("use_count", "<i4"),
        ]
    )  # fmt: skip


def is_name_length(length: int) -> bool:
    return 0 < length <= MAX_NAME_LENGTH and length % NAME_STEP == 0


def record_bytes(name_length: int) -> int:
    return FIXED_BYTES + name_length


def columns(block: Bytes, name_length: int) -> Columns:
    """``block``, any number of whole records, as a structured array that shares its memory."""
    if len(block) % record_bytes(name_length):
        raise RemoteProtocolError(
            f"{len(block)} bytes are no whole number of rpc_tensors with {name_length}-byte names"
        )
    return np.frombuffer(block, record_dtype(name_length))


def decode_records(block: Bytes, name_length: int) -> list[Record]:
    """``block`` as values. A name ends at its first zero byte, or at its length when it has none."""
    return [_record(row) for row in columns(block, name_length).tolist()]


def _record(row: tuple[Any, ...]) -> Record:
    record = Record(*row)
    return record._replace(
        ne=tuple(row[3].tolist()),
        nb=tuple(row[4].tolist()),
        src=tuple(row[8].tolist()),
        name=record.name.split(b"\0", 1)[0],
    )


def encode_records(records: list[Record], name_length: int) -> bytes:
    """``records`` as bytes. Names are cut so that a zero byte ends them; every byte that no field sets is zero."""
    block = np.zeros(len(records), record_dtype(name_length))
    for field in Record._fields:
        values = [getattr(record, field) for record in records]
        if field == "name":
            values = [clip_name(name, name_length) for name in values]
        if field == "op_params":
            block[field] = np.frombuffer(b"".join(values), "V64")
        elif records:
            block[field] = values
    return block.tobytes()


def clip_name(name: bytes, name_length: int) -> bytes:
    """``name`` with room for the zero that ends it, cut between characters where it is UTF-8."""
    if len(name) < name_length:
        return name
    return name[: name_length - 1].decode("utf-8", "ignore").encode()
