"""Whose turn it is, in seconds that nobody has to wait for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping

from sdrpc.engine.turns import REMEMBERED, Turns

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


def test_who_asks_for_little_waits_for_one_run_of_others() -> None:
    """A hundred others compute all the time, 27 ms each; a client of 1 ms comes now and then."""
    turns: Turns[Client] = Turns()
    others: list[Client] = [("crowd", i) for i in range(100)]
    for other in others:
        turns.put(other, other)
    me: Client = ("me", 0)
    waited = []
    for turn in range(1000):
        if turn % 7 == 0:
            turns.put(me, me)
            runs = 0
        client = turns.take()
        runs += client != me
        turns.spent(client, 0.001 if client == me else 0.027)
        if client == me:
            waited.append(runs)
        else:
            turns.put(client, client)
    assert len(waited) > 100
    assert max(waited[1:]) <= 1


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
    turns: Turns[str] = Turns()
    had: Counter[str] = Counter()
    turns.put(("honest", 0), "honest")
    turns.put(("flood", 0), "flood")
    for connection in range(1, 2000):
        name = turns.take()
        had[name] += 1
        turns.spent((name, connection - 1 if name == "flood" else 0), 1.0)
        turns.put((name, connection if name == "flood" else 0), name)
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
