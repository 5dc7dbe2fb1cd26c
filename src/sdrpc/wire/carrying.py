"""A tensor's data over several connections: which parts of it go where.

One TCP stream is as fast as one thread at each end copies. So a client of ours may open further connections,
*carriers*, that have no words of their own: after CARRY, which shows whom they belong to, there is nothing on them but
data. The first connection says with SET_RANGES what comes, and is the only one on which anything is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from struct import Struct
from typing import Any, NamedTuple

from ..device import Bytes
from ..errors import RemoteProtocolError
from ..grouping import grouped

PIECE = 4 << 20
"""Bytes that go over one carrier together: what servers receive, hash and keep at a time."""
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


class Piece(NamedTuple):
    """``size`` bytes from ``at`` on in range ``number``: at most :data:`PIECE`."""

    number: int
    at: int
    size: int


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


def dealt(sizes: Sequence[int], carriers: int) -> list[list[Piece]]:
    """What each carrier has of ranges of ``sizes`` bytes, one piece behind the other: the next piece always goes to the
    one that has least, the first of several such."""
    hands: list[list[Piece]] = [[] for _ in range(carriers)]
    held = [0] * carriers
    for number, size in enumerate(sizes):
        for at in range(0, size, PIECE):
            length = min(PIECE, size - at)
            least = held.index(min(held))
            hands[least].append(Piece(number, at, length))
            held[least] += length
    return hands


def together(hand: Iterable[Piece]) -> Iterator[list[Piece]]:
    """The pieces of ``hand``, as many together as are one behind the other and not more than :data:`PIECE`: small
    tensors cost no more than their bytes."""
    return grouped(hand, lambda piece: piece.size, lambda _, size: size <= PIECE)
