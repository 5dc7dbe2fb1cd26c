"""Parts of a buffer, many of them in one message: where data belongs, and which bytes shall be there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from struct import Struct
from typing import Any, NamedTuple

from ..device import Bytes
from ..errors import RemoteProtocolError

MOST_RANGES = 256
"""Of one SET_RANGES, or SET_RANGES_DIGEST."""
_RANGE, _NAMED = Struct("<QQ"), Struct("<QQ32s")
MOST_BYTES, MOST_NAMED_BYTES = MOST_RANGES * _RANGE.size, MOST_RANGES * _NAMED.size


class Range(NamedTuple):
    """``size`` bytes of a buffer from ``offset`` on."""

    offset: int
    size: int


class Named(NamedTuple):
    """The same, and the digest (:func:`sdrpc.content.digest`) of the bytes that shall be there."""

    offset: int
    size: int
    digest: bytes


def pack(ranges: Sequence[Range]) -> bytes:
    return b"".join(_RANGE.pack(*each) for each in ranges)


def unpack(data: Bytes) -> list[Range]:
    """Raises :class:`RemoteProtocolError` for what :func:`pack` would not make."""
    return [Range(*each) for each in _unpacked(_RANGE, data, "SET_RANGES")]


def pack_named(ranges: Sequence[Named]) -> bytes:
    return b"".join(_NAMED.pack(*each) for each in ranges)


def unpack_named(data: Bytes) -> list[Named]:
    """Raises :class:`RemoteProtocolError` for what :func:`pack_named` would not make."""
    return [Named(*each) for each in _unpacked(_NAMED, data, "SET_RANGES_DIGEST")]


def _unpacked(shape: Struct, data: Bytes, command: str) -> Iterator[tuple[Any, ...]]:
    if not data or len(data) % shape.size:
        raise RemoteProtocolError(f"{command}: ranges of {len(data)} bytes")
    return shape.iter_unpack(data)
