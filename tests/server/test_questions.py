"""Clients' questions take turns."""

from __future__ import annotations

from functools import partial
from threading import Event, Thread

import pytest

from sdrpc.server.questions import Questions


def test_nobody_waits_for_all_that_another_asks() -> None:
    questions, begun, go_on = Questions(1), Event(), Event()
    answered: list[str] = []

    def first() -> None:
        begun.set()
        assert go_on.wait(300)

    under_way = questions.ask(("many", 0), first)
    assert begun.wait(300)
    of_many = [questions.ask(("many", number % 3), partial(answered.append, "many")) for number in range(9)]
    of_one = questions.ask(("one", 0), partial(answered.append, "one"))
    go_on.set()
    for answer in (under_way, *of_many, of_one):
        answer.result(300)
    assert answered.index("one") == 0, "the other one has had the thread already"


def test_where_the_system_gives_no_thread_those_that_are_there_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A question stayed in the line then, and the one behind it was never answered."""
    questions = Questions(4)

    def no_room(_: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(Thread, "start", no_room)
        asked = [questions.ask(("one", 0), partial(int, number)) for number in range(9)]
    assert [answer.result(300) for answer in asked] == list(range(9))
    monkeypatch.setattr(Thread, "start", no_room)
    with pytest.raises(RuntimeError, match="can't start"):
        Questions(1)


def test_what_a_look_raises_is_the_answer_and_ends_no_thread() -> None:
    questions = Questions(1)

    def fails() -> None:
        raise ValueError("no such place")

    with pytest.raises(ValueError, match="no such place"):
        questions.ask(("one", 0), fails).result(300)
    assert questions.ask(("one", 0), lambda: 7).result(300) == 7
