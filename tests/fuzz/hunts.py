"""What is tried for so many seconds: each parser, conversations with a server, single operations."""

from __future__ import annotations

import random
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.fuzz.conversations import House, converse
from tests.fuzz.mutations import mutated
from tests.fuzz.operations import hunt
from tests.fuzz.parsers import PARSERS, Parser

FOUND = Path("fuzz-found")
ROUND = 2000
SOCKETS, OPERATIONS = "conversations", "operations"
TOGETHER = 500
"""Operations that a process tries, if it lives so long."""


def attempt(name: str, seconds: float, seed: int, device: str, precision: str) -> tuple[int, int, float]:
    """Try what has that name: how many inputs, how many that it did not stand, and how many seconds it took."""
    hunts: dict[str, Callable[[float, int], tuple[int, int]]] = {
        SOCKETS: fuzz_sockets, OPERATIONS: partial(fuzz_operations, device, precision),
        **{parser.name: partial(fuzz, parser) for parser in PARSERS},
    }  # fmt: skip
    began = time.monotonic()
    count, faults = hunts[name](seconds, seed)
    return count, faults, time.monotonic() - began


def fuzz(parser: Parser, seconds: float, seed: int) -> tuple[int, int]:
    """How many inputs, and how many that the parser did not stand; one of each kind is kept."""
    until, count = time.monotonic() + seconds, 0
    kinds: set[str] = set()
    seeds = parser.seeds()
    source = random.Random(f"{parser.name} {seed}")
    while time.monotonic() < until:
        for _ in range(ROUND if count else 50):
            data = mutated(seeds, source)
            count += 1
            try:
                parser.check(data)
            except Exception as error:
                kind = repr(traceback.extract_tb(error.__traceback__)[-1]) + type(error).__name__
                if kind not in kinds:
                    kinds.add(kind)
                    _keep(parser.name, data)
    return count, len(kinds)


def fuzz_sockets(seconds: float, seed: int) -> tuple[int, int]:
    """How many messages, and whether the server did not stand one of them."""
    until = time.monotonic() + seconds
    house = House()
    faults = 0
    try:
        while time.monotonic() < until and not faults:
            seed += 1
            try:
                converse(house, 20, seed)
            except Exception:
                faults += 1
                print(f"conversations, seed {seed}:")
                traceback.print_exc(limit=-4)
        return house.messages, faults
    finally:
        house.close()


def fuzz_operations(device: str, precision: str, seconds: float, seed: int) -> tuple[int, int]:
    """How many operations, and how many that ended their process."""
    until = time.monotonic() + seconds
    count = faults = 0
    while time.monotonic() < until:
        tried = hunt(seed + count, TOGETHER, device, precision)
        count, faults = count + TOGETHER, faults + len(tried.faults)
        for number, said in tried.faults.items():
            print(f"python -m tests.fuzz.operations {number} 1 {device} {precision}: {said}")
    return count, faults


def _keep(name: str, data: bytes) -> None:
    FOUND.mkdir(exist_ok=True)
    path = FOUND / f"{name.replace(' ', '-')}-{len(list(FOUND.iterdir()))}"
    path.write_bytes(data)
    print(f"{name}: a fault, see {path}")
    traceback.print_exc(limit=-3)
