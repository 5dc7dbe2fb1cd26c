"""Compiled graphs that are kept: so many of them, and of tensors."""

from __future__ import annotations

import threading
from typing import Any, cast

import pytest

from sdrpc.device import NOBODY, Client
from sdrpc.engine import programs
from sdrpc.engine.deadline import Deadline
from sdrpc.engine.in_turn import InTurn
from sdrpc.engine.programs import Programs
from sdrpc.errors import Stopped
from tests.server.conftest import eventually


def test_what_is_kept_has_only_so_many_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "TENSORS", 100)
    kept, made = Programs(), []

    def get(name: bytes, tensors: int) -> None:
        def make() -> Any:
            made.append(name)
            return cast(Any, name)

        assert cast(Any, kept.get(name, make, tensors, Deadline(60.0, "compiling"), NOBODY)) == name

    for name, tensors in ((b"a", 40), (b"b", 40), (b"a", 40), (b"c", 20), (b"a", 40), (b"d", 40), (b"b", 40)):
        get(name, tensors)
    assert made == [b"a", b"b", b"c", b"d", b"b"], "who was used longest ago went"
    get(b"huge", 101)
    get(b"a", 40)
    assert made[-2:] == [b"huge", b"a"], "what is too large makes no room for itself by staying"


def test_clients_compile_in_turn_and_may_leave_while_they_wait() -> None:
    """Who comes with one graph waits for the one that is being compiled, and for no other of somebody who has many."""
    in_turn, order = InTurn(), []
    many, one = Client(("many", 1)), Client(("one", 1))
    gone = threading.Event()

    def work(client: Client, what: str) -> None:
        with in_turn.turn(client, Deadline(None)):
            order.append(what)

    def leave() -> None:
        with (
            pytest.raises(Stopped),
            in_turn.turn(one, Deadline(None, watch=lambda: "it left" if gone.is_set() else "")),
        ):
            raise AssertionError

    threads: list[threading.Thread] = []
    with in_turn.turn(many, Deadline(None)):
        works = [(work, many, "many"), (work, many, "many"), (leave,), (work, one, "one")]
        for count, (function, *arguments) in enumerate(works, 1):
            threads.append(threading.Thread(target=function, args=arguments))
            threads[-1].start()
            assert eventually(lambda count=count: len(in_turn._waiting) == count)
        gone.set()
        threads[2].join()
    for thread in threads:
        thread.join()
    assert order == ["one", "many", "many"]
