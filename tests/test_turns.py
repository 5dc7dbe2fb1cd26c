"""Whose turn it is, in seconds that nobody has to wait for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping

import pytest

from sdrpc.turns import REMEMBERED, Turns

Client = tuple[Hashable, Hashable]


def shares(costs: Mapping[Client, float], until: float) -> Counter[Hashable]:
    """The seconds that each owner had by then, when all clients always want more, each run taking its ``costs``."""
    turns: Turns[Client] = Turns()
    had: Counter[Hashable] = Counter()
    for client in costs:
        turns.put(client, client)
    now = 0.0
    while now < until:
        client = turns.take()
        now += costs[client]
        had[client[0]] += costs[client]  # type: ignore[assignment]
        turns.spent(client, costs[client])
        turns.put(client, client)
    return had


def test_owners_have_equal_shares_whatever_their_runs_take_and_however_many_they_are() -> None:
    costs: dict[Client, float] = {("many", i): 0.03 for i in range(100)}
    costs |= {("few", 0): 2.0, ("one", 0): 0.001}
    had = shares(costs, 600.0)
    assert all(abs(seconds - 200) <= 2.0 for seconds in had.values()), had


def test_connections_of_an_owner_have_equal_shares() -> None:
    had = shares({("a", i): 0.5 + i for i in range(3)}, 300.0)
    assert had["a"] >= 300
    turns: Turns[int] = Turns()
    for i in range(3):
        turns.put(("a", i), i)
    assert sorted(turns.take() for _ in range(3)) == [0, 1, 2]


@pytest.mark.parametrize("owners", [1, 2, 10], ids=str)
def test_who_asks_for_little_waits_for_the_run_that_is_under_way_and_no_other(owners: int) -> None:
    """Others compute all the time, a second each; a client of a millisecond comes now and then, also several times
    while each of the others has one turn."""
    turns: Turns[Client] = Turns()
    for i in range(100):
        turns.put((i % owners, i), (i % owners, i))
    me: Client = ("me", 0)
    began = 0
    for turn in range(3000):
        client = turns.take()
        asks = turn >= owners and turn % 3  # before, nobody knows yet how long others take
        if asks:
            turns.put(me, me)  # while that one runs
            began += 1
        turns.spent(client, 1.0)
        turns.put(client, client)
        if asks:
            assert turns.take() == me, f"somebody else had the turn {turn}"
            turns.spent(me, 0.001)
    assert began > 1900


def test_who_had_more_than_others_waits_for_them() -> None:
    """The bound ends where it would be a larger share than theirs: after a second's worth of milliseconds."""
    turns: Turns[str] = Turns()
    for i in range(5):
        turns.put((i, 0), str(i))
    for _ in range(5):
        other = turns.take()
        turns.put((int(other), 0), other)
        turns.spent((int(other), 0), 1.0)
    asked = 0
    turns.put(("me", 0), "me")
    while turns.take() == "me":
        asked += 1
        turns.spent(("me", 0), 0.001)
        turns.put(("me", 0), "me")
    assert 990 < asked <= 2000


def test_a_run_counts_whoever_comes_for_the_first_time_while_it_is_under_way() -> None:
    turns: Turns[str] = Turns()
    turns.put(("long", 0), "long")
    assert turns.take() == "long"
    turns.put(("new", 0), "new")
    turns.spent(("long", 0), 10.0)
    turns.put(("long", 0), "long")
    for _ in range(10):
        assert turns.take() == "new"
        turns.put(("new", 0), "new")
        turns.spent(("new", 0), 1.0)


def test_nobody_saves_up_turns_by_staying_away() -> None:
    turns: Turns[str] = Turns()
    for _ in range(100):
        turns.put(("a", 0), "a")
        assert turns.take() == "a"
        turns.spent(("a", 0), 1.0)
    order = []
    for name in "ab":
        turns.put((name, 0), name)
    for _ in range(20):
        order.append(turns.take())
        turns.spent((order[-1], 0), 1.0)
        turns.put((order[-1], 0), order[-1])
    assert order.count("a") >= 9


def test_nobody_begins_anew_by_coming_under_another_name_of_his_own() -> None:
    turns: Turns[Client] = Turns()
    had: Counter[Hashable] = Counter()
    for client in (("honest", 0), ("flood", 0)):
        turns.put(client, client)
    for connection in range(1, 2000):
        client = turns.take()
        had[client[0]] += 1
        turns.spent(client, 1.0)
        after = ("flood", connection) if client[0] == "flood" else client
        turns.put(after, after)
    assert abs(had["flood"] - had["honest"]) <= 2


def test_what_is_remembered_is_bounded() -> None:
    turns: Turns[int] = Turns()
    for i in range(10 * REMEMBERED):
        turns.put((i, i), i)
        assert turns.take() == i
        turns.spent((i, i), float(i + 1))
    assert len(turns) == 0
    assert len(turns._root.below) <= REMEMBERED + 1


def test_tasks_of_one_client_keep_their_order() -> None:
    turns: Turns[int] = Turns()
    for i in range(5):
        turns.put(("a", 0), i)
    assert [turns.take() for _ in range(5)] == list(range(5))
