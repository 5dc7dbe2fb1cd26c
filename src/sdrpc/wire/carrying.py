"""A tensor's data over several connections: which parts of it go where.

One TCP stream is as fast as one thread at each end copies. So a client of ours may open further connections,
*carriers*, that have no words of their own: after CARRY, which shows whom they belong to, there is nothing on them but
data. The first connection says with SET_RANGES what comes, and is the only one on which anything is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ..grouping import grouped

PIECE = 4 << 20
"""Bytes that go over one carrier together: what servers receive, hash and keep at a time."""


class Piece(NamedTuple):
    """``size`` bytes from ``at`` on in range ``number``: at most :data:`PIECE`."""

    number: int
    at: int
    size: int


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
