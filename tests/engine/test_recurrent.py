"""What keeps recurrences and indexers within bounds."""

from __future__ import annotations

import pytest

from sdrpc.engine import LocalDevice
from sdrpc.engine.ops import deepseek
from tests.engine.test_cases import test_case as check_case


@pytest.mark.parametrize("scores", [1, 50, 100])
def test_an_indexer_takes_its_heads_in_pieces(
    device: LocalDevice, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three heads of 40 scores each: one by one, or two at once."""
    monkeypatch.setattr(deepseek, "SCORES", scores)
    check_case(device, "LIGHTNING_INDEXER")
