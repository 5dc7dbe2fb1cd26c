"""What is learnt about clients' versions, without a socket or a file."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdrpc.ggml.dialect import Dialect, dialects, newest
from sdrpc.server.version_memory import MAX_ADDRESSES, Offer, VersionMemory, accepting, families, normal
from sdrpc.wire.hello import NATIVE, Capability, Hello

EVERY = tuple(dialects().values())
HERE, THERE = "192.0.2.7", "2001:db8::1"
ONE_FAMILY_EACH = ("8.0.0", "7.0.0", "6.0.0", "5.0.1", "4.0.2")
"""Versions whose clients begin alike and take each other's servers not."""


def greeting(dialect: Dialect) -> Hello:
    return Hello(dialect.hello_request_bytes > 0, NATIVE)


def takes(dialect: Dialect, offer: Offer) -> bool:
    """Whether a native client goes on after this answer."""
    (major, minor, _), told = dialect.triple, offer.told.triple
    return told[0] == major and told[1] <= minor


def visit(learnt: VersionMemory, version: str, address: str = HERE) -> bool:
    """A native client comes once; whether it stays."""
    dialect = dialects()[version]
    offer = learnt.offer(address, greeting(dialect))
    assert offer.told in offer.versions
    if takes(dialect, offer):
        assert dialect in offer.versions
        learnt.accepted(address, version)
        return True
    learnt.refused(address, greeting(dialect), offer)
    return False


def visits(learnt: VersionMemory, version: str, address: str = HERE) -> int:
    """How often a native client has to be started until it is served."""
    for times in range(1, 10):
        if visit(learnt, version, address):
            return times
    raise AssertionError(f"{version} is never served")


def test_an_offer_for_each_major_version_serves_all_its_clients() -> None:
    assert {name: [d.version for d in family] for name, family in families().items()} == {
        "8.0": ["8.0.0"],
        "7.0": ["7.0.0"],
        "6.0": ["6.0.0"],
        "5.0": ["5.1.0", "5.0.1", "5.0.0"],
        "4.0": ["4.0.3", "4.0.2", "4.0.1", "4.0.0"],
        "3.6": ["3.6.1", "3.6.0"],
    }


def test_what_hardly_any_client_speaks_is_offered_last() -> None:
    """Else the clients of every version before it would have to be started once more."""
    assert list(families()) == ["8.0", "7.0", "5.0", "4.0", "3.6", "6.0"]
    assert [version for version, dialect in dialects().items() if dialect.brief] == ["6.0.0"]


@pytest.mark.parametrize("dialect", EVERY, ids=lambda dialect: dialect.version)
def test_every_client_is_served_soon_and_then_at_once(dialect: Dialect) -> None:
    learnt = VersionMemory()
    expected = {"8.0": 1, "7.0": 2, "5.0": 3, "4.0": 4, "6.0": 5, "3.6": 1}
    name = next(name for name, family in families().items() if dialect in family)
    assert visits(learnt, dialect.version) == expected[name]
    for _ in range(3):
        assert visits(learnt, dialect.version) == 1
    offer = learnt.offer(HERE, greeting(dialect))
    assert offer.versions[0] is dialect, "its patch is known too"
    assert offer.told.triple[:2] == families()[name][-1].triple[:2]


@pytest.mark.parametrize("version", ONE_FAMILY_EACH)
def test_other_addresses_begin_with_what_was_right_last(version: str) -> None:
    learnt = VersionMemory()
    visits(learnt, version)
    assert visits(learnt, version, THERE) == 1
    assert visits(learnt, "3.6.0", THERE) == 1, "the empty HELLO tells it apart"


def test_a_client_of_ours_is_told_at_once() -> None:
    learnt = VersionMemory()
    visits(learnt, "4.0.1")
    offer = learnt.offer(HERE, Hello(True, Capability.ERRORS))
    assert (offer.told, offer.versions) == (newest(), (newest(),))


def test_two_versions_behind_one_address_cost_one_run_for_each_change() -> None:
    learnt = VersionMemory()
    for version in ("7.0.0", "4.0.2"):
        visits(learnt, version)
    for _ in range(3):
        for version in ("7.0.0", "4.0.2"):
            assert visits(learnt, version) == 2
            assert visits(learnt, version) == 1


def test_connections_that_hang_up_at_the_same_time_count_once() -> None:
    learnt, hello = VersionMemory(), greeting(newest())
    first = learnt.offer(HERE, hello)
    assert learnt.refused(HERE, hello, first)
    for _ in range(5):
        assert not learnt.refused(HERE, hello, first), "no news"
    assert learnt.offer(HERE, hello).name == "7.0"


def test_after_the_last_offer_it_begins_anew() -> None:
    learnt, hello = VersionMemory(), greeting(newest())
    offered = []
    for _ in range(10):
        offer = learnt.offer(HERE, hello)
        learnt.refused(HERE, hello, offer)
        offered.append(offer.name)
    assert offered == ["8.0", "7.0", "5.0 or 5.1", "4.0", "6.0"] * 2
    empty = Hello(False, NATIVE)
    for _ in range(2):
        offer = learnt.offer(HERE, empty)
        assert offer.name == "3.6", "there is nothing else"
        learnt.refused(HERE, empty, offer)


def test_a_client_that_was_updated() -> None:
    learnt = VersionMemory()
    assert visits(learnt, "5.0.1") == 3
    assert visits(learnt, "7.0.0") == 4, "what was right before comes every other time"
    assert visits(learnt, "7.0.0") == 1


def test_addresses_are_bounded_and_the_ones_in_use_stay() -> None:
    learnt = VersionMemory()
    visits(learnt, "4.0.2", HERE)
    for number in range(2 * MAX_ADDRESSES):
        visits(learnt, "7.0.0", f"10.0.{number // 256}.{number % 256}")
        visits(learnt, "4.0.2", HERE)
    table = json.loads(learnt.dump())
    assert len(table["addresses"]) == MAX_ADDRESSES
    assert table["addresses"][-1] == [HERE, ["4.0.2"], []]
    assert "10.0.0.0" not in learnt.dump()


def test_a_neighbour_who_comes_and_goes_leaves_every_other_start_to_who_is_known() -> None:
    """Somebody at the same address says HELLO and hangs up, again and again, between all that a client of 5.0 does."""
    learnt = VersionMemory()
    visits(learnt, "5.0.0")
    served = 0
    for turn in range(60):
        for _ in range(turn % 4):
            hello = greeting(dialects()["7.0.0"])
            learnt.refused(HERE, hello, learnt.offer(HERE, hello))
        served += visit(learnt, "5.0.0")
    assert served >= 28


def test_addresses_that_only_hang_up_push_out_nobody_who_stayed() -> None:
    learnt = VersionMemory()
    visits(learnt, "4.0.2", HERE)
    hello = greeting(dialects()["7.0.0"])
    for number in range(2 * MAX_ADDRESSES):
        address = f"10.0.{number // 256}.{number % 256}"
        learnt.refused(address, hello, learnt.offer(address, hello))
    assert visits(learnt, "4.0.2", HERE) == 1
    assert len(json.loads(learnt.dump())["addresses"]) == MAX_ADDRESSES


EVENTS = st.lists(st.tuples(st.sampled_from([d.version for d in EVERY]), st.sampled_from([HERE, THERE, "::1"])))


@given(EVENTS)
def test_what_is_written_is_read_again(events: list[tuple[str, str]]) -> None:
    learnt = VersionMemory()
    for version, address in events:
        visit(learnt, version, address)
    again = VersionMemory.parse(learnt.dump())
    assert again.dump() == learnt.dump()
    for dialect in EVERY:
        for address in (HERE, THERE, "::1", "10.0.0.1"):
            assert again.offer(address, greeting(dialect)) == learnt.offer(address, greeting(dialect))


@given(EVENTS)
def test_whatever_came_before_every_client_gets_its_turn(events: list[tuple[str, str]]) -> None:
    learnt = VersionMemory()
    for version, address in events:
        visit(learnt, version, address)
    for dialect in EVERY:
        assert visits(learnt, dialect.version) <= 2 * len(families()), "what was right here comes every other time"


def changed(**fields: Any) -> str:
    return json.dumps({"format": 1, "everywhere": [], "addresses": [], **fields})


DAMAGED = {
    "nothing": "",
    "no JSON": "{",
    "another shape": "[]",
    "another format": changed(format=2),
    "nested deep": "[" * 100_000,
    "a huge number": "1" * 10_000,
    "a version that is none": changed(everywhere=["6.1.0"]),
    "a version that is no text": changed(everywhere=[[]]),
    "versions that are no list": changed(everywhere="7.0.0"),
    "two of one family": changed(everywhere=["4.0.0", "4.0.1"]),
    "too many versions": changed(everywhere=["7.0.0"] * 1000),
    "no addresses": changed(addresses=None),
    "too many addresses": changed(addresses=[["10.0.0.1", [], []]] * (MAX_ADDRESSES + 1)),
    "an entry that is too short": changed(addresses=[["10.0.0.1", []]]),
    "an address that is none": changed(addresses=[["localhost", [], []]]),
    "an address that is no text": changed(addresses=[[1, [], []]]),
    "an address that is not normal": changed(addresses=[["::ffff:10.0.0.1", [], []]]),
    "a refusal of what is no offer": changed(addresses=[["10.0.0.1", [], ["5.1"]]]),
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_damaged_text(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        VersionMemory.parse(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["7.0.0", "5.0", HERE, ""]),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["format", "everywhere", "addresses"]), inner),
)


@given(JSON, JSON)
def test_any_text_is_read_or_refused(everywhere: Any, addresses: Any) -> None:
    try:
        learnt = VersionMemory.parse(changed(everywhere=everywhere, addresses=addresses))
    except ValueError:
        return
    assert VersionMemory.parse(learnt.dump()).dump() == learnt.dump()


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:DB8:0::1", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::1"),
    ],
)
def test_one_name_for_one_address(address: str, name: str) -> None:
    assert normal(address) == name


@pytest.mark.parametrize("told", EVERY, ids=lambda dialect: dialect.version)
def test_versions_that_share_an_offer_read_messages_alike(told: Dialect) -> None:
    """Only graphs tell them apart: their messages are the same, and the newest has all types of the others."""
    versions = accepting(told)
    latest = max(versions, key=lambda dialect: dialect.triple)
    switches = ("hello_request_bytes", "has_memset_tensor", "acks_buffer_commands", "set_tensor_has_cache_flag")
    for dialect in versions:
        assert all(getattr(dialect, switch) == getattr(latest, switch) for switch in switches)
        assert dialect.type_numbers.items() <= latest.type_numbers.items()
        assert latest.has_use_count >= dialect.has_use_count
