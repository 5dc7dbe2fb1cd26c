"""What bytes are called, and who finds it out."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from sdrpc.client import naming
from sdrpc.client.naming import BY_DIGEST, Namer
from sdrpc.content import PIECE, digest

DATA = np.random.default_rng(0).bytes(2 * PIECE + 1)
VIEWS = [memoryview(DATA)[:5], memoryview(DATA)[5:]]


def test_threads_share_the_pieces_of_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(naming, "THREADS", 3)
    together = threading.Barrier(3)  # each piece waits until all are in somebody's hands

    def hashed(views: naming.Views) -> bytes:
        together.wait(60)
        return BY_DIGEST.hashed(views)

    namer = Namer(BY_DIGEST._replace(hashed=hashed))
    try:
        assert namer.name(lambda: VIEWS).result() == digest(DATA)
    finally:
        namer.close()


def test_one_thread_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(naming, "THREADS", 1)
    fnv = naming.by_hash()
    assert fnv is not None
    for scheme in (BY_DIGEST, fnv):
        namer = Namer(scheme)
        try:
            names = [namer.name(lambda: VIEWS) for _ in range(5)]
            assert {each.result() for each in names} == {scheme.name([memoryview(DATA)])}
        finally:
            namer.close()


def test_what_is_made_is_hashed_while_others_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(naming, "THREADS", 1)
    may = threading.Event()

    def slow() -> naming.Views:
        assert may.wait(60)
        return VIEWS

    namer = Namer(BY_DIGEST)
    try:
        first, second = namer.name(lambda: VIEWS), namer.name(slow)
        assert first.result() == digest(DATA)
        may.set()
        assert second.result() == digest(DATA)
    finally:
        namer.close()


def test_what_is_wrong_with_bytes_is_told_to_who_asks() -> None:
    def unreadable() -> naming.Views:
        raise OSError("the disk")

    namer = Namer(BY_DIGEST)
    try:
        name = namer.name(unreadable)
        with pytest.raises(OSError, match="the disk"):
            name.result()
    finally:
        namer.close()
