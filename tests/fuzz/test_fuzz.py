"""A little of ``make fuzz``, the same each time: every parser with its seeds and some thousand damaged ones, and
conversations over sockets. Inputs that once were a fault have tests of their own."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.fuzz.conversations import House, converse
from tests.fuzz.mutations import LARGEST, mutated
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
