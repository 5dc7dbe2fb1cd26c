"""How a client shows its key, inside TLS and before HELLO; no IO here. What is proven is in :mod:`sdrpc.key`.

    client → server   offer:      magic 8 bytes, nonce 32, count u8, key id 8 each
    server → client   challenge:  verdict u8, which of the offered keys u8, nonce 32, the server's proof 32
    client → server   proof 32
    server → client   verdict u8

The server proves first that it has the key, so a client never says anything to a stranger. After a verdict that is not
``WELCOME`` the server hangs up. What follows is the protocol as it is without encryption.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from enum import IntEnum
from struct import Struct
from typing import NamedTuple

from ..device import Bytes
from ..errors import RemoteProtocolError
from ..key import ID_BYTES, NONCE_BYTES, PROOF_BYTES

TLS_HANDSHAKE = 22
"""The first byte of a TLS connection. That of a ggml connection is the number of HELLO, 14."""
MAGIC = b"sdrpckey"
MAX_KEYS = 16
"""That a client offers at once."""

_OFFER = Struct(f"<8s{NONCE_BYTES}sB")
_CHALLENGE = Struct(f"<BB{NONCE_BYTES}s{PROOF_BYTES}s")


class Verdict(IntEnum):
    WELCOME = 0
    UNKNOWN_KEY = 1
    """None of the keys is one of the server's, or not any more."""


class Offer(NamedTuple):
    """A client's first words: ``ids`` of the keys that it has for this server."""

    nonce: bytes
    ids: tuple[bytes, ...]


class Challenge(NamedTuple):
    """A server's answer: the key with index ``chosen`` of those offered, and the proof that the server has it."""

    verdict: Verdict
    chosen: int = 0
    nonce: bytes = bytes(NONCE_BYTES)
    proof: bytes = bytes(PROOF_BYTES)


def encode_offer(nonce: bytes, ids: Sequence[bytes]) -> bytes:
    return _OFFER.pack(MAGIC, nonce, len(ids)) + b"".join(ids)


def read_offer() -> Generator[int, Bytes, Offer]:
    """A server's end of :func:`encode_offer`: yields how many bytes it needs next."""
    magic, nonce, count = _OFFER.unpack((yield _OFFER.size))
    if magic != MAGIC:
        raise RemoteProtocolError("an encrypted connection that does not begin with a key")
    if not 0 < count <= MAX_KEYS:
        raise RemoteProtocolError(f"{count} keys are offered; 1 to {MAX_KEYS} can be")
    ids = bytes((yield count * ID_BYTES))
    return Offer(nonce, tuple(ids[start : start + ID_BYTES] for start in range(0, len(ids), ID_BYTES)))


def encode_challenge(challenge: Challenge) -> bytes:
    return _CHALLENGE.pack(*challenge)


def read_challenge(offered: int) -> Generator[int, Bytes, Challenge]:
    """A client's end of :func:`encode_challenge`, after it ``offered`` so many keys."""
    verdict, chosen, nonce, proof = _CHALLENGE.unpack((yield _CHALLENGE.size))
    if chosen >= offered:
        raise RemoteProtocolError(f"key {chosen} of {offered} is chosen")
    return Challenge(_verdict(verdict), chosen, nonce, proof)


def read_proof() -> Generator[int, Bytes, bytes]:
    return bytes((yield PROOF_BYTES))


def encode_verdict(verdict: Verdict) -> bytes:
    return bytes([verdict])


def read_verdict() -> Generator[int, Bytes, Verdict]:
    return _verdict((yield 1)[0])


def _verdict(number: int) -> Verdict:
    try:
        return Verdict(number)
    except ValueError:
        raise RemoteProtocolError(f"an answer to a key that nobody knows: {number}") from None
