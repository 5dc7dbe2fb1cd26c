"""``rpc_tensor``: one tensor as it crosses the wire, for any length N of its name.

    id u64 | type u32 | buffer u64 | ne u32[4] | nb u32[4] | op u32 | op_params i32[16] | flags i32 | src u64[10]
    | view_src u64 | view_offs u64 | data u64 | name char[N] | use_count i32

The last word is padding before protocol 5.1 (``Dialect.has_use_count``); the size is 232 + N bytes either way.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from struct import Struct
from struct import error as struct_error
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..device import Bytes
from ..errors import LocalProtocolError, RemoteProtocolError
from ..ggml.tensor import MAX_DIMS, MAX_SRC, Dims
from .limits import MAX_NAME_LENGTH

FIXED_BYTES = 232
"""Bytes of a record beside its name."""

NAME_STEP = 8
"""Records are a multiple of 8 bytes long (ggml asserts it), and so are the names."""

Columns = NDArray[np.void]
"""Records as a structured array of :func:`record_dtype`."""


_PART = "{size} bytes are no whole number of rpc_tensors with names of {name_length}"


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


class _Field(NamedTuple):
    """``code`` is that of the struct module; a field of ``length`` numbers is a tuple, one of bytes ("s") is not."""

    name: str
    code: str
    length: int = 1


def _fields(name_length: int) -> tuple[_Field, ...]:
    return (
        _Field("id", "Q"), _Field("type", "I"), _Field("buffer", "Q"), _Field("ne", "I", MAX_DIMS),
        _Field("nb", "I", MAX_DIMS), _Field("op", "I"), _Field("op_params", "s", 64), _Field("flags", "i"),
        _Field("src", "Q", MAX_SRC), _Field("view_src", "Q"), _Field("view_offs", "Q"), _Field("data", "Q"),
        _Field("name", "s", name_length), _Field("use_count", "i"),
    )  # fmt: skip


_NUMPY = {"Q": "<u8", "I": "<u4", "i": "<i4"}


@cache
def record_dtype(name_length: int) -> np.dtype[np.void]:
    """The packed layout of a record with names of ``name_length`` bytes (a multiple of 8)."""
    if not is_name_length(name_length):
        raise ValueError(f"a name of {name_length} bytes is in no rpc_tensor")
    fields: list[tuple[Any, ...]] = []
    for name, code, length in _fields(name_length):
        # op_params as V: S would lose the zeros at the end.
        kind = f"{'S' if name == 'name' else 'V'}{length}" if code == "s" else _NUMPY[code]
        fields.append((name, kind) if code == "s" or length == 1 else (name, kind, length))
    return np.dtype(fields)


@cache
def _struct(name_length: int) -> Struct:
    return Struct("<" + "".join(f"{length}{code}" for _, code, length in _fields(name_length)))


def is_name_length(length: int) -> bool:
    return 0 < length <= MAX_NAME_LENGTH and length % NAME_STEP == 0


def record_bytes(name_length: int) -> int:
    return FIXED_BYTES + name_length


def columns(block: Bytes, name_length: int) -> Columns:
    """``block``, any number of whole records, as a structured array that shares its memory."""
    if len(block) % record_bytes(name_length):
        raise RemoteProtocolError(_PART.format(size=len(block), name_length=name_length))
    return np.frombuffer(block, record_dtype(name_length))


def decode_records(block: Bytes, name_length: int) -> list[Record]:
    """``block`` as values. A name ends at its first zero byte, or at its length when it has none."""
    if len(block) % record_bytes(name_length):
        raise RemoteProtocolError(_PART.format(size=len(block), name_length=name_length))
    return [_record(words) for words in _struct(name_length).iter_unpack(block)]


def _record(words: tuple[Any, ...]) -> Record:
    name = words[27].split(b"\0", 1)[0]
    ne, nb, src = words[3:7], words[7:11], words[14:24]
    return Record._make((*words[:3], ne, nb, *words[11:14], src, *words[24:27], name, words[28]))


def encode_records(records: Iterable[Record], name_length: int) -> bytes:
    """``records`` as bytes. Names are cut so that a zero byte ends them; every byte that no field sets is zero.

    Raises :class:`LocalProtocolError` for a number that does not fit its field.
    """
    pack = _struct(name_length).pack
    try:
        return b"".join(pack(*_words(record, name_length)) for record in records)
    except struct_error as reason:
        raise LocalProtocolError(f"a tensor that fits no rpc_tensor: {reason}") from reason


def _words(r: Record, name_length: int) -> tuple[Any, ...]:
    name = clip_name(r.name, name_length)
    numbers = (r.id, r.type, r.buffer, *r.ne, *r.nb, r.op, r.op_params, r.flags, *r.src, r.view_src, r.view_offs)
    return (*numbers, r.data, name, r.use_count)


def clip_name(name: bytes, name_length: int) -> bytes:
    """``name`` with room for the zero that ends it, cut between characters where it is UTF-8."""
    if len(name) < name_length:
        return name
    return name[: name_length - 1].decode("utf-8", "ignore").encode()
