"""Compiled graphs that are kept: so many of them, and of tensors."""

from __future__ import annotations

from typing import Any, cast

import pytest

from sdrpc.engine import programs
from sdrpc.engine.deadline import Deadline
from sdrpc.engine.programs import Programs


def test_what_is_kept_has_only_so_many_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "TENSORS", 100)
    kept, made = Programs(), []

    def get(name: bytes, tensors: int) -> None:
        def make() -> Any:
            made.append(name)
            return cast(Any, name)

        assert cast(Any, kept.get(name, make, tensors, Deadline(60.0, "compiling"))) == name

    for name, tensors in ((b"a", 40), (b"b", 40), (b"a", 40), (b"c", 20), (b"a", 40), (b"d", 40), (b"b", 40)):
        get(name, tensors)
    assert made == [b"a", b"b", b"c", b"d", b"b"], "who was used longest ago went"
    get(b"huge", 101)
    get(b"a", 40)
    assert made[-2:] == [b"huge", b"a"], "what is too large makes no room for itself by staying"
