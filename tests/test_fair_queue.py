"""Whose turn it is, in seconds that nobody has to wait for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping

import pytest

from sdrpc.fair_queue import REMEMBERED, FairQueue

Client = tuple[Hashable, Hashable]


def shares(costs: Mapping[Client, float], until: float) -> Counter[Hashable]:
    """The seconds that each owner had by then, when all clients always want more, each run taking its ``costs``."""
    queue: FairQueue[Client] = FairQueue()
    had: Counter[Hashable] = Counter()
    for client in costs:
        queue.put(client, client)
    now = 0.0
    while now < until:
        client = queue.take()
        now += costs[client]
        had[client[0]] += costs[client]  # type: ignore[assignment]
        queue.spent(client, costs[client])
        queue.put(client, client)
    return had


def test_owners_have_equal_shares_whatever_their_runs_take_and_however_many_they_are() -> None:
    costs: dict[Client, float] = {("many", i): 0.03 for i in range(100)}
    costs |= {("few", 0): 2.0, ("one", 0): 0.001}
    had = shares(costs, 600.0)
    assert all(abs(seconds - 200) <= 2.0 for seconds in had.values()), had


def test_connections_of_an_owner_have_equal_shares() -> None:
    had = shares({("a", i): 0.5 + i for i in range(3)}, 300.0)
    assert had["a"] >= 300
    queue: FairQueue[int] = FairQueue()
    for i in range(3):
        queue.put(("a", i), i)
    assert sorted(queue.take() for _ in range(3)) == [0, 1, 2]


@pytest.mark.parametrize("owners", [1, 2, 10], ids=str)
def test_who_asks_for_little_waits_for_the_run_that_is_under_way_and_no_other(owners: int) -> None:
    """Others compute all the time, a second each; a client of a millisecond comes now and then, also several times
    while each of the others has one turn."""
    queue: FairQueue[Client] = FairQueue()
    for i in range(100):
        queue.put((i % owners, i), (i % owners, i))
    me: Client = ("me", 0)
    began = 0
    for turn in range(3000):
        client = queue.take()
        asks = turn >= owners and turn % 3  # before, nobody knows yet how long others take
        if asks:
            queue.put(me, me)  # while that one runs
            began += 1
        queue.spent(client, 1.0)
        queue.put(client, client)
        if asks:
            assert queue.take() == me, f"somebody else had the turn {turn}"
            queue.spent(me, 0.001)
    assert began > 1900


def test_who_had_more_than_others_waits_for_them() -> None:
    """The bound ends where it would be a larger share than theirs: after a second's worth of milliseconds."""
    queue: FairQueue[str] = FairQueue()
    for i in range(5):
        queue.put((i, 0), str(i))
    for _ in range(5):
        other = queue.take()
        queue.put((int(other), 0), other)
        queue.spent((int(other), 0), 1.0)
    asked = 0
    queue.put(("me", 0), "me")
    while queue.take() == "me":
        asked += 1
        queue.spent(("me", 0), 0.001)
        queue.put(("me", 0), "me")
    assert 990 < asked <= 2000


def test_a_run_counts_whoever_comes_for_the_first_time_while_it_is_under_way() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.put(("long", 0), "long")
    assert queue.take() == "long"
    queue.put(("new", 0), "new")
    queue.spent(("long", 0), 10.0)
    queue.put(("long", 0), "long")
    for _ in range(10):
        assert queue.take() == "new"
        queue.put(("new", 0), "new")
        queue.spent(("new", 0), 1.0)


def test_nobody_saves_up_turns_by_staying_away() -> None:
    queue: FairQueue[str] = FairQueue()
    for _ in range(100):
        queue.put(("a", 0), "a")
        assert queue.take() == "a"
        queue.spent(("a", 0), 1.0)
    order = []
    for name in "ab":
        queue.put((name, 0), name)
    for _ in range(20):
        order.append(queue.take())
        queue.spent((order[-1], 0), 1.0)
        queue.put((order[-1], 0), order[-1])
    assert order.count("a") >= 9


def test_nobody_begins_anew_by_coming_under_another_name_of_his_own() -> None:
    queue: FairQueue[Client] = FairQueue()
    had: Counter[Hashable] = Counter()
    for client in (("honest", 0), ("flood", 0)):
        queue.put(client, client)
    for connection in range(1, 2000):
        client = queue.take()
        had[client[0]] += 1
        queue.spent(client, 1.0)
        after = ("flood", connection) if client[0] == "flood" else client
        queue.put(after, after)
    assert abs(had["flood"] - had["honest"]) <= 2


def test_what_is_remembered_is_bounded() -> None:
    queue: FairQueue[int] = FairQueue()
    for i in range(10 * REMEMBERED):
        queue.put((i, i), i)
        assert queue.take() == i
        queue.spent((i, i), float(i + 1))
    assert len(queue) == 0
    assert len(queue._root.below) <= REMEMBERED + 1


def test_tasks_of_one_client_keep_their_order() -> None:
    queue: FairQueue[int] = FairQueue()
    for i in range(5):
        queue.put(("a", 0), i)
    assert [queue.take() for _ in range(5)] == list(range(5))
