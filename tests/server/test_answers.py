"""Answers that wait for a device: in the order of the questions, and nobody waits who need not."""

from __future__ import annotations

from typing import Any, cast

import pytest

from sdrpc.ggml.dialect import dialects
from sdrpc.server.handler import ANSWERS, SMALL, Answers
from sdrpc.wire import messages
from sdrpc.wire.framing import REPLY_HEADER, Received
from sdrpc.wire.messages import Command
from sdrpc.wire.records import Record


class Reading:
    """Bytes that are there when somebody has looked ``looks`` times."""

    def __init__(self, data: bytes, looks: float) -> None:
        self.data, self.looks = data, looks

    def ready(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    def wait(self) -> bytes:
        return self.data


NEVER = float("inf")


class Peer:
    """A client's stream and its session at once: what was written, what the device has."""

    def __init__(self, *readings: Reading | None) -> None:
        self.readings = list(readings)
        self.written = b""
        self.has_more = True
        self.beats = 0
        self.dialect = list(dialects().values())[-1]

    def read_soon(self, _: messages.GetTensor) -> Reading | None:
        return self.readings.pop(0)

    def write(self, parts: list[bytes]) -> None:
        self.written += b"".join(map(bytes, parts))

    def beat(self) -> None:
        self.beats += 1


def answers(peer: Peer) -> Answers:
    return Answers(cast(Any, peer), cast(Any, peer))


def get(size: int = 1) -> Received:
    return Received(Command.GET_TENSOR, messages.GetTensor(Record(), 0, size))


RUN = Received(Command.GRAPH_RECOMPUTE, messages.GraphRecompute(0))
ASK = Received(Command.GET_ALIGNMENT, messages.GetAlignment(0))


def framed(*data: bytes) -> bytes:
    return b"".join(REPLY_HEADER.pack(len(each)) + each for each in data)


def test_what_comes_meanwhile_is_dealt_with() -> None:
    peer = Peer(Reading(b"a", 2), Reading(b"b", NEVER))
    waiting = answers(peer)
    assert waiting.later(get())
    assert waiting.later(get())
    waiting.before(RUN)
    waiting.catch_up()
    assert peer.written == b""
    waiting.catch_up()
    waiting.catch_up()
    assert peer.written == framed(b"a"), "it is given as soon as it is there"


def test_no_answer_overtakes_another() -> None:
    peer = Peer(Reading(b"a", 5), Reading(b"b", 0))
    waiting = answers(peer)
    waiting.later(get())
    waiting.later(get())
    waiting.before(ASK)
    assert peer.written == framed(b"a", b"b")
    assert peer.beats > 0, "the client hears that somebody is at work"


def test_a_client_that_sends_nothing_more_gets_them_all() -> None:
    peer = Peer(Reading(b"a", 3), Reading(b"b", 3))
    waiting = answers(peer)
    waiting.later(get())
    waiting.later(get())
    peer.has_more = False
    waiting.catch_up()
    assert peer.written == framed(b"a", b"b")


@pytest.mark.parametrize("size", [1, SMALL + 1])
def test_a_device_that_does_not_queue_answers_at_once(size: int) -> None:
    peer = Peer(None)
    assert not answers(peer).later(get(size))


def test_what_is_large_comes_after_all_that_was_asked_before() -> None:
    peer = Peer(Reading(b"a", 3), Reading(b"b", 3))
    waiting = answers(peer)
    waiting.later(get())
    assert not waiting.later(get(SMALL + 1))
    waiting.before(get(SMALL + 1))
    assert peer.written == framed(b"a")


def test_only_so_many_wait() -> None:
    peer = Peer(*(Reading(b"x", 100) for _ in range(ANSWERS + 1)))
    waiting = answers(peer)
    for _ in range(ANSWERS + 1):
        waiting.later(get())
    waiting.catch_up()
    assert peer.written == framed(b"x")
