"""Bytes in memory in the place of a socket, for readers that ask for what they need."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

from sdrpc.device import Bytes
from sdrpc.wire.framing import drive

T = TypeVar("T")


class EndOfStream(Exception):
    """A reader asked for more than there is."""


class Stream:
    """``taken`` is how far readers came. ``piece``: how many bytes arrive at a time (the rest of a request is waited
    for); what a reader asks for is also kept, in ``wanted``."""

    def __init__(self, data: bytes, piece: int = 1 << 30) -> None:
        self.data, self.piece, self.taken = data, piece, 0
        self.wanted: list[int] = []

    @property
    def rest(self) -> bytes:
        return self.data[self.taken :]

    def receive(self, size: int) -> Bytes:
        self.wanted.append(size)
        gathered = bytearray()
        while len(gathered) < size:
            piece = self.rest[: min(self.piece, size - len(gathered))]
            if not piece:
                raise EndOfStream
            self.taken += len(piece)
            gathered += piece
        return bytes(gathered)

    def skip(self, size: int) -> None:
        """Pass over what a caller receives elsewhere: no reader asks for it."""
        if size > len(self.rest):
            raise EndOfStream
        self.taken += size

    def drive(self, reader: Generator[int, Bytes, T]) -> T:
        return drive(reader, self.receive)
