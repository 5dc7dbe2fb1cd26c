"""The exchange in which keys are shown: whole, byte by byte, and anything else."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdrpc.errors import RemoteProtocolError
from sdrpc.wire import key_exchange
from sdrpc.wire.key_exchange import MAX_KEYS, Challenge, Offer, Verdict
from tests.support.stream import EndOfStream, Stream

NONCE, PROOF = bytes(range(32)), bytes(range(32, 64))
IDS = (b"12345678", b"abcdefgh")
MESSAGES = [
    (key_exchange.encode_offer(NONCE, IDS), key_exchange.read_offer, Offer(NONCE, IDS)),
    (
        key_exchange.encode_challenge(Challenge(Verdict.WELCOME, 1, NONCE, PROOF)),
        lambda: key_exchange.read_challenge(2),
        Challenge(Verdict.WELCOME, 1, NONCE, PROOF),
    ),
    (key_exchange.encode_verdict(Verdict.UNKNOWN_KEY), key_exchange.read_verdict, Verdict.UNKNOWN_KEY),
    (PROOF, key_exchange.read_proof, PROOF),
]


@pytest.mark.parametrize("piece", [1, 1 << 20])
@pytest.mark.parametrize(("data", "reader", "meaning"), MESSAGES)
def test_messages_are_read_as_they_are_written(data: bytes, reader: object, meaning: object, piece: int) -> None:
    stream = Stream(data + b"trailing", piece)
    assert stream.drive(reader()) == meaning  # type: ignore[operator]
    assert stream.rest == b"trailing"


def test_the_bytes_are_those_of_the_table() -> None:
    assert MESSAGES[0][0] == b"sdrpckey" + NONCE + b"\2" + b"12345678abcdefgh"
    assert MESSAGES[1][0] == b"\0\1" + NONCE + PROOF


@pytest.mark.parametrize("count", [0, MAX_KEYS + 1, 255])
def test_a_number_of_keys_that_nobody_has(count: int) -> None:
    with pytest.raises(RemoteProtocolError, match=f"{count} keys"):
        Stream(b"sdrpckey" + NONCE + bytes([count]) + bytes(8 * 255)).drive(key_exchange.read_offer())


def test_a_key_that_was_not_offered() -> None:
    with pytest.raises(RemoteProtocolError, match="key 2 of 2"):
        Stream(bytes([0, 2]) + bytes(64)).drive(key_exchange.read_challenge(2))


@given(st.binary(max_size=400))
def test_any_bytes_are_a_message_or_an_error_of_the_peer(data: bytes) -> None:
    for reader in (key_exchange.read_offer(), key_exchange.read_challenge(3), key_exchange.read_verdict()):
        stream = Stream(data)
        with suppress(RemoteProtocolError, EndOfStream):
            stream.drive(reader)
        assert max(stream.wanted) <= 16 * 8 + 66
