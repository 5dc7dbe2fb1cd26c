"""Bytes called by what they are, so that they need not be sent to somebody who has them.

Two names. The protocol's own is FNV-1a 64: 64 bits that anybody can aim at, so it says which bytes are meant, never
that these are they. Between our own peers it is a digest that nobody can forge: BLAKE3 over the BLAKE3 of each
:data:`PIECE`, so that many threads can work on one tensor. (A core makes 4.4 GB/s of it, and 1 GB/s of SHA-256 with the
processor's instructions for that: less than a network or a disk gives.)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np

from .device import Bytes

log = logging.getLogger(__name__)

PIECE = 4 << 20
DIGEST_BYTES = 32
THREADS = min(8, os.cpu_count() or 1)
"""That hash at one time, at either end: a few are faster than a network or a disk."""
SMALLEST = 1024
"""Bytes below which asking for them, and keeping them, costs more than it spares."""
FNV_START = 0xCBF29CE484222325
FNV_PRIME = 0x100000001B3

Fnv = Callable[[Bytes, int], int]
"""(data, state) → state: the hash of data in pieces begins with :data:`FNV_START` and ends with the last state."""


def digest(*data: Bytes) -> bytes:
    """The digest of ``data``, one after the other, computed in this thread (other threads run meanwhile)."""
    return joined(hashed(*piece) for piece in split(data))


def split(data: Iterable[Bytes]) -> Iterator[Sequence[memoryview]]:
    """The pieces of ``data``, one after the other, each as views of it."""
    piece: list[memoryview] = []
    room = PIECE
    for view in (memoryview(part).cast("B") for part in data):
        while view:
            piece.append(view[:room])
            taken = len(piece[-1])
            view, room = view[taken:], room - taken
            if not room:
                yield piece
                piece, room = [], PIECE
    if piece:
        yield piece


def joined(digests: Iterable[bytes]) -> bytes:
    """The digest of data whose pieces have the BLAKE3 ``digests``, in order."""
    return hashed(b"".join(digests))


def hashed(*data: Bytes) -> bytes:
    """The BLAKE3 of ``data``, one after the other; other threads run meanwhile."""
    from blake3 import blake3  # when there is something to hash

    hashing = blake3()
    for part in data:
        hashing.update(part)
    return hashing.digest()


def pieces(size: int) -> Iterator[tuple[int, int]]:
    """(offset, size) of the pieces of ``size`` bytes."""
    for offset in range(0, size, PIECE):
        yield offset, min(PIECE, size - offset)


def fnv1a() -> Fnv | None:
    """FNV-1a 64 as machine code, which releases the GIL; None where numba is not installed, or can't be loaded now.

    Each byte waits for the one before it, so only native code is fast enough to be worth more than sending the bytes:
    four or five cycles a byte, 600 MB/s at 3 GHz.
    """
    try:
        return _compiled()
    except Exception as error:  # its libraries are broken, or there is no memory, or no descriptor, to load them
        _complain(str(error))
        return None


@cache
def _complain(reason: str) -> None:
    """Once for each reason."""
    log.warning("numba can't be used, so native clients send again what they have sent before: %s", reason)


@cache
def _compiled() -> Fnv | None:
    """None where numba is not installed."""
    try:
        import numba
    except ImportError:  # also numba's own, when it is too old for this numpy
        return None
    array = numba.types.Array(numba.uint8, 1, "C", readonly=True)

    def chain(data: Any, state: Any) -> Any:
        for byte in data:
            state = (state ^ byte) * np.uint64(FNV_PRIME)
        return state

    signature = numba.uint64(array, numba.uint64)
    try:
        compiled = numba.njit(signature, nogil=True, cache=True)(chain)
    except (RuntimeError, OSError):  # there is no folder that numba can keep machine code in
        compiled = numba.njit(signature, nogil=True)(chain)
    return lambda data, state: int(compiled(np.frombuffer(data, np.uint8), np.uint64(state)))
