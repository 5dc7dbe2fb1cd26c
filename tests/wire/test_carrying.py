"""Which parts of a tensor's data go over which connection."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdrpc import content
from sdrpc.errors import RemoteProtocolError
from sdrpc.wire.carrying import PIECE, dealt
from sdrpc.wire.ranges import MOST_RANGES, Range, pack, unpack

SIZES = st.lists(st.integers(0, 4 * PIECE) | st.integers(0, 2000), max_size=20)


def test_pieces_are_those_of_the_cache() -> None:
    assert PIECE == content.PIECE


@given(SIZES, st.integers(1, 8))
@settings(max_examples=100)
def test_each_byte_is_in_one_hand_and_hands_are_as_full_as_pieces_allow(sizes: list[int], carriers: int) -> None:
    hands = dealt(sizes, carriers)
    assert len(hands) == carriers
    covered = [0] * len(sizes)
    for number, at, size in sorted(piece for hand in hands for piece in hand):
        assert at == covered[number]
        assert 0 < size <= PIECE
        covered[number] += size
        assert size == PIECE or covered[number] == sizes[number]
    assert covered == sizes
    assert all(hand == sorted(hand) for hand in hands)
    held = [sum(piece.size for piece in hand) for hand in hands]
    assert max(held) - min(held) <= PIECE


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)), min_size=1, max_size=MOST_RANGES))
@settings(max_examples=50)
def test_ranges_are_read_as_they_were_written(ranges: list[tuple[int, int]]) -> None:
    assert unpack(pack([Range(*each) for each in ranges])) == ranges


@pytest.mark.parametrize("data", [b"", b"123", bytes(24)])
def test_what_is_no_list_of_ranges_is_refused(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match=f"ranges of {len(data)} bytes"):
        unpack(data)
