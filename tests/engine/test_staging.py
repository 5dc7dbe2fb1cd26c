"""Memory on the way to an accelerator."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import pytest
import torch

from sdrpc.engine import LocalDevice, staging
from sdrpc.engine.precision import EXACT
from sdrpc.errors import OutOfMemory


class Past:
    """A moment that has passed."""

    def query(self) -> bool:
        return True


def test_memory_is_lent_as_long_as_there_is_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_slot", lambda size: staging.Slot(torch.empty(size, dtype=torch.uint8), Past()))
    memory = staging.Staging(torch.device("cuda", 0))
    with memory.lent(staging.LARGE_PIECE + 1) as slot:
        assert slot is None
    with ExitStack() as stack:
        lent = [stack.enter_context(memory.lent(staging.LARGE_PIECE)) for _ in range(staging.LARGE_PIECES + 1)]
        assert len({slot.memory.data_ptr() for slot in lent if slot is not None}) == staging.LARGE_PIECES
        assert lent[-1] is None
        with memory.filled(1, pytest.fail) as filled:
            assert filled is None
    for _ in range(staging.LARGE_PIECES):
        with pytest.raises(KeyError), memory.lent(1) as slot:
            raise KeyError
    with memory.lent(1) as slot:
        assert slot is not None


def test_where_there_is_no_such_memory_the_device_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> None:
        raise torch.OutOfMemoryError("CUDA error: out of memory")

    device = LocalDevice("CPU", torch.device("cpu"), EXACT, threads=1)
    monkeypatch.setattr(device, "_staging", staging.Staging(torch.device("cuda", 0)))
    monkeypatch.setattr(staging, "_slot", refuse)
    buffer = device.allocate(64)
    with pytest.raises(OutOfMemory, match="CPU: no room"):
        device.look(buffer, 0, 64, bytes)
    device.close()


@pytest.mark.parametrize("take", [staging.Staging._take, staging.Staging._take_large])
def test_who_comes_after_refusals_does_not_wait_for_what_was_refused(
    take: Callable[[staging.Staging], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(size: int) -> None:
        raise torch.OutOfMemoryError(size)

    memory = staging.Staging(torch.device("cuda", 0))
    monkeypatch.setattr(staging, "_slot", refuse)
    for _ in range(staging.PIECES + staging.LARGE_PIECES):
        with pytest.raises(torch.OutOfMemoryError):
            take(memory)
    monkeypatch.setattr(staging, "_slot", lambda size: size)
    assert take(memory) in (staging.PIECE, staging.LARGE_PIECE)
