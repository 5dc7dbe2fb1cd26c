"""Questions with the same bytes: answered once by the session, then from memory, and never otherwise than then."""

from __future__ import annotations

from struct import pack

import numpy as np
import pytest

from sdrpc.ggml.dialect import dialects, newest
from sdrpc.server import Server
from sdrpc.server.asked_again import REMEMBERED, AskedAgain
from sdrpc.server.session import Session
from sdrpc.wire import messages
from sdrpc.wire.framing import REPLY_HEADER, encode_request
from sdrpc.wire.hello import Capability
from sdrpc.wire.messages import Command
from sdrpc.wire.records import Record
from tests.server.conftest import Scene
from tests.support.client import Adder, RawClient

VERSIONS = (newest(),)
ANSWER = 16


def asking(client: RawClient, *ne: int) -> bytes:
    """The size of a tensor of F32 with two sources is asked for."""
    sources = (client.record(ne=(8,)), client.record(ne=(2, 4)), *[Record()] * 8)
    question = messages.GetAllocSize(0, client.record(ne=ne), sources)
    return b"".join(encode_request(question, client.dialect, client.name_length))


def size_in(answer: bytes) -> int:
    assert answer[: REPLY_HEADER.size] == REPLY_HEADER.pack(8)
    return int.from_bytes(answer[REPLY_HEADER.size :], "little")


def question(number: int, size: int = 100) -> bytes:
    return pack("<BQ", Command.GET_ALLOC_SIZE, size) + bytes([number]) * size


def test_only_whole_questions_of_a_kind() -> None:
    asked = AskedAgain()
    first = question(1)
    assert asked.question(memoryview(first)) == first
    assert asked.question(memoryview(first + question(2))) == first
    for end in (0, 1, 8, 9, len(first) - 1):
        assert asked.question(memoryview(first[:end])) == b"", end
    other = pack("<BQ", Command.GET_ALIGNMENT, 4) + bytes(4)
    assert asked.question(memoryview(other)) == b""


def test_an_answer_holds_for_what_the_client_may_speak() -> None:
    asked = AskedAgain()
    asked.keep(question(1), VERSIONS, [b"an ", memoryview(b"answer")])
    assert asked.answer(question(1), VERSIONS) == b"an answer"
    assert asked.answer(question(2), VERSIONS) is None
    fewer = (newest(),)
    assert asked.answer(question(1), fewer[:0]) is None
    asked.keep(question(2), fewer[:0], [b"other"])
    assert asked.answer(question(2), fewer[:0]) == b"other"
    assert asked.answer(question(1), VERSIONS) is None


def test_so_much_is_remembered() -> None:
    asked = AskedAgain()
    large = REMEMBERED // 3
    for number in range(10):
        asked.keep(question(number, large), VERSIONS, [b"x"])
        assert sum(len(each.question) for each in asked._known) <= REMEMBERED
        assert asked.answer(question(number, large), VERSIONS) == b"x"
    asked.keep(question(0, REMEMBERED), VERSIONS, [b"x"])
    assert asked.answer(question(0, REMEMBERED), VERSIONS) is None


def test_questions_come_in_any_order() -> None:
    asked = AskedAgain()
    order = np.random.default_rng(0).integers(0, 8, 1000)
    known: set[int] = set()
    for number in [*order, *np.repeat(order[:50], 3), *np.repeat(order[:50], 3)]:
        found = asked.answer(question(number), VERSIONS)
        assert found == (bytes([number]) if number in known else None)
        if found is None:
            asked.keep(question(number), VERSIONS, [bytes([number])])
            known.add(number)


@pytest.mark.parametrize("version", ["3.6.0", "5.0.1", newest().version])
def test_a_session_is_asked_once(scene: Scene, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    asked: list[messages.GetAllocSize] = []
    answer = Session.answer

    def counting(self: Session, message: object) -> object:
        if isinstance(message, messages.GetAllocSize):
            asked.append(message)
        return answer(self, message)

    monkeypatch.setattr(Session, "answer", counting)
    dialect = dialects()[version]
    with Server(scene.devices, dialect) as server, RawClient(server.port, dialect) as client:
        one, other = asking(client, 4), asking(client, 4, 3)
        sizes = []
        for sent in (one, other, one, one + other + one):
            client.send(sent)
            sizes += [size_in(client.receive(ANSWER)) for _ in range(len(sent) // len(one))]
        assert sizes == [16, 48, 16, 16, 48, 16]
        assert len(asked) == 2
        half = len(one) // 2
        client.send(one[:half], one[half:])  # which may come in two pieces: then it is read as a new one
        assert size_in(client.receive(ANSWER)) == 16


def test_what_was_asked_before_is_answered_before(scene: Scene) -> None:
    with scene.client(Capability.ERRORS | Capability.MANAGED) as client:
        add = Adder(client)
        add()
        ask = asking(client, 4)
        get = b"".join(encode_request(messages.GetTensor(add.a, 0, 16), client.dialect, client.name_length))
        client.send(ask)
        assert size_in(client.receive(ANSWER)) == 16
        values = client.get(add.a, 16)
        client.send(get + ask + get)
        assert client.receive(3 * REPLY_HEADER.size + 40)[:24] == REPLY_HEADER.pack(16) + values
    scene.goes_on()


def test_a_question_that_is_refused_is_refused_again(scene: Scene) -> None:
    for _ in range(2):
        with scene.client(Capability.ERRORS) as client:
            client.send(asking(client, 4))
            assert size_in(client.receive(ANSWER)) == 16
            nameless = client.record(ne=(4,))._replace(type=77)
            client.post(messages.GetAllocSize(0, nameless, (Record(),) * 10))
            scene.ends(client, "type 77 does not exist")
