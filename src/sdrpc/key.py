"""Keys: what a client needs to be let in by a server on another machine, and how both prove that they have it.

A key is 95 random bits, written as 20 letters and digits of which the last tells most mistyped ones apart. It never
crosses the wire, not even encrypted: each side proves that it has it by an HMAC over the certificate of the TLS
connection and a random number of each side, as SCRAM does with channel binding (RFC 5802, RFC 5929:
tls-server-end-point). So one short code tells the server who the client is and the client which certificate is the
server's, and whoever sits in between with a certificate of his own can prove nothing to either side.

Why 95 bits: such a man in the middle gets a proof, against which he can try keys at home. A trillion keys a second find
one of 95 bits in 600 million years on average; with 65 bits it would be eight months. Keys are made here, never chosen
by people, so that there is nothing to be guessed from and nothing that has to be slowed down by a password hash.
"""

from __future__ import annotations

import hmac
import secrets
from dataclasses import dataclass
from hashlib import sha256

from .errors import UsageError

BITS = 95
LETTERS = "0123456789abcdefghjkmnpqrstvwxyz"
"""Crockford's 32: no i, l, o (read as 1, 1, 0), no u. Five bits each."""
ID_BYTES = 8
NONCE_BYTES = 32
PROOF_BYTES = 32

_GROUP = 5
_LENGTH = BITS // 5 + 1
_READ_AS = str.maketrans({"i": "1", "l": "1", "o": "0"})


@dataclass(frozen=True, repr=False)
class Key:
    """A secret that a server and a client share. Neither ``repr`` nor ``str`` shows it; ``code`` does."""

    secret: bytes

    @classmethod
    def new(cls) -> Key:
        """A key that nobody has yet."""
        return cls(secrets.randbits(BITS).to_bytes(_bytes(BITS), "big"))

    @classmethod
    def parse(cls, code: str) -> Key:
        """The key that is written as ``code``: in any case, with or without hyphens and spaces.

        Raises :class:`UsageError`, which does not repeat the code, for what is none.
        """
        letters = "".join(char for char in code.lower() if char not in "- \t\r\n").translate(_READ_AS)
        if len(letters) != _LENGTH or any(letter not in LETTERS for letter in letters):
            raise UsageError(f"this is no key: it has {_LENGTH} letters and digits, as the server printed them")
        number = 0
        for letter in letters[:-1]:
            number = number << 5 | LETTERS.index(letter)
        key = cls(number.to_bytes(_bytes(BITS), "big"))
        if key.code.replace("-", "") != letters:
            raise UsageError("this key is mistyped: compare it with what the server printed")
        return key

    @property
    def code(self) -> str:
        """The key as people type it: four groups of five."""
        number = int.from_bytes(self.secret, "big")
        letters = "".join(LETTERS[number >> shift & 31] for shift in range(BITS - 5, -1, -5))
        letters += LETTERS[sha256(letters.encode()).digest()[0] & 31]
        return "-".join(letters[start : start + _GROUP] for start in range(0, _LENGTH, _GROUP))

    @property
    def id(self) -> bytes:
        """What both sides call the key. Says nothing about it, and belongs into an encrypted connection all the
        same."""
        return self._mac(b"sdrpc key id")[:ID_BYTES]

    def server_proof(self, transcript: bytes) -> bytes:
        """That the side with the certificate has this key."""
        return self._mac(b"sdrpc server" + transcript)

    def client_proof(self, transcript: bytes) -> bytes:
        """That the other side has it."""
        return self._mac(b"sdrpc client" + transcript)

    def __repr__(self) -> str:
        return "Key(…)"

    def _mac(self, message: bytes) -> bytes:
        return hmac.digest(self.secret, message, "sha256")


def fingerprint(certificate: bytes) -> bytes:
    """What stands for a certificate (DER): its SHA-256."""
    return sha256(certificate).digest()


def transcript(certificate: bytes, client_nonce: bytes, server_nonce: bytes) -> bytes:
    """What is proven to be one conversation: the ``fingerprint`` of its certificate, and a number of each side."""
    return certificate + client_nonce + server_nonce


def nonce() -> bytes:
    """A number that was never used before."""
    return secrets.token_bytes(NONCE_BYTES)


def same(proof: bytes, expected: bytes) -> bool:
    """Whether two proofs are equal, in a time that tells nothing of where they differ."""
    return hmac.compare_digest(proof, expected)


def _bytes(bits: int) -> int:
    return (bits + 7) // 8
