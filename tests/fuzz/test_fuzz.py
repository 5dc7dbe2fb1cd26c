"""A little of ``make fuzz``, the same each time: every parser with its seeds and some thousand damaged ones,
conversations over sockets, and single operations. Inputs that once were a fault have tests of their own."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator

import pytest

from tests.fuzz import operations
from tests.fuzz.conversations import House, converse
from tests.fuzz.mutations import LARGEST, mutated
from tests.fuzz.operations import hunt
from tests.fuzz.parsers import PARSERS, Parser

INPUTS = 1500


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.name)
def test_any_bytes(parser: Parser) -> None:
    seeds = parser.seeds()
    source = random.Random(parser.name)
    for seed in seeds:
        parser.check(seed)
    for _ in range(INPUTS):
        parser.check(mutated(seeds, source))


def test_damage_is_the_same_for_the_same_seed_and_bounded() -> None:
    seeds = [bytes(range(256)) * 4, b"abc", b""]
    one, other = ([mutated(seeds, source) for _ in range(200)] for source in (random.Random(1), random.Random(1)))
    assert one == other
    assert len(set(one)) > 120
    assert max(map(len, one)) <= LARGEST


@pytest.fixture
def house() -> Iterator[House]:
    made = House()
    yield made
    made.close()


def test_conversations(house: House) -> None:
    converse(house, 30, 1)
    assert house.messages > 150


def test_single_operations() -> None:
    found = hunt(1, 200)
    assert not found.faults
    assert found.outcomes.total() == 200
    assert found.outcomes["computed"] > 40


def test_an_operation_that_ends_its_process_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """And those behind it are tried."""
    program = (
        "import os, sys; seed, count = map(int, sys.argv[1:3])\n"
        "for number in range(seed, seed + count):\n"
        "    print(number, end=' ', flush=True)\n"
        "    if number == 5: os.abort()\n"
        "    print('computed', flush=True)\n"
    )
    monkeypatch.setattr(operations, "COMMAND", (sys.executable, "-c", program))
    found = hunt(3, 6)
    assert found.outcomes == {"computed": 5}
    assert list(found.faults) == [5]
