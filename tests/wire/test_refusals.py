"""What a server says when it refuses: as values from one end to the other, and whatever else may come."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdrpc.errors import (
    ComputeError,
    GraphError,
    OutOfMemory,
    OverQuota,
    RemoteProtocolError,
    SdrpcError,
    ServerStopping,
    Stopped,
    UnsupportedOperation,
)
from sdrpc.wire.refusals import KINDS, Refusal, from_text, refusal, to_text

ERRORS: list[tuple[SdrpcError, Refusal]] = [
    (OutOfMemory("CPU", 9, "why", 3, 2), Refusal("memory", "why", {"asked": 9, "free": 3, "others": 2})),
    (OutOfMemory("CPU", 9), Refusal("memory", "", {"asked": 9})),
    (OverQuota("full"), Refusal("quota", "full")),
    (ServerStopping("", "stops"), Refusal("stopping", ": stops")),
    (Stopped("CPU: stopped: it stops", "it stops"), Refusal("stopping", "it stops")),
    (UnsupportedOperation("no", "node 3"), Refusal("operation", "no", node="node 3")),
    (GraphError("no", "node 3"), Refusal("graph", "no", node="node 3")),
    (ComputeError("too long"), Refusal("compute", "too long")),
    (RemoteProtocolError("what"), Refusal("protocol", "what")),
    (SdrpcError("else"), Refusal("", "else")),
]


@pytest.mark.parametrize(("error", "said"), ERRORS, ids=lambda value: type(value).__name__)
def test_errors_are_said_and_understood(error: SdrpcError, said: Refusal) -> None:
    assert refusal(error) == said
    assert from_text(to_text(said)) == said


def test_every_kind_is_said() -> None:
    assert {said.kind for _, said in ERRORS} == {*KINDS, ""} - {"key", "device"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no room", Refusal("", "no room")),
        ("", Refusal("", "")),
        ("[" * 100_000, Refusal("", "[" * 100_000)),
        ('{"kind":"memory"}', Refusal("", '{"kind":"memory"}')),
        ('{"kind":["x"],"reason":"a"}', Refusal("", "a")),
        ('{"kind":"unheard of","reason":"a","node":7}', Refusal("", "a")),
        ('{"kind":"memory","reason":"a","asked":-1,"free":true,"others":1e3}', Refusal("memory", "a")),
        (f'{{"kind":"memory","reason":"a","asked":{2**64}}}', Refusal("memory", "a")),
    ],
)
def test_what_anybody_else_says_is_words(text: str, said: Refusal) -> None:
    assert from_text(text) == said


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.dictionaries(st.text(), x)))
def test_any_json_is_a_refusal(value: object) -> None:
    said = from_text(json.dumps({"kind": "memory", "reason": "x", "asked": value, "node": value}))
    assert said.kind == "memory"
    assert all(type(number) is int for number in said.numbers.values())
