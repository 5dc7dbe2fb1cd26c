"""Memory on the way to an accelerator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sdrpc.engine import staging


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
