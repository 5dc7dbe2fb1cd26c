"""``make fuzz MINUTES=10``: inputs of everybody's making for everything that reads them, for as long as you like.

``python -m tests.fuzz --only operations --device CUDA0`` tries single operations on a GPU.

What is found is printed with the seed that makes it again, and kept in ``fuzz-found/``.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from functools import partial
from pathlib import Path

from sdrpc.device import PRECISIONS
from sdrpc.engine import discovery
from tests.fuzz.conversations import House, converse
from tests.fuzz.mutations import mutated
from tests.fuzz.operations import hunt
from tests.fuzz.parsers import PARSERS, Parser

FOUND = Path("fuzz-found")
ROUND = 2000
SOCKETS, OPERATIONS = "conversations", "operations"
TOGETHER = 500
"""Operations that a process tries, if it lives so long."""


def main() -> int:
    options = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    options.add_argument("--minutes", type=float, default=5.0)
    options.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    options.add_argument(
        "--only", metavar="NAME", help="; ".join(parser.name for parser in PARSERS) + f"; {SOCKETS}; {OPERATIONS}"
    )
    options.add_argument(
        "--device", default="CPU", choices=[each.name for each in discovery.found()], help="of operations: %(choices)s"
    )
    options.add_argument("--precision", default="exact", choices=PRECISIONS, help="of operations: %(choices)s")
    chosen = options.parse_args()
    parsers = [parser for parser in PARSERS if chosen.only in (None, parser.name)]
    others = {SOCKETS: fuzz_sockets, OPERATIONS: partial(fuzz_operations, chosen.device, chosen.precision)}
    others = {name: each for name, each in others.items() if chosen.only in (None, name)}
    share = 60 * chosen.minutes / (len(parsers) + 2 * len(others))
    print(f"seed {chosen.seed}")
    found = 0
    total = 0
    for parser in parsers:
        began = time.monotonic()
        count, faults = fuzz(parser, share, chosen.seed)
        found, total = found + faults, total + count
        print(
            f"{parser.name:16} {count:12,} inputs {count / (time.monotonic() - began):10,.0f} a second {faults} faults",
            flush=True,
        )
    for name, each in others.items():
        count, faults = each(2 * share, chosen.seed)
        found, total = found + faults, total + count
        print(f"{name:16} {count:12,} {faults} faults", flush=True)
    print(f"{total:,} inputs, {found} faults")
    return 1 if found else 0


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


if __name__ == "__main__":
    sys.exit(main())
