"""Inputs that are nearly right: good ones, damaged in the ways that find faults. The same seed gives the same
inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

EDGES = [0, 1, 0x7F, 0x80, 0xFF]
NUMBERS = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**61, 2**63 - 1, 2**63, 2**64 - 1]
LARGEST = 1 << 16
"""Bytes of an input: growing ones are cut there."""


def mutated(seeds: Sequence[bytes], random: Random) -> bytes:
    """One of the ``seeds``, damaged one to eight times; now and then nothing but noise."""
    if random.random() < 0.02:
        return random.randbytes(random.randrange(200))
    data = bytearray(random.choice(seeds))
    for _ in range(1 << random.randrange(4)):
        random.choice(_DAMAGES)(data, seeds, random)
    return bytes(data[:LARGEST])


def _byte(data: bytearray, _: Sequence[bytes], random: Random) -> None:
    if data:
        data[random.randrange(len(data))] = random.choice(EDGES) if random.random() < 0.5 else random.randrange(256)


def _bit(data: bytearray, _: Sequence[bytes], random: Random) -> None:
    if data:
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def _number(data: bytearray, _: Sequence[bytes], random: Random) -> None:
    """A number of four or eight bytes, often at a multiple of four, where numbers are."""
    size = random.choice((4, 8))
    if len(data) >= size:
        at = random.randrange(len(data) - size + 1)
        at -= at % 4 if random.random() < 0.5 else 0
        number = random.choice(NUMBERS) if random.random() < 0.7 else random.randrange(1 << 16)
        data[at : at + size] = (number % (1 << 8 * size)).to_bytes(size, "little")


def _cut(data: bytearray, _: Sequence[bytes], random: Random) -> None:
    del data[random.randrange(len(data) + 1) :]


def _remove(data: bytearray, _: Sequence[bytes], random: Random) -> None:
    at = random.randrange(len(data) + 1)
    del data[at : at + random.randrange(1, 17)]


def _insert(data: bytearray, _: Sequence[bytes], random: Random) -> None:
    at = random.randrange(len(data) + 1)
    data[at:at] = random.randbytes(random.randrange(1, 9))


def _repeat(data: bytearray, _: Sequence[bytes], random: Random) -> None:
    at = random.randrange(len(data) + 1)
    data[at:at] = data[at : at + random.randrange(1, 65)]


def _splice(data: bytearray, seeds: Sequence[bytes], random: Random) -> None:
    other = random.choice(seeds)
    data[random.randrange(len(data) + 1) :] = other[random.randrange(len(other) + 1) :]


_DAMAGES: list[Callable[[bytearray, Sequence[bytes], Random], None]] = [
    _byte, _byte, _bit, _number, _number, _cut, _remove, _insert, _repeat, _splice,
]  # fmt: skip
